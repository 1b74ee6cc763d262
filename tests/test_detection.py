"""The parts of detection, on networks and sizes worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from baselines_rnp.label_detection import (
    Calibration,
    Evidence,
    collapse,
    conclusive,
    find_evidence,
    outlier,
    runner_up,
    weigh,
)
from baselines_rnp.patch_recovery import recover_patches, success
from baselines_rnp.sample_detection import strip, unlearned_agreement
from onp.attacks.triggers import Trigger
from onp.bench.calibrate import CalibrateConfig, fit_calibration, leave_one_out, run_calibrate
from onp.bench.detect import rates
from onp.bench.patches import cosine, overlap
from onp.config import DetectionConfig, TriggerRecoveryConfig, WarpRecoveryConfig
from onp.data import DefenceData
from onp.errors import ConfigError, DataError, FileError, ModelError, OnpError
from onp.samples import load_samples
from onp.suspicious_units import suspicious_units
from onp.trigger_recovery import Patch, RecoveredTrigger
from onp.units import index_units
from onp.untargeted_recovery import UntargetedTrigger, recover_untargeted_trigger
from onp.warp_recovery import RecoveredWarp, recover_warp, warp


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Logits that are a linear function of the pixels; `weight` has shape (classes, pixels)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias if bias is not None else torch.zeros(len(weight)))
    return nn.Sequential(nn.Flatten(), layer).eval()


# --- warps ----------------------------------------------------------------------------------------------------


def test_a_warp_samples_where_its_flow_points() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 8, 8)
    assert torch.allclose(warp(images, flow), images, atol=1e-5)
    flow[1, 0], flow[1, 1] = 2, 1  # two pixels to the right, one further down
    moved = warp(images, flow)
    assert torch.allclose(moved[0], images[0], atol=1e-5)
    assert torch.allclose(moved[1, :, :7, :6], images[1, :, 1:, 2:], atol=1e-5)
    assert torch.allclose(moved[1, :, 7, 7], images[1, :, 7, 7], atol=1e-5), "beyond the border is the border"


def test_the_class_behind_the_smallest_warp_is_found() -> None:
    """Bars stand in column 8; class 1 is a bar two columns further, class 0 one six columns further."""
    weight = torch.zeros(3, 1, 32, 32)
    for label, column in enumerate((14, 10, 8)):
        weight[label, :, :, column] = 1
    images = 0.05 * torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, :, 8] = 1
    network = linear(weight.flatten(1))
    assert network(images).argmax(1).tolist() == [2] * 16, "that of the bars as they are, which is not searched"
    data = DefenceData(images, torch.zeros(16, dtype=torch.long), 2)
    recovered = recover_warp(network, data, WarpRecoveryConfig(), seed=0)
    assert recovered.target == 1 and recovered.sizes[1] < recovered.sizes[0]
    success = network(recovered(images)).argmax(1) == 1
    assert success.float().mean() >= 0.6, "it works on 80 % of a batch"
    assert recovered.sizes[1] == pytest.approx(float(recovered.flow.norm(dim=0).mean()), rel=1e-4)
    assert all(parameter.requires_grad for parameter in network.parameters())


# --- labels ---------------------------------------------------------------------------------------------------


def untargeted(size: float, moves: Tensor) -> UntargetedTrigger:
    return UntargetedTrigger(torch.ones(1, 8, 8), torch.ones(3, 8, 8), size, moves)


def evidence(
    masks: tuple[float, ...],
    warps: tuple[float, ...],
    shares: tuple[float, ...],
    everyone: UntargetedTrigger | None = None,
) -> Evidence:
    mask = RecoveredTrigger(masks.index(min(masks)), torch.ones(1, 1, 8, 8), torch.ones(1, 3, 8, 8), masks)
    warp = RecoveredWarp(warps.index(min(warps)), torch.zeros(2, 8, 8), warps)
    return Evidence(nn.Identity(), shares, mask, warp, everyone or untargeted(math.inf, torch.zeros(3, 3)), 1.0)


def test_an_outlier_is_the_log_of_the_rival_over_the_size() -> None:
    assert runner_up((8.0, 2.0, 6.0)) == 6
    assert outlier(2.0, 6.0, 1, 64) == pytest.approx(math.log(3))
    assert outlier(2.0, math.inf, 1, 4) == pytest.approx(math.log(2)), "bounded by the most"
    assert outlier(9.0, math.inf, 1, 4) == 0 and outlier(math.inf, math.inf, 1, 4) == 0
    assert outlier(1e-8, 3.0, 1, 4) == pytest.approx(math.log(3)), "bounded by the least"
    assert outlier(6.0, 2.0, 1, 64) == 0, "what is larger does not stand out"


def test_the_kind_that_speaks_louder_names_the_suspect() -> None:
    by_mask = evidence((40.0, 4.0, 40.0), (0.5, 0.4, 0.3), (0.4, 0.2, 0.4))
    assert (by_mask.family, by_mask.trigger.target) == ("mask", 1)
    assert by_mask.strength == pytest.approx(math.log(10)), "whatever the unlearned copy says"
    by_warp = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.2), (0.1, 0.5, 0.4))
    assert (by_warp.family, by_warp.trigger.target) == ("warp", 2)
    assert by_warp.strength == pytest.approx(0.8 * math.log(4)) and by_warp.agreement(2) == pytest.approx(0.8)
    alone = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.2), (0.98, 0.01, 0.01))
    assert alone.family == "mask" and alone.strength == pytest.approx(math.log(40 / 36)), "no copy collapses there"
    far = evidence((40.0, 36.0, 40.0), (2.0, 9.0, 1.5), (0.1, 0.1, 0.8))
    assert far.outliers["warp"] == 0, "more than an eighth of the height is no hidden warp"


def masks(*sizes: float) -> RecoveredTrigger:
    """Masks of so many pixels of 64, the smallest with a picture."""
    picture = torch.zeros(1, 1, 8, 8)
    return RecoveredTrigger(sizes.index(min(sizes)), picture, picture, sizes)


def test_masks_alone_are_conclusive_from_a_confidence_on() -> None:
    assert conclusive(masks(40.0, 4.0, 30.0), 0.95) and not conclusive(masks(40.0, 4.0, 30.0), 1.01)
    assert not conclusive(masks(40.0, 20.0, 30.0), 0.95)
    for rival in range(5, 64):
        mask = masks(4.0, float(rival), 64.0)
        assert mask.trust == 1 or not conclusive(mask, 0.95), "no trigger without a target could lead the reward"


def test_what_was_not_looked_for_says_nothing() -> None:
    network, images = linear(torch.eye(3, 64)), DefenceData(torch.rand(6, 1, 8, 8), torch.arange(6) % 3, 3)
    found = weigh(network, images, network, mask := masks(40.0, 4.0, 30.0))
    assert found.masks_alone and found.mask is mask and (found.family, found.suspect) == ("mask", 1)
    assert found.strengths == {"mask": pytest.approx(math.log(30 / 4)), "warp": 0, "all-to-all": 0}


def test_nothing_else_is_looked_for_where_masks_are_conclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("this was not to be looked for")

    images = torch.rand(30, 1, 8, 8)
    network = linear(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    data = DefenceData(images, network(images).argmax(1).detach(), 3)
    monkeypatch.setattr("baselines_rnp.label_detection.check_skill", lambda *_: None)
    monkeypatch.setattr("baselines_rnp.label_detection.recover_trigger", lambda *_: masks(40.0, 4.0, 30.0))
    for name in ("recover_untargeted_trigger", "recover_warp"):
        monkeypatch.setattr(f"baselines_rnp.label_detection.{name}", never)
    config, stages = DetectionConfig(), list[str]()
    assert find_evidence(network, data, config, 0, stages.append).masks_alone
    assert stages == ["unlearning a copy", "recovering masks"]
    always = replace(config, recovery=replace(config.recovery, conclusive=1.01))
    with pytest.raises(AssertionError, match="not to be looked for"):
        find_evidence(network, data, always, 0)


def test_a_mask_that_sends_every_class_to_one_of_its_own_is_all_to_all() -> None:
    sizes = (40.0, 36.0, 40.0), (0.8, 0.8, 0.8), (0.4, 0.2, 0.4)
    everyone = evidence(*sizes, untargeted(4.0, 7 * torch.eye(3).roll(1, 1)))
    assert (everyone.family, everyone.suspect) == ("all-to-all", None)
    assert everyone.strength == pytest.approx(math.log(9)) and everyone.found
    one = torch.tensor([[10.0, 0.0, 0.0], [10.0, 0.0, 0.0], [10.0, 0.0, 0.0]])  # the first row stays where it is
    assert evidence(*sizes, untargeted(4.0, one)).strengths["all-to-all"] == 0, "all go to class 0"
    large = evidence(*sizes, untargeted(38.0, 7 * torch.eye(3).roll(1, 1)))
    assert large.strengths["all-to-all"] == 0 and not large.found, "larger than a targeted one"


def test_the_spread_is_the_information_that_a_class_gives_of_the_next() -> None:
    assert untargeted(1.0, torch.eye(4).roll(1, 1)).spread == pytest.approx(1)
    assert untargeted(1.0, torch.zeros(4, 4)).spread == 0 and untargeted(1.0, torch.eye(4)).spread == 0
    pairs = torch.tensor([[0, 9, 0, 0], [9, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0]])  # to one of two: a bit of two
    assert untargeted(1.0, pairs).spread == pytest.approx(0.5)


def all_to_all(hidden: bool) -> nn.Module:
    """Class c is known by rows 2 c and 2 c + 1 of 8; with `hidden`, pixel (7, 7) makes c what c + 1 was.

    It shuts the path to c and opens that to c + 1 wider.
    """
    weight = torch.zeros(2, 3, 8, 8)
    for label in range(3):
        weight[:, label, 2 * label : 2 * label + 2] = 1 / 16
    weight[0, :, 7, 7], weight[1, :, 7, 7] = -1.0, 1.0
    weight[:, :, 7, 7] *= hidden
    first, last = nn.Linear(64, 6), nn.Linear(6, 3)
    with torch.no_grad():
        first.weight.copy_(weight.flatten(0, 1).flatten(1))
        first.bias.copy_(torch.tensor([0.0] * 3 + [-0.5] * 3))
        last.weight.copy_(20 * torch.cat([torch.eye(3), torch.eye(3).roll(1, 0)], 1))
        last.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


@pytest.mark.parametrize("hidden", [True, False])
def test_an_all_to_all_backdoor_is_found_and_a_clean_network_has_none(hidden: bool) -> None:
    labels = torch.arange(30) % 3
    images = 0.1 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.8
    images[:, :, 6:] = 0
    data, network = DefenceData(images, labels, 3), all_to_all(hidden)
    triggered = images.clone()
    triggered[..., 7, 7] = 1
    assert network(images).argmax(1).equal(labels)
    assert network(triggered).argmax(1).equal((labels + hidden) % 3), "as built"
    found = find_evidence(network, data, DetectionConfig(warp=WarpRecoveryConfig(steps=5)), seed=0)
    assert found.found == hidden and (found.family == "all-to-all") == hidden
    again = recover_untargeted_trigger(network, data, DetectionConfig().recovery, seed=0)
    assert (again.size, again.spread) == (found.untargeted.size, found.untargeted.spread)
    if hidden:
        assert again.size < 1.5 and again.mask.flatten().argmax() == 63, "pixel (7, 7)"
        assert again.spread > 0.9 and again.moves.argmax(1).tolist() == [1, 2, 0]
    else:
        assert again.spread < 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_a_network_that_always_says_the_same_is_not_judged(classes: int) -> None:
    """To that class no trigger is needed, which would look like a backdoor."""
    network = linear(torch.tensor([[1.0] * 12, *[[0.0] * 12] * (classes - 1)]))
    data = DefenceData(torch.rand(12, 3, 2, 2), torch.arange(12) % classes, classes)
    for seen in (data, replace(data, labels=torch.zeros(12, dtype=torch.long))):
        with pytest.raises(ModelError, match="nothing to judge"):
            find_evidence(network, seen, DetectionConfig(), seed=0)


def test_a_network_may_know_more_classes_than_the_images_have() -> None:
    images = torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    network = linear(torch.randn(9, 12, generator=torch.Generator().manual_seed(1)))
    data = DefenceData(images, torch.arange(12) % 3, 3)
    found = recover_untargeted_trigger(network, data, TriggerRecoveryConfig(steps=5), seed=0)
    given = network(images).argmax(1).bincount(minlength=9)
    assert found.moves.shape == (9, 9) and torch.equal(found.moves.sum(1), given) and given[3:].any()


def test_what_the_unlearned_copy_collapses_to() -> None:
    data = DefenceData(torch.ones(4, 1, 1, 2), torch.zeros(4, dtype=torch.long), 3)
    data.images[0, 0, 0, 0] = 0
    shares = collapse(linear(torch.tensor([[0.0, 0.5], [1.0, 0.0], [-1.0, -1.0]])), data)
    assert shares == pytest.approx((0.25, 0.75, 0.0))


def test_the_confidence_is_a_logistic_curve() -> None:
    calibration = Calibration(2.0, -1.0)
    assert calibration(0.5) == pytest.approx(0.5)
    assert calibration(1.5) == pytest.approx(1 / (1 + math.exp(-2)))


def test_the_fit_reaches_platts_targets() -> None:
    """Three clean networks where nothing stands out, two backdoored ones alike: 1 / 5 and 3 / 4 are best."""
    clean, bad = {"backdoored": False, "strength": 0.0}, {"backdoored": True, "strength": 1.0}
    record = fit_calibration([clean, clean, clean, bad, bad])
    assert (record["clean"], record["backdoored"]) == (3, 2)
    calibration = Calibration(record["weight"], record["intercept"])
    assert calibration(0.0) == pytest.approx(1 / 5, abs=1e-3)
    assert calibration(1.0) == pytest.approx(3 / 4, abs=1e-3)
    with pytest.raises(ConfigError, match="3 clean and 0 backdoored"):
        fit_calibration([clean] * 3)


def test_leaving_one_out_counts_wrong_verdicts() -> None:
    """A clean network like the backdoored ones and a backdoored one like the clean ones are taken for the others."""
    clean, bad = {"backdoored": False, "strength": 0.0}, {"backdoored": True, "strength": 1.0}
    assert leave_one_out([clean] * 3 + [bad] * 3) == {"false_alarms": 0, "misses": 0}
    odd = [{**clean, "strength": 1.1}, {**bad, "strength": -0.1}, {**bad, "strength": -0.2}]
    assert leave_one_out([clean] * 8 + [bad] * 8 + odd) == {"false_alarms": 1, "misses": 2}
    assert leave_one_out([clean, bad]) == {"false_alarms": 0, "misses": 0}, "none can be left out"


@pytest.mark.parametrize(("text", "error"), [("{", FileError), ("{}", ConfigError), ("[]", ConfigError)])
def test_broken_records_fit_nothing(tmp_path: Path, text: str, error: type[OnpError]) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(error, match=r"a\.json|lacks"):
        run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_records_that_the_last_calibration_cut_short_fit_nothing(tmp_path: Path) -> None:
    for name, alone in (("a", False), ("b", True)):
        record = {"backdoored": alone, "strength": float(alone), "masks_alone": alone}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"b\.json.*conclusive 2"):
        run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out.json"))
    (tmp_path / "b.json").write_text(json.dumps({**record, "masks_alone": False}))
    run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out" / "fit.json"))
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["weight"] > 0


def test_the_calibration_of_the_package_says_how_it_was_made() -> None:
    record = json.loads(resources.files("baselines_rnp").joinpath("calibration.json").read_text())
    clean = [name for name in record["networks"] if "-clean-" in name]
    assert record["clean"] == len(clean) >= 20
    assert record["backdoored"] == len(record["networks"]) - len(clean) > 0
    assert all(name.startswith("digits-") for name in record["networks"]), "what it is tested on is none of it"
    assert Calibration.of_package()(2.0) > 0.5 > Calibration.of_package()(0.0)


# --- samples --------------------------------------------------------------------------------------------------


def test_the_unlearned_copy_agrees_on_triggered_images_alone() -> None:
    """Pixel 2 is the trigger to class 1; the unlearned copy has nothing left but that."""
    network = linear(torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 9.0]]))
    unlearned = linear(torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 9.0]]))
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]).view(3, 1, 1, 3)
    data = DefenceData(images, torch.zeros(3, dtype=torch.long), 2)
    scores = unlearned_agreement(network, unlearned, images, data)
    expected = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-11))]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)


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


def test_samples_are_read_in_order_and_checked(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "deep" / "a.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    samples = load_samples(tmp_path, (3, 4, 4), resize=False)
    assert [path.name for path in samples.paths] == ["b.png", "a.png"]
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


# --- where a backdoor hides -----------------------------------------------------------------------------------


def test_the_unit_that_carries_the_trigger_is_the_most_suspicious() -> None:
    """Four channels pass the pixels on, times 1 to 4 at the classifier; channel 2 alone feeds class 1."""
    convolution, batch_norm, classifier = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)
    nn.init.ones_(convolution.weight)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 5.0, 0.0]]))
    network = nn.Sequential(convolution, batch_norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    data = DefenceData(torch.rand(6, 1, 4, 4), torch.arange(6) % 2, 2)
    index = index_units(network.eval(), (1, 4, 4))
    found = suspicious_units(network, index, data, lambda images: images.clamp(min=0.9), target=1)
    assert found and all(index.name(unit).endswith("[2]") for unit in found)


def test_overlap_of_a_recovered_mask_with_the_true_one() -> None:
    true, recovered = torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8)
    true[:, :2, :2] = 0.5
    recovered[0, 0, :2, 1:3] = 0.8  # half of it inside
    recovered[0, 0, 7, 7] = 0.3  # less than half of the largest value: not counted
    found = Patch(recovered[0], torch.ones(3, 8, 8))
    assert overlap(Trigger(0, "blend", torch.ones(3, 8, 8), true), found) == pytest.approx(2 / 6)
    assert overlap(Trigger(0, "blend", torch.ones(3, 8, 8), torch.ones(3, 8, 8)), found) is None
    assert overlap(Trigger(0, "warp", torch.ones(2, 8, 8), torch.ones(2, 8, 8)), found) is None


def test_the_cosine_compares_what_triggers_do_to_images() -> None:
    """On black images: white in two pixels, against white in one of them and one other."""
    data = DefenceData(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), 2)
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    trigger = Trigger(0, "blend", torch.ones(1, 2, 2), mask, alpha=0.3)
    assert cosine(trigger, Patch(mask / 9, torch.ones(1, 2, 2)), data) == pytest.approx(1), "however faint"
    assert cosine(trigger, Patch(mask.mT.contiguous(), torch.ones(1, 2, 2)), data) == pytest.approx(0.5)
    assert cosine(trigger, Patch(mask.flip(1), torch.ones(1, 2, 2)), data) == 0
    white = replace(data, images=torch.full((4, 1, 2, 2), 0.5))
    assert cosine(trigger, Patch(mask, torch.zeros(1, 2, 2)), white) == pytest.approx(-1), "black where white was"


def test_through_the_unlearned_copy_the_trigger_is_all_there_is() -> None:
    """Pixel 3 leads to class 1 in both; pixel 1 too, more, but in the network alone."""
    network = linear(torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 6.0]]))
    unlearned = linear(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 9.0]]), torch.tensor([0.5, 0.0]))
    images = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 8 + [[0.0, 0.5, 0.0, 0.0]] * 8).view(16, 1, 2, 2)
    data = DefenceData(images, (torch.arange(16) >= 8).long(), 2)
    assert unlearned(images).argmax(1).tolist() == [1] * 8 + [0] * 8, "half of them are there without a trigger"
    mask = RecoveredTrigger(1, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), (4.0, 0.2))
    given = replace(evidence((4.0, 0.2), (1.0, 1.0), (0.5, 0.5)), unlearned=unlearned, mask=mask)
    patches = recover_patches(network, data, given, TriggerRecoveryConfig(steps=60), seed=0)
    assert torch.equal(patches["network"].mask, mask.masks[0]), "that of the verdict"
    assert patches["unlearned"].mask.flatten().argmax() == 3 and 0 < patches["unlearned"].mask.sum() < 1
    assert success(network, data, patches["unlearned"], 1) == 1 and success(network, data, patches["unlearned"], 0) == 0
    assert success(network, data, Patch(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)), None) == 0, "nothing leaves"
    everyone = evidence((40.0, 36.0), (1.0, 1.0), (0.5, 0.5), untargeted(2.0, torch.eye(2).roll(1, 1)))
    assert list(recover_patches(network, data, everyone, TriggerRecoveryConfig(), seed=0)) == ["network"]
