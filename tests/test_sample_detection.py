"""Samples: scores and rates worked out by hand, and what is read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_networks import linear

from baselines_rnp.sample_detection import strip, unlearned_log_odds
from onp.bench.samples import rates
from onp.data import DefenceData
from onp.errors import DataError
from onp.samples import load_samples


def test_the_unlearned_copy_agrees_on_triggered_images_alone() -> None:
    """Pixel 2 is the trigger to class 1; the unlearned copy has nothing left but that."""
    network = linear(torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 9.0]]))
    unlearned = linear(torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 9.0]]))
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]).view(3, 1, 1, 3)
    data = DefenceData(images, torch.zeros(3, dtype=torch.long), 2)
    scores = unlearned_log_odds(network, unlearned, images, data)
    assert scores.tolist() == pytest.approx([-2, -2, 11], rel=1e-4)


def test_clean_images_of_the_target_class_rank_below_triggered_ones() -> None:
    """The copy is sure of class 1 for both; as a probability that rounds to 1, but the trigger makes it surer."""
    network = linear(torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 9.0], [0.0, 0.0, 0.0]]))
    unlearned = linear(torch.tensor([[0.0, 0.0, 0.0], [0.0, 40.0, 60.0], [0.0, 0.0, 3.0]]))
    clean, triggered = [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]
    images = torch.tensor([clean, triggered]).view(2, 1, 1, 3)
    data = DefenceData(images, torch.zeros(2, dtype=torch.long), 3)
    assert unlearned(images).softmax(1)[:, 1].tolist() == [1.0, 1.0]
    scores = unlearned_log_odds(network, unlearned, images, data).tolist()
    assert scores == pytest.approx([40 - math.log(2), 60 - math.log(1 + math.exp(3))], rel=1e-5)


def test_strip_is_the_entropy_of_mixtures() -> None:
    network = linear(torch.tensor([[4.0, 0.0], [0.0, 3.0]]))
    generator = torch.Generator().manual_seed(0)
    data = DefenceData(torch.rand(4, 1, 1, 2, generator=generator), torch.zeros(4, dtype=torch.long), 2)
    images = torch.rand(3, 1, 1, 2, generator=generator)
    scores = strip(network, images, data, seed=0, overlays=4)  # all of them, in any order
    for image, score in zip(images, scores, strict=True):
        entropies = []
        for clean in data.images:
            one, two = ((image + clean) / 2).flatten().tolist()
            p = 1 / (1 + math.exp(3 * two - 4 * one))
            entropies.append(-p * math.log(p) - (1 - p) * math.log(1 - p))
        assert float(score) == pytest.approx(-np.mean(entropies), rel=1e-4)


def test_rates_of_a_ranking() -> None:
    """One of 20 clean images ranks above one of the two triggered ones: 39 of 40 pairs are in order."""
    truth = torch.tensor([False] * 20 + [True] * 2)
    scores = torch.tensor([0.9] + [0.1] * 19 + [1.0, 0.5])
    assert rates(truth, scores) == pytest.approx({"auroc": 39 / 40, "tpr": 1.0})
    worse = torch.tensor([0.9, 0.8] + [0.1] * 18 + [1.0, 0.5])
    assert rates(truth, worse) == pytest.approx({"auroc": 38 / 40, "tpr": 0.5})


def test_samples_are_read_in_order_and_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "deep" / "a.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    samples = load_samples(tmp_path, (3, 4, 4), resize=False)
    assert [path.name for path in samples.paths] == ["b.png", "a.png"]
    assert "skipped, since their suffix is no image's: 1" in caplog.text
    assert samples.images[0].unique().tolist() == pytest.approx([0.2])
    assert samples.images[1, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    Image.new("RGB", (6, 4)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"c\.png is 6 x 4, .* 4 x 4; give --image-size"):
        load_samples(tmp_path, (3, 4, 4), resize=False)
    assert load_samples(tmp_path, (1, 4, 4), resize=True).images.shape == (3, 1, 4, 4)
    (tmp_path / "c.png").write_text("broken")
    with pytest.raises(DataError, match="not a readable image"):
        load_samples(tmp_path, (3, 4, 4), resize=True)
    with pytest.raises(DataError, match="no images found"):
        load_samples(tmp_path / "nowhere", (3, 4, 4), resize=True)
