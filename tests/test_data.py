"""The defence data: what it checks, normalisation and augmentation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from onp.data import DefenceData, Normalisation, balanced_order, random_crop_and_flip
from onp.errors import DataError
from onp.masks import KeepMask
from onp.models import build_model
from onp.units import index_units

PLAIN = Normalisation()


def test_balanced_order_is_a_permutation() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 5])
    assert sorted(balanced_order(labels, 0).tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64), r"shape \(0, 1, 2, 2\)"),
        (torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.int64), r"shape \(2, 2, 2\)"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64), r"labels have shape \(3,\)"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), "float32"),
        (torch.full((2, 1, 2, 2), 1.5), torch.zeros(2, dtype=torch.int64), r"expected \[0, 1\]"),
        (torch.full((2, 1, 2, 2), -0.1), torch.zeros(2, dtype=torch.int64), r"expected \[0, 1\]"),
        (torch.full((2, 1, 2, 2), float("nan")), torch.zeros(2, dtype=torch.int64), r"expected \[0, 1\]"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "type torch.uint8; expected"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.double), torch.zeros(2, dtype=torch.int64), "torch.float64; expected"),
        (np.zeros((2, 1, 2, 2), np.float32), torch.zeros(2, dtype=torch.int64), "images are of type ndarray"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([0, 3]), "labels run from 0 to 3"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([-1, 0]), "labels run from -1 to 0"),
    ],
)
def test_defence_data_checks_itself(images: Tensor, labels: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        DefenceData(images, labels, 3)


def test_normalisation_values() -> None:
    images = torch.tensor([[0.5, 0.2], [1.0, 0.0]]).view(2, 2, 1, 1)
    per_channel = Normalisation((0.5, 0.1), (0.25, 0.5))(images)
    torch.testing.assert_close(per_channel.flatten(1), torch.tensor([[0.0, 0.2], [2.0, -0.2]]))
    torch.testing.assert_close(
        Normalisation((0.5,), (0.5,))(images).flatten(1), torch.tensor([[0.0, -0.6], [1.0, -1.0]])
    )
    assert torch.equal(PLAIN(images), images)


def test_defence_data_normalises_its_inputs() -> None:
    data = DefenceData(
        torch.full((2, 1, 2, 2), 0.75), torch.zeros(2, dtype=torch.int64), 2, Normalisation((0.5,), (0.5,))
    )
    assert torch.equal(data.inputs, torch.full((2, 1, 2, 2), 0.5))
    assert torch.equal(data.subset(torch.tensor([1])).inputs, torch.full((1, 1, 2, 2), 0.5))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), ()), ((0.5, 0.5), (1.0,)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))])
def test_impossible_normalisations(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="equally many values"):
        Normalisation(mean, std)


def test_normalisation_of_another_number_of_channels() -> None:
    with pytest.raises(DataError, match="2 values for images of 3 channels"):
        Normalisation((0.5, 0.5), (1.0, 1.0))(torch.zeros(1, 3, 2, 2))


def _window(image: Tensor, output: Tensor, padding: int) -> tuple[int, int, bool]:
    """Where in the zero-padded image the output lies, and whether it is mirrored; exactly one place fits."""
    size = image.shape[-1]
    padded = torch.zeros(image.shape[0], size + 2 * padding, size + 2 * padding)
    padded[:, padding : padding + size, padding : padding + size] = image
    places = [
        (top, left, mirrored)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for mirrored in (False, True)
        if torch.equal(
            padded[:, top : top + size, left : left + size].flip(2)
            if mirrored
            else padded[:, top : top + size, left : left + size],
            output,
        )
    ]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize(("settings", "padding"), [({}, 2), ({"part": 8}, 2), ({"part": 16}, 1), ({"part": 5}, 3)])
def test_random_crop_and_flip_crops_and_flips_only(settings: dict[str, int], padding: int) -> None:
    images = torch.arange(1.0, 60 * 2 * 16 * 16 + 1).view(60, 2, 16, 16) / 40000
    outputs = random_crop_and_flip(images, seed=0, **settings)
    places = [_window(image, output, padding) for image, output in zip(images, outputs, strict=True)]
    tops, lefts, mirrored = (Counter(values) for values in zip(*places, strict=True))
    assert set(tops) == set(lefts) == set(range(2 * padding + 1))
    assert 15 <= mirrored[True] <= 45
    assert any(top != left for top, left, _ in places), "rows and columns are drawn apart"


def test_random_crop_and_flip_depends_on_the_seed_alone() -> None:
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first, after = random_crop_and_flip(images, 7), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after), "the global generator is left alone"
    assert torch.equal(random_crop_and_flip(images, 7), first)
    assert not torch.equal(random_crop_and_flip(images, 8), first)


def test_data_and_masks_are_shown_in_a_line() -> None:
    data = DefenceData(torch.zeros(6, 3, 8, 8), torch.arange(6) % 3, 3)
    assert repr(data) == "DefenceData(6 images of 3 x 8 x 8, 3 classes)"
    index = index_units(build_model("small_cnn", 3, 3).eval(), data.input_shape)
    mask = KeepMask.all_kept(index).without([0, 1])
    assert repr(mask) == f"KeepMask(2 of {len(index)} units pruned, rule 'zero')"
    assert repr(index) == f"UnitIndex({len(index)} units in {len(index.layers)} layers)"
