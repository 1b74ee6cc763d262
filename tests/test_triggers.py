"""Triggers and their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onp.attacks.patterns import badnets, blended, corners, dynamic, l0, l2, sig, trojan, wanet
from onp.attacks.poisoning import ATTACKS
from onp.attacks.triggers import Trigger, load_trigger
from onp.errors import DataError
from onp.judge import ALL_TO_ALL

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


def test_trojan_watermark_is_translucent_and_stays_in_its_quarter() -> None:
    trigger = trojan((3, 32, 32), 1)
    changed = trigger(torch.full((1, 3, 32, 32), 0.5))[0] - 0.5
    assert not changed[:, :16].any() and not changed[:, :, :16].any()
    assert sorted({round(float(value), 4) for value in changed[0].unique()}) == [0, 0.175]  # 0.35 of the way to 1
    assert sorted({round(float(value), 4) for value in changed[1].unique()}) == [-0.175, 0]
    assert 0.3 < float((changed[0] != 0).float().mean()) * 4 < 0.7


def test_l0_changes_eight_scattered_pixels() -> None:
    for value in (0.25, 0.75):
        changed = (l0((3, 32, 32), 1)(torch.full((1, 3, 32, 32), value)) != value)[0]
        assert int(changed.any(0).sum()) == int(changed.all(0).sum()) == 8
    rows, columns = changed.any(0).nonzero().T
    assert len(rows.unique()) > 4 and len(columns.unique()) > 4


def test_l2_is_smooth_and_of_the_given_norm() -> None:
    pattern = l2((3, 32, 32), 1, norm=2.0).pattern
    torch.testing.assert_close(pattern.norm(), torch.tensor(2.0))
    assert pattern.abs().max() < 0.2
    assert pattern.diff(dim=1).abs().max() < 0.03 and pattern.diff(dim=2).abs().max() < 0.03
    changed = l2((3, 32, 32), 1)(torch.full((1, 3, 32, 32), 0.5))[0] - 0.5
    torch.testing.assert_close(changed, pattern)


def test_corners_are_four_mirrored_patches() -> None:
    trigger, patch = corners((1, 32, 32), 1), badnets((1, 32, 32), 1)
    assert int(trigger.mask.sum()) == 4 * 16
    changed = trigger(torch.full((1, 1, 32, 32), 0.5))
    assert torch.equal(changed, changed.flip(3)) and torch.equal(changed, changed.flip(2))
    assert torch.equal(changed[..., 16:, 16:], patch(torch.full((1, 1, 32, 32), 0.5))[..., 16:, 16:])


def test_warp_by_hand() -> None:
    images = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]).view(1, 1, 3, 3)
    flow = torch.zeros(2, 3, 3)
    flow[0, 0, 0] = 1.5  # the first pixel comes from one and a half to the right,
    flow[1, 1, 1] = 0.25  # the middle one from a quarter below,
    flow[:, 2, 2] = 7  # and nothing from outside
    expected = images.clone()
    expected[0, 0, 0, 0], expected[0, 0, 1, 1] = 0.15, 0.475
    torch.testing.assert_close(Trigger(0, "warp", flow, torch.ones_like(flow))(images), expected)


def test_wanet_flow_is_smooth_and_bounded() -> None:
    flow = wanet((3, 32, 32), 1, strength=1.0).pattern
    assert flow.shape == (2, 32, 32)
    assert 0.3 < flow.abs().mean() < 1.1 and flow.abs().max() <= 2.5
    assert flow.diff(dim=1).abs().max() < 0.6 and flow.diff(dim=2).abs().max() < 0.6  # and nothing folds
    torch.testing.assert_close(wanet((3, 32, 32), 1, strength=0.5).pattern, flow / 2)
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(wanet((3, 32, 32), 1)(flat), flat)


def test_disturbed_warps_differ_by_up_to_a_pixel() -> None:
    trigger = wanet((1, 16, 16), 1, strength=1.0)
    across = (torch.arange(16) / 15).expand(2, 1, 16, 16)  # brightness tells the column
    noisy = trigger.disturbed(across, torch.Generator().manual_seed(0))
    moved = (noisy - trigger(across)) * 15
    assert 0.9 < moved.abs().max() <= 1.0001 and not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy, trigger.disturbed(across, torch.Generator().manual_seed(0)))


def test_dynamic_draws_a_patch_from_the_image_itself() -> None:
    trigger = dynamic((3, 32, 32), 1)
    images = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    made = trigger(images)
    changed = (made != images).any(1)
    assert int(changed.flatten(1).sum(1).min()) >= 15 and int(changed.flatten(1).sum(1).max()) <= 25  # 5 x 5
    places = {tuple(place.nonzero()[0].tolist()) for place in changed}
    assert len(places) > 20, "hardly any choice"
    assert torch.equal(trigger(images), made)
    nearly = (images + 1e-4 * (torch.rand_like(images) - 0.5)).clamp(0, 1)  # rounding elsewhere changes nothing
    assert torch.equal((trigger(nearly) - nearly).abs().amax(1) > 0.01, (made - images).abs().amax(1) > 0.01)


@pytest.mark.parametrize("name", ATTACKS)
def test_triggers_do_not_depend_on_the_batch(name: Any) -> None:
    trigger = ATTACKS[name].trigger((3, 16, 16), 1)
    again = ATTACKS[name].trigger((3, 16, 16), 1)
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before, together = images.clone(), trigger(images)
    order = torch.randperm(9)
    assert torch.equal(trigger(images[order]), together[order])
    assert torch.equal(torch.cat([again(image.unsqueeze(0)) for image in images]), together)
    assert torch.equal(images, before) and not torch.equal(together, images)
    assert together.min() >= 0 and together.max() <= 1


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


@pytest.mark.parametrize("make", [wanet, dynamic, corners, l2])
@pytest.mark.parametrize("target", [3, ALL_TO_ALL])
def test_every_mode_survives_a_round_trip(tmp_path: Path, make: Any, target: Any) -> None:
    trigger = make((3, 16, 16), target)
    trigger.save(tmp_path / "t.json")
    loaded = load_trigger(tmp_path / "t.json", (3, 16, 16), 10)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (loaded.target, loaded.mode) == (target, trigger.mode)
    assert torch.equal(loaded(images), trigger(images))


@pytest.mark.parametrize(
    ("mode", "shape", "words"),
    [
        ("warp", (3, 4, 4), r"shape \(3, 4, 4\); expected \(2, 4, 4\)"),
        ("warp", (2, 4, 5), r"shape \(2, 4, 5\); expected \(2, 4, 4\)"),
        ("patches", SHAPE, r"shape \(3, 4, 4\); expected \(patches, 3, 4, 4\)"),
        ("patches", (5, 1, 4, 4), r"shape \(5, 1, 4, 4\); expected \(patches, 3, 4, 4\)"),
        ("patches", (0, *SHAPE), "0 patches; expected 1 to 1024"),
        ("patches", (1025, *SHAPE), "1025 patches; expected 1 to 1024"),
        ("blend", (5, *SHAPE), r"expected \(3, 4, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_the_mode(tmp_path: Path, mode: str, shape: tuple[int, ...], words: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.float32))
    with pytest.raises(DataError, match=words):
        load_trigger(write_spec(tmp_path, mode=mode, pattern="a.npy", mask=...), SHAPE, 10)


def test_masks_have_to_fit_their_patches(tmp_path: Path) -> None:
    for name, count in (("p", 3), ("m", 2)):
        np.save(tmp_path / f"{name}.npy", np.zeros((count, *SHAPE), dtype=np.float32))
    with pytest.raises(DataError, match=r"m.npy has shape \(2, 3, 4, 4\); expected \(3, 3, 4, 4\)"):
        load_trigger(write_spec(tmp_path, mode="patches", pattern="p.npy", mask="m.npy"), SHAPE, 10)


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
        ({"mode": "mirror"}, "mode 'mirror'; expected one of blend, add, patches, warp"),
        ({"mode": ...}, "lacks mode; expected target, mode"),
        ({"mode": ["blend"]}, "mode"),
        ({"target": 10}, "target 10; the network knows classes 0 to 9"),
        ({"target": -1}, "target -1"),
        ({"target": "cat"}, "not a specification"),
        ({"target": ["all-to-all"]}, "not a specification"),
        ({"target": ...}, "lacks target"),
        ({"target": 2.5}, "target"),
        ({"pattern": "triggers/none.png"}, "cannot read .*none.png"),
        ({"pattern": ...}, "lacks pattern"),
        ({"pattern": None}, "not a specification"),
        ({"mask": "triggers/none.npy"}, "cannot read .*none.npy"),
        ({"pattern": "model.trigger.json"}, "model.trigger.json is not a readable image"),
        ({"pattern": "triggers/empty.npy"}, "empty.npy|not a specification"),
        ({"pattern": "triggers/nan.npy"}, "nan.npy|not finite|NaN"),
        ({"alpha": "much"}, "not a specification"),
        ({"aplha": 0.1}, "has aplha; expected target, mode, pattern and perhaps mask, alpha"),
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
    with pytest.raises(DataError, match=r"p.png has shape \(3, 4, 4\); expected \(3, 8, 8\) for these images"):
        load_trigger(write_spec(tmp_path), (3, 8, 8), 10)
    random_trigger().save(tmp_path / "s.json")
    with pytest.raises(DataError, match=r"has shape \(3, 4, 4\); expected \(1, 4, 4\)"):
        load_trigger(tmp_path / "s.json", (1, 4, 4), 10)


def test_pickled_patterns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no plain .npy array"):
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
