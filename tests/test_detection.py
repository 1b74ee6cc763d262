"""The parts of detection, on networks and sizes worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toy_networks import linear

from baselines_rnp.calibration import Calibration, conclusive
from baselines_rnp.label_detection import Evidence, collapse, find_evidence, weigh
from baselines_rnp.patch_recovery import recover_patches, success
from onp.attacks.triggers import Trigger
from onp.bench.patches import cosine, overlap
from onp.clues import Clues
from onp.config import DetectionConfig, TriggerRecoveryConfig, WarpRecoveryConfig, WaveRecoveryConfig
from onp.data import DefenceData
from onp.errors import ModelError
from onp.smallest import lead
from onp.suspicious_units import suspicious_units
from onp.trigger_recovery import MaskSearch, Patch, RecoveredTrigger
from onp.units import index_units
from onp.untargeted_recovery import UntargetedTrigger, recover_untargeted_trigger
from onp.warp_recovery import RecoveredWarp, recover_warp, warp
from onp.wave_recovery import RecoveredWave

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


class Answers(nn.Module):
    """The same logits whatever the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


def test_no_warp_that_works_agrees_with_nothing() -> None:
    data = DefenceData(torch.rand(4, 1, 8, 8), torch.ones(4, dtype=torch.long), 2)
    always = Answers(torch.tensor([[9.0, 0.0]]).expand(4, 2))
    none = recover_warp(Stubborn(), always, data, WarpRecoveryConfig(steps=2), seed=0)
    assert none.sizes == (math.inf, math.inf) and none.agreement == 0


class Stubborn(nn.Module):
    """A third class, whatever the images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1)[:, :2] * 1e-3, torch.full((len(x), 1), 9.0)], 1)


def test_the_class_behind_the_smallest_warp_is_found() -> None:
    """Bars stand in column 8; class 1 is a bar two to five columns further, class 0 one six or more columns further."""
    weight = torch.zeros(3, 1, 32, 32)
    for label, columns in enumerate((slice(14, 24), slice(10, 14), slice(8, 9))):
        weight[label, :, :, columns] = 1
    images = 0.05 * torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, :, 8] = 1
    network = linear(weight.flatten(1))
    assert network(images).argmax(1).tolist() == [2] * 16, "that of the bars as they are, which is not searched"
    data = DefenceData(images, (torch.arange(16) < 4).long(), 2)  # 4 images are of class 1 already
    recovered = recover_warp(network, network, data, WarpRecoveryConfig(), seed=0)
    assert recovered.target == 1 and recovered.sizes[1] < recovered.sizes[0]
    for strength in (1, 2):
        warped = warp(images, (strength * recovered.flow).expand(16, *recovered.flow.shape))
        success = network(warped).argmax(1) == 1
        assert success.float().mean() >= 0.6, "it works on 80 % of a batch"
    assert torch.equal(recovered(images), warped), "shown twice as far, as a mask is shown twice as dense"
    assert recovered.agreement == pytest.approx(float(success[4:].float().mean())), (
        "this copy says what the network says"
    )
    again = RecoveredWarp.of_tensors(recovered.tensors(), torch.device("cpu"))
    assert (again.target, again.sizes, again.agreement) == (1, recovered.sizes, recovered.agreement)
    partial = RecoveredWarp.of_tensors(replace(recovered, agreement=0.7).tensors(), torch.device("cpu"))
    assert partial.agreement == 0.7
    some = (torch.arange(16) % 2).float().view(16, 1) * torch.tensor([[0.0, 9.0, 0.0]])
    odd = recover_warp(network, Answers(some), data, WarpRecoveryConfig(), seed=0)
    assert odd.agreement == 0.5, "of the 12 images of class 0 the copy sends 6 to class 1, of all 16 it sends 8"
    of_the_target = replace(data, labels=torch.ones(16, dtype=torch.long))
    assert recover_warp(network, network, of_the_target, WarpRecoveryConfig(), seed=0).agreement == 0
    deaf = recover_warp(network, linear(torch.zeros(3, 1024)), data, WarpRecoveryConfig(), seed=0)
    assert deaf.target == 1 and deaf.agreement == 0, "a copy that always says class 0"
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
    agreement: float = 1.0,
    waves: tuple[float, ...] = (9.0, 9.0, 9.0),
) -> Evidence:
    mask = RecoveredTrigger(masks.index(min(masks)), torch.ones(1, 1, 8, 8), torch.ones(1, 3, 8, 8), masks)
    warp = RecoveredWarp(warps.index(min(warps)), torch.zeros(2, 8, 8), warps, agreement)
    everyone = everyone or untargeted(math.inf, torch.zeros(3, 3))
    wave = RecoveredWave(waves.index(min(waves)), torch.zeros(3, 8, 8), waves)
    return Evidence(nn.Identity(), mask, everyone, warp, wave, collapse=shares, clean_accuracy=1.0)


def test_a_lead_is_how_many_times_the_size_the_rival_is() -> None:
    assert lead(2.0, 6.0, 1, 64) == 3
    assert lead(2.0, math.inf, 1, 4) == 2, "bounded by the most"
    assert lead(9.0, math.inf, 1, 4) == 1 and lead(math.inf, math.inf, 1, 4) == 1
    assert lead(1e-8, 3.0, 1, 4) == 3, "bounded by the least"
    assert lead(6.0, 2.0, 1, 64) == 1, "what is larger does not stand out"


def test_the_kind_that_speaks_louder_names_the_suspect() -> None:
    by_mask = evidence((40.0, 4.0, 40.0), (0.5, 0.4, 0.3), (0.4, 0.2, 0.4))
    assert (by_mask.family, by_mask.trigger.target) == ("mask", 1)
    assert by_mask.strength == pytest.approx(math.log(10)), "whatever the unlearned copy says"
    by_warp = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.2), (0.1, 0.5, 0.4), agreement=0.8)
    assert (by_warp.family, by_warp.trigger.target) == ("warp", 2)
    assert by_warp.strength == pytest.approx(0.8 * math.log(4))
    alone = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.2), (0.98, 0.01, 0.01), agreement=0.01)
    assert alone.family == "mask" and alone.strength == pytest.approx(math.log(40 / 36)), "no copy goes there"
    far = evidence((40.0, 36.0, 40.0), (2.0, 9.0, 1.5), (0.1, 0.1, 0.8))
    assert far.outliers["warp"] == 0, "more than an eighth of the height is no hidden warp"
    by_wave = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.2), (0.1, 0.5, 0.4), agreement=0.1, waves=(2.0, 1.0, math.inf))
    assert (by_wave.family, by_wave.suspect, by_wave.strength) == ("wave", 1, pytest.approx(math.log(2)))
    strong = evidence((40.0, 36.0, 40.0), (0.8, 0.8, 0.8), (0.1, 0.5, 0.4), waves=(9.0, 3.0, 9.0))
    assert strong.outliers["wave"] == 0, "a fifth of the range is 2.8 in 192 numbers: more is no hidden wave"


def masks(*sizes: float) -> RecoveredTrigger:
    """Masks of so many pixels of 64, the smallest with a picture."""
    picture = torch.zeros(1, 1, 8, 8)
    return RecoveredTrigger(sizes.index(min(sizes)), picture, picture, sizes)


def test_masks_alone_are_conclusive_from_a_confidence_on() -> None:
    assert conclusive(masks(40.0, 4.0, 30.0), 0.95) and not conclusive(masks(40.0, 4.0, 30.0), 1.01)
    assert not conclusive(masks(40.0, 20.0, 30.0), 0.95)
    for rival in range(5, 64):
        mask = masks(4.0, float(rival), 64.0)
        assert Clues(nn.Identity(), mask).trust == 1 or not conclusive(mask, 0.95), (
            "no trigger without a target could lead the reward"
        )


def test_what_was_not_looked_for_says_nothing() -> None:
    network, images = linear(torch.eye(3, 64)), DefenceData(torch.rand(6, 1, 8, 8), torch.arange(6) % 3, 3)
    found = weigh(network, images, Clues(network, mask := masks(40.0, 4.0, 30.0)))
    assert found.masks_alone and found.mask is mask and (found.family, found.suspect) == ("mask", 1)
    assert found.strengths == {"mask": pytest.approx(math.log(30 / 4))} and found.triggers == {"mask": mask}


def test_nothing_else_is_looked_for_where_masks_are_conclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("this was not to be looked for")

    images = torch.rand(30, 1, 8, 8)
    network = linear(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    data = DefenceData(images, network(images).argmax(1).detach(), 3)
    monkeypatch.setattr("baselines_rnp.label_detection.check_skill", lambda *_: None)
    monkeypatch.setattr("onp.clues.recover_trigger", lambda *_: masks(40.0, 4.0, 30.0))
    for name in ("recover_untargeted_trigger", "recover_warp", "recover_wave"):
        monkeypatch.setattr(f"onp.clues.{name}", never)
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


def all_to_all(step: int) -> nn.Module:
    """Class c is known by rows 2 c and 2 c + 1 of 8; pixel (7, 7) makes c what c + `step` was, where that is not 0.

    It shuts the path to c and opens that to c + `step` wider.
    """
    weight = torch.zeros(2, 3, 8, 8)
    for label in range(3):
        weight[:, label, 2 * label : 2 * label + 2] = 1 / 16
    weight[0, :, 7, 7], weight[1, :, 7, 7] = -1.0, 1.0
    weight[:, :, 7, 7] *= step != 0
    first, last = nn.Linear(64, 6), nn.Linear(6, 3)
    with torch.no_grad():
        first.weight.copy_(weight.flatten(0, 1).flatten(1))
        first.bias.copy_(torch.tensor([0.0] * 3 + [-0.5] * 3))
        last.weight.copy_(20 * torch.cat([torch.eye(3), torch.eye(3).roll(step, 0)], 1))
        last.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


def rows() -> DefenceData:
    """Images of the classes of `all_to_all`."""
    labels = torch.arange(30) % 3
    images = 0.1 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.8
    images[:, :, 6:] = 0
    return DefenceData(images, labels, 3)


@pytest.mark.parametrize("step", [0, 1])
def test_an_all_to_all_backdoor_is_found_and_a_clean_network_has_none(step: int) -> None:
    data, network = rows(), all_to_all(step)
    triggered = data.images.clone()
    triggered[..., 7, 7] = 1
    assert network(data.images).argmax(1).equal(data.labels)
    assert network(triggered).argmax(1).equal((data.labels + step) % 3), "as built"
    config = DetectionConfig(
        recovery=TriggerRecoveryConfig(variants=1, starts=2),
        warp=WarpRecoveryConfig(steps=5),
        wave=WaveRecoveryConfig(steps=5),
    )
    network.train()
    found = find_evidence(network, data, config, seed=0)
    assert network.training, "left as it was"
    hidden = step != 0
    assert found.found == hidden and (found.family == "all-to-all") == hidden
    if hidden:
        assert found.untargeted.size < 1.5 and found.untargeted.mask.flatten().argmax() == 63, "pixel (7, 7)"
        assert found.untargeted.spread > 0.9 and found.untargeted.moves.argmax(1).tolist() == [1, 2, 0]
    else:
        assert found.untargeted.spread < 0.5


def test_random_starts_find_classes_that_go_elsewhere_than_to_the_next() -> None:
    found = recover_untargeted_trigger(all_to_all(2), rows(), TriggerRecoveryConfig(starts=2), seed=0)
    assert found.size < 1.5 and found.moves.argmax(1).tolist() == [2, 0, 1]


def test_every_class_to_the_next_is_found_where_no_random_start_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many classes, they end at masks of one class; here they are not begun."""
    optimise = MaskSearch.optimise
    monkeypatch.setattr(MaskSearch, "optimise", lambda self, *args: len(self.sizes) > 1 or optimise(self, *args))
    found = {step: recover_untargeted_trigger(all_to_all(step), rows(), TriggerRecoveryConfig(), 0) for step in (1, 2)}
    assert found[1].size < 1.5 and found[1].moves.argmax(1).tolist() == [1, 2, 0]
    assert found[2].size > 5, "there it leads elsewhere"


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


def test_patches_go_by_images_of_which_no_class_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    unlearned = linear(torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]))  # it sends them all to class 0
    images = torch.tensor([[0.0, 0.5, 0.0, 0.0]] * 16).view(16, 1, 2, 2)
    data = DefenceData(images, (torch.arange(16) >= 4).long(), 2)
    mask = RecoveredTrigger(1, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), (4.0, 0.2))
    given = replace(evidence((4.0, 0.2), (1.0, 1.0), (0.5, 0.5)), unlearned=unlearned, mask=mask)
    seen: list[list[int]] = []

    def recover(model: nn.Module, data: DefenceData, *_: object) -> Patch:
        seen.append(data.labels.bincount().tolist())
        return mask.patch

    monkeypatch.setattr("baselines_rnp.patch_recovery.recover_patch", recover)
    recover_patches(unlearned, data, given, TriggerRecoveryConfig(), seed=0)
    assert seen == [[4, 4]]
