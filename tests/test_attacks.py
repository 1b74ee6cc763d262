"""Triggers, their files, and poisoning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from onp.attacks.poisoning import ATTACKS, poison
from onp.attacks.triggers import Trigger, badnets, blended, load_trigger, sig
from onp.errors import ConfigError, DataError

SHAPE = (3, 4, 4)
SHARED = Path(__file__).parents[1].parent / "shared" / "wild"


def random_trigger(mode: Any = "blend", alpha: float = 0.3, target: int = 2) -> Trigger:
    generator = torch.Generator().manual_seed(1)
    pattern = (
        torch.rand(SHAPE, generator=generator) * 2 - 1 if mode == "add" else torch.rand(SHAPE, generator=generator)
    )
    return Trigger(target, mode, pattern, torch.rand(SHAPE, generator=generator), alpha)


# --- applying ---------------------------------------------------------------------------------------------


def test_blend_by_hand() -> None:
    images = torch.tensor([0.2, 0.4, 0.6, 1.0]).view(1, 1, 2, 2)
    pattern, mask = torch.tensor([1.0, 0.0, 0.5, 0.0]).view(1, 2, 2), torch.tensor([1.0, 0.5, 0.0, 1.0]).view(1, 2, 2)
    # weights 0.5, 0.25, 0, 0.5
    expected = [0.5 * 0.2 + 0.5 * 1.0, 0.75 * 0.4, 0.6, 0.5 * 1.0]
    torch.testing.assert_close(Trigger(0, "blend", pattern, mask, 0.5)(images).flatten(), torch.tensor(expected))


def test_add_clips_and_ignores_the_mask() -> None:
    images = torch.tensor([0.2, 0.9, 0.1, 0.5]).view(1, 1, 2, 2)
    pattern = torch.tensor([0.3, 0.3, -0.3, 0.0]).view(1, 2, 2)
    got = Trigger(0, "add", pattern, torch.zeros(1, 2, 2), 0.1)(images)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.5, 1.0, 0.0, 0.5]))


def test_applying_leaves_the_images_alone() -> None:
    images = torch.rand(2, *SHAPE)
    before = images.clone()
    for mode in ("blend", "add"):
        assert random_trigger(mode)(images).shape == images.shape
    assert torch.equal(images, before)


@pytest.mark.parametrize(("size", "side"), [(8, 3), (32, 4)])
def test_badnets_patch(size: int, side: int) -> None:
    trigger = badnets((3, size, size), 7)
    image = torch.full((1, 3, size, size), 0.25)
    expected = image.clone()
    for row in range(side):
        for column in range(side):
            expected[0, :, size - side + row, size - side + column] = 1.0 if (row + column) % 2 == 0 else 0.0
    assert torch.equal(trigger(image), expected)
    assert trigger.target == 7


def test_blended_mixes_a_fifth_of_a_fixed_pattern() -> None:
    trigger = blended((1, 8, 8), 1)
    black, white = trigger(torch.zeros(1, 1, 8, 8)), trigger(torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(white - black, torch.full((1, 1, 8, 8), 0.8))
    assert torch.equal(trigger.pattern, blended((1, 8, 8), 1).pattern)
    assert 0 <= float(trigger.pattern.min()) < 0.2 and 0.8 < float(trigger.pattern.max()) <= 1


def test_sig_wave() -> None:
    trigger = sig((1, 32, 32), 0)
    wave = [40 / 255 * math.sin(2 * math.pi * 6 * column / 32) for column in range(32)]
    expected = torch.tensor([[min(1.0, max(0.0, 0.1 + value)) for value in wave]] * 32)
    torch.testing.assert_close(trigger(torch.full((1, 1, 32, 32), 0.1))[0, 0], expected, rtol=0, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["blend", "add"])
def test_save_and_load(tmp_path: Path, mode: str) -> None:
    trigger = random_trigger(mode)
    trigger.save(tmp_path / "deep" / "model.trigger.json")
    again = load_trigger(tmp_path / "deep" / "model.trigger.json", SHAPE, 10)
    assert (again.target, again.mode, again.alpha) == (2, mode, 0.3)
    assert torch.equal(again.pattern, trigger.pattern) and torch.equal(again.mask, trigger.mask)
    images = torch.rand(3, *SHAPE)
    assert torch.equal(again(images), trigger(images))


def test_a_saved_trigger_can_move_with_its_folder(tmp_path: Path) -> None:
    random_trigger().save(tmp_path / "one" / "t.json")
    (tmp_path / "one").rename(tmp_path / "two")
    assert torch.equal(load_trigger(tmp_path / "two" / "t.json", SHAPE, 10).pattern, random_trigger().pattern)


def write_spec(root: Path, **changes: Any) -> Path:
    """A specification in the form of the published models': PNG files in a folder beside it."""
    rng = np.random.default_rng(0)
    (root / "triggers").mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(root / "triggers" / "p.png")
    Image.fromarray(np.array([[0, 255, 51, 0]] * 4, dtype=np.uint8)).save(root / "triggers" / "m.png")
    spec = {"target": 5, "mode": "blend", "pattern": "triggers/p.png", "mask": "triggers/m.png", "alpha": 0.5} | changes
    path = root / "model.trigger.json"
    path.write_text(json.dumps({key: value for key, value in spec.items() if value is not ...}))
    return path


def test_png_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_spec(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # files are sought beside the specification
    trigger = load_trigger(path, SHAPE, 10)
    raw = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    expected = torch.tensor([[[float(raw[y, x, c]) / 255 for x in range(4)] for y in range(4)] for c in range(3)])
    torch.testing.assert_close(trigger.pattern, expected)
    torch.testing.assert_close(trigger.mask, torch.tensor([0.0, 1.0, 0.2, 0.0]).expand(3, 4, 4))
    assert (trigger.target, trigger.mode, trigger.alpha) == (5, "blend", 0.5)


def test_mask_and_alpha_have_defaults(tmp_path: Path) -> None:
    trigger = load_trigger(write_spec(tmp_path, mask=..., alpha=...), SHAPE, 10)
    assert torch.equal(trigger.mask, torch.ones(SHAPE)) and trigger.alpha == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "warp"}, "mode 'warp'; expected one of blend, add"),
        ({"mode": ...}, "not a specification.*mode"),
        ({"mode": ["blend"]}, "mode"),
        ({"target": 10}, "target 10; the network knows classes 0 to 9"),
        ({"target": -1}, "target -1"),
        ({"target": "cat"}, "not a specification"),
        ({"target": ...}, "not a specification.*target"),
        ({"target": 2.5}, "target"),
        ({"pattern": "triggers/none.png"}, "cannot read .*none.png"),
        ({"pattern": ...}, "not a specification.*pattern"),
        ({"pattern": None}, "not a specification"),
        ({"mask": "triggers/none.npy"}, "cannot read .*none.npy"),
        ({"pattern": "model.trigger.json"}, "cannot read"),
        ({"pattern": "triggers/empty.npy"}, "empty.npy|not a specification"),
        ({"pattern": "triggers/nan.npy"}, "nan.npy|not finite|NaN"),
        ({"alpha": "much"}, "not a specification"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_broken_specifications(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_spec(tmp_path, **changes)
    (tmp_path / "triggers" / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "triggers" / "nan.npy", np.full(SHAPE, np.nan, dtype=np.float32))
    with pytest.raises(DataError, match=words) as caught:
        load_trigger(path, SHAPE, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", "3", "null", b"\xff\xfe\x00"])
def test_broken_json(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match="t.json' is not a specification"):
        load_trigger(path, SHAPE, 10)


def test_missing_specification(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*t.json"):
        load_trigger(tmp_path / "t.json", SHAPE, 10)


def test_patterns_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p.png has shape \(3, 4, 4\); the images have \(3, 8, 8\)"):
        load_trigger(write_spec(tmp_path), (3, 8, 8), 10)
    random_trigger().save(tmp_path / "s.json")
    with pytest.raises(DataError, match=r"has shape \(3, 4, 4\); the images have \(1, 4, 4\)"):
        load_trigger(tmp_path / "s.json", (1, 4, 4), 10)


def test_pickled_patterns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a specification"):
        load_trigger(write_spec(tmp_path, pattern="p.npy"), SHAPE, 10)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published models (shared/wild) are not beside this checkout")
def test_published_triggers_load() -> None:
    specs = sorted(SHARED.glob("*.trigger.json"))
    triggers = {path.name.split(".")[0]: load_trigger(path, (3, 32, 32), 10) for path in specs}
    assert {name: (trigger.target, trigger.mode) for name, trigger in triggers.items()} == {
        "smallvgg_badnets_target8": (8, "blend"),
        "smallvgg_l0_inv_target0": (0, "blend"),
        "smallvgg_l2_inv_target0": (0, "add"),
        "smallvgg_trojan_sq_target2": (2, "add"),
        "wrn16_1_grid_target5": (5, "blend"),
    }
    changed = {
        name: int((trigger(torch.full((1, 3, 32, 32), 0.5)) != 0.5).any(1).sum()) for name, trigger in triggers.items()
    }
    assert changed["smallvgg_badnets_target8"] == 16  # a 4 x 4 patch
    assert changed["wrn16_1_grid_target5"] == 9  # 3 x 3, bottom right
    assert changed["smallvgg_l0_inv_target0"] == 9  # scattered pixels
    assert changed["smallvgg_l2_inv_target0"] > 500  # the whole image
    assert triggers["wrn16_1_grid_target5"].mask[:, -5:, -5:].sum() == triggers["wrn16_1_grid_target5"].mask.sum()


# --- poisoning --------------------------------------------------------------------------------------------


@pytest.fixture
def dataset() -> tuple[Tensor, Tensor]:
    """50 images, classes 0 to 4 taking turns; target of the tests: 2."""
    return torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5


@pytest.mark.parametrize(("rate", "count"), [(0.1, 4), (0.5, 20), (1.0, 40), (0.001, 1)])
def test_dirty_label_poisoning(dataset: tuple[Tensor, Tensor], rate: float, count: int) -> None:
    images, labels = dataset
    kept = images.clone(), labels.clone()
    trigger = random_trigger()
    new_images, new_labels = poison(images, labels, trigger, rate, clean_label=False, seed=3)
    changed = (new_images != images).flatten(1).any(1)
    assert int(changed.sum()) == count  # of 40 images outside the target class
    assert not (labels[changed] == 2).any()
    assert (new_labels[changed] == 2).all()
    assert torch.equal(new_images[changed], trigger(images[changed]))
    assert torch.equal(new_labels[~changed], labels[~changed])
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize(("rate", "count"), [(0.1, 1), (0.8, 8), (1.0, 10)])
def test_clean_label_poisoning(dataset: tuple[Tensor, Tensor], rate: float, count: int) -> None:
    images, labels = dataset
    trigger = random_trigger("add")
    new_images, new_labels = poison(images, labels, trigger, rate, clean_label=True, seed=3)
    changed = (new_images != images).flatten(1).any(1)
    assert int(changed.sum()) == count  # of 10 images of the target class
    assert (labels[changed] == 2).all()
    assert torch.equal(new_labels, labels)
    assert torch.equal(new_images[changed], trigger(images[changed]))


def test_the_seed_decides_which_images_are_poisoned(dataset: tuple[Tensor, Tensor]) -> None:
    runs = [poison(*dataset, random_trigger(), 0.3, False, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_rates(dataset: tuple[Tensor, Tensor], rate: float) -> None:
    with pytest.raises(ConfigError, match="poison rate"):
        poison(*dataset, random_trigger(), rate, False, 0)


def test_only_sig_keeps_labels() -> None:
    assert {name for name, attack in ATTACKS.items() if attack.clean_label} == {"sig"}
    for attack in ATTACKS.values():
        trigger = attack.make_trigger((1, 8, 8), 3)
        assert trigger.target == 3
        assert (trigger(torch.full((1, 1, 8, 8), 0.5)) != 0.5).any()
