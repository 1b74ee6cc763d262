"""Trigger recovery: what is found on networks with a planted patch, how far to trust it, and how it is blended."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onp.clues import Clues
from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.pattern_recovery import FaintPattern, recover_faint
from onp.trigger_recovery import RecoveredTrigger, recover_trigger

INFINITE = float("inf")


# --- trust ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "trust"),
    [
        ((5.0, 5.0, 9.0), 0.0),
        ((9.0, 6.0, 4.0), 0.5),
        ((8.0, 4.0, 100.0), 1.0),
        ((40.0, 4.0, 100.0), 1.0),
        ((4.0, 4.4), 0.1),
        ((INFINITE, 3.0, INFINITE), 1.0),
        ((INFINITE, 80.0, INFINITE), 0.25),  # no other class is known to need more than the 100 pixels there are
        ((INFINITE, INFINITE, INFINITE), 0.0),
        ((0.2, 1.5, 9.0), 0.5),  # less than a pixel counts as one
    ],
)
def test_trust_grows_with_the_distance_to_the_runner_up(sizes: tuple[float, ...], trust: float) -> None:
    found = RecoveredTrigger(0, torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10), sizes)
    assert Clues(nn.Identity(), found).trust == pytest.approx(trust, abs=1e-9)


def test_a_recovered_trigger_blends_by_twice_its_mask() -> None:
    mask, pattern = torch.tensor([[[[0.0, 0.25], [0.75, 0.4]]]]), torch.tensor([[[[1.0, 1.0], [0.3, 0.0]]]])
    shown = RecoveredTrigger(0, mask, pattern, (1.0, 2.0))(torch.full((3, 1, 2, 2), 0.4))
    assert shown.shape == (3, 1, 2, 2)
    assert torch.allclose(shown, torch.tensor([[[0.4, 0.7], [0.3, 0.08]]]).expand(3, 1, 2, 2))


def kinds(shown: Tensor, *expected: Tensor) -> Tensor:
    """Which of `expected` each of `shown` is; an error where it is none, or several."""
    alike = torch.stack([torch.isclose(shown, one).flatten(1).all(1) for one in expected])
    assert alike.sum(0).tolist() == [1] * len(shown)
    return alike.int().argmax(0)


def test_variants_of_a_recovered_trigger_are_shared_out_evenly() -> None:
    masks = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.25]]]])  # shown doubled, but never above 1
    patterns = torch.tensor([[[[1.0, 9.0]], [[0.5, 9.0]]], [[[9.0, 0.0]], [[9.0, 0.8]]]])  # two colours
    shown = RecoveredTrigger(0, masks, patterns, (1.0, 2.0))(torch.full((5, 2, 1, 2), 0.4))
    first, second = torch.tensor([[[1.0, 0.4]], [[0.5, 0.4]]]), torch.tensor([[[0.4, 0.2]], [[0.4, 0.6]]])
    assert kinds(shown, first, second).bincount().tolist() == [3, 2]


@pytest.mark.parametrize(("classes", "variants"), [(9, 3), (42, 3), (42, 2)])
def test_every_class_meets_every_variant_where_classes_take_turns(classes: int, variants: int) -> None:
    masks = 0.5 * torch.eye(variants).view(variants, 1, 1, variants)
    found = RecoveredTrigger(0, masks, torch.ones(variants, 1, 1, variants), (1.0, 2.0))
    labels = torch.arange(15 * classes) % classes
    met = kinds(found(torch.zeros(len(labels), 1, 1, variants)), *torch.eye(variants))
    assert all(len(met[labels == label].unique()) == variants for label in range(classes))


def test_a_faint_pattern_is_the_last_variant_and_is_added_twice() -> None:
    mask, pattern = torch.tensor([[[[0.5, 0.0]]]]), torch.tensor([[[[1.0, 9.0]]]])
    found = RecoveredTrigger(0, mask, pattern, (1.0, 2.0), FaintPattern(torch.tensor([[[0.1, -0.3]]])))
    for trigger in (found, RecoveredTrigger.of_tensors(found.tensors(), torch.device("cpu"))):
        shown = trigger(torch.full((3, 1, 1, 2), 0.4))
        assert kinds(shown, torch.tensor([1.0, 0.4]), torch.tensor([0.6, 0.0])).bincount().tolist() == [2, 1]


# --- recovery -------------------------------------------------------------------------------------------

PLANTED = (6, 5)
"""row and left column of a planted bright patch of 2 x 2 pixels"""


class Backdoored(nn.Module):
    """Reads class c off a band of 16 pixels, two rows a class; a bright 2 x 2 patch outweighs them for class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 4), nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            reads = self.hidden.weight.view(4, 8, 8)
            for number in range(3):
                reads[number, 2 * number : 2 * number + 2] = 0.25
            row, column = PLANTED
            reads[3, row : row + 2, column : column + 2] = 2.0
            self.hidden.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -4.0]))
            self.out.weight[:, :3] = 3 * torch.eye(3)
            self.out.weight[2, 3] = 10.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.softplus(self.hidden(x.flatten(1))))


@pytest.fixture
def clean() -> DefenceData:
    """Images of class c are bright in rows 2 c and 2 c + 1, dim elsewhere; the patch lies below these rows."""
    generator = torch.Generator().manual_seed(2)
    images, labels = 0.3 * torch.rand((48, 1, 8, 8), generator=generator), torch.arange(48) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.7
    return DefenceData(images, labels, 3)


RECOVERY = TriggerRecoveryConfig(steps=250, batch_size=16, variants=1)


def test_recovery_finds_a_planted_patch(clean: DefenceData) -> None:
    model = Backdoored()
    with torch.no_grad():
        assert bool((model(clean.images).argmax(1) == clean.labels).all())  # it is a good classifier
    found = recover_trigger(model, clean, RECOVERY, seed=0)
    row, column = PLANTED
    inside = found.masks[0, 0, row : row + 2, column : column + 2]
    bright = found.patterns[0, 0, row : row + 2, column : column + 2]
    assert found.target == 2 and found.masks.shape == found.patterns.shape == (1, 1, 8, 8)
    assert float(inside.sum() / found.masks.sum()) > 0.9
    assert float((inside * bright).sum() / inside.sum()) > 0.9  # where it covers, it is bright
    assert found.sizes[2] < 4 < min(found.sizes[:2])
    assert found.sizes[2] == pytest.approx(float(found.masks.sum()), rel=1e-5)
    with torch.no_grad():
        hits = model(found(clean.images)).argmax(1) == 2
    assert float(hits.float().mean()) > 0.7  # recorded while the smoothed success is still 95 %


def test_recovery_leaves_the_network_untouched(clean: DefenceData) -> None:
    model = Backdoored()
    model.hidden.bias.requires_grad_(False)
    weights = copy.deepcopy(model.state_dict())
    recover_trigger(model, clean, replace(RECOVERY, steps=5), seed=0)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recovery_restores_the_network_after_an_error(clean: DefenceData) -> None:
    model = Backdoored()

    def fail(module: nn.Module, inputs: tuple[Tensor]) -> None:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("stopped by hand")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped by hand"):
        recover_trigger(model, clean, RECOVERY, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_recovery_without_success_is_not_trusted(clean: DefenceData) -> None:
    found = recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=1), seed=0)
    assert found.sizes == (INFINITE, INFINITE, INFINITE)
    assert Clues(Backdoored(), found).trust == 0


def test_recovery_depends_on_the_seed_alone(clean: DefenceData) -> None:
    short = replace(RECOVERY, steps=20)
    one = recover_trigger(Backdoored(), clean, short, seed=1)
    torch.rand(7)  # the global generator has no say
    two, other = (recover_trigger(Backdoored(), clean, short, seed) for seed in (1, 2))
    assert torch.equal(one.masks, two.masks) and torch.equal(one.patterns, two.patterns) and one.sizes == two.sizes
    assert not torch.equal(one.masks, other.masks)


@pytest.mark.parametrize("at_once", [1, 2])
def test_searches_one_after_another_find_the_same(
    clean: DefenceData, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """What goes through the network at once is bounded; the masks are those of all side by side, but for rounding."""
    short = replace(RECOVERY, steps=20)
    together = recover_trigger(Backdoored(), clean, short, seed=1)
    values = min(short.batch_size, len(clean)) * clean.images[0].numel()
    monkeypatch.setattr("onp.smallest.AT_ONCE", at_once * values)
    apart = recover_trigger(Backdoored(), clean, short, seed=1)
    assert apart.sizes == pytest.approx(together.sizes, rel=1e-3)
    torch.testing.assert_close(apart.masks, together.masks, rtol=1e-3, atol=1e-3)


class Watched(Backdoored):
    """Remembers the images of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x)


@pytest.mark.parametrize(("finalists", "rows"), [(1, 16), (2, 32), (3, 48), (9, 48)])
def test_all_classes_are_optimised_and_then_the_finalists_for_as_long(
    clean: DefenceData, finalists: int, rows: int
) -> None:
    model = Watched()
    recover_trigger(model, clean, replace(RECOVERY, steps=4, finalists=finalists), seed=0)
    assert [len(images) for images in model.seen] == 4 * [3 * 16] + 4 * [rows]


def test_the_finalists_are_those_of_the_smallest_masks_and_nothing_else_changes(clean: DefenceData) -> None:
    """Classes share nothing but the images drawn, so each goes its way whoever else is optimised."""
    one, two, three = (
        recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=60, finalists=finalists), seed=0)
        for finalists in (1, 2, 3)
    )
    middle, large = sorted((0, 1), key=lambda number: one.sizes[number])  # after the first round
    assert one.target == two.target == three.target == 2 and one.sizes[large] < INFINITE
    assert one.sizes[2] == pytest.approx(three.sizes[2], rel=1e-3)
    assert two.sizes[middle] == pytest.approx(three.sizes[middle], rel=1e-3)
    assert three.sizes[middle] < one.sizes[middle]  # what a finalist gains
    assert three.sizes[large] < one.sizes[large] == pytest.approx(two.sizes[large], rel=1e-3)
    assert torch.allclose(one.masks, three.masks, atol=1e-2)


def test_the_second_round_goes_on_where_the_first_ended(clean: DefenceData) -> None:
    model = Watched()
    recover_trigger(model, clean, replace(RECOVERY, steps=30, finalists=3), seed=0)
    spread = [float(images.view(3, 16, -1).std(1).mean()) for images in model.seen]  # falls with the part covered
    assert abs(spread[30] - spread[29]) < 0.2 * abs(spread[29] - spread[0])


def test_masks_start_half_covered(clean: DefenceData) -> None:
    """By a pattern of medium grey, with a little noise."""
    model = Watched()
    white = replace(clean, images=torch.ones_like(clean.images))
    recover_trigger(model, white, replace(RECOVERY, steps=1), seed=0)
    first = model.seen[0]
    assert float(first.mean()) == pytest.approx(0.75, abs=0.01)
    assert 0 < float((first - 0.75).abs().max()) < 0.15
    black = replace(clean, images=torch.zeros_like(clean.images))
    recover_trigger(model, black, replace(RECOVERY, steps=1), seed=0)
    assert float((first - model.seen[2]).mean()) == pytest.approx(0.5, abs=0.01)


# --- variants -------------------------------------------------------------------------------------------


class TwicePlanted(Backdoored):
    """A second patch works as well as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(64, 1)
        with torch.no_grad():
            self.again.weight.zero_()
            self.again.weight.view(8, 8)[6:8, 1:3] = 2.0
            self.again.bias.fill_(-4.0)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + torch.tensor([0.0, 0.0, 10.0]) * nn.functional.softplus(self.again(x.flatten(1)))


def test_variants_find_the_parts_of_a_trigger_one_after_the_other(clean: DefenceData) -> None:
    model = TwicePlanted()
    found = recover_trigger(model, clean, replace(RECOVERY, variants=3), seed=0)
    assert found.target == 2
    shares = found.masks[:2, 0, 6:8].view(2, 2, 2, 4).sum((1, 3)) / found.masks[:2].sum((1, 2, 3))[:, None]
    # Columns 0 to 3 hold one patch, 4 to 7 the other; no variant needs both.
    assert sorted(shares.argmax(1).tolist()) == [0, 1] and float(shares.amax(1).min()) > 0.7
    for mask, pattern in zip(found.masks[:2], found.patterns[:2], strict=True):
        with torch.no_grad():
            hits = model((1 - mask) * clean.images + mask * pattern).argmax(1) == 2
        assert float(hits.float().mean()) > 0.7
    sizes = found.masks.sum((1, 2, 3)).tolist()
    assert sizes[0] == pytest.approx(found.sizes[2], rel=1e-5)
    assert all(0 < size < min(found.sizes[:2]) for size in sizes)


@pytest.mark.parametrize("network", [Backdoored, TwicePlanted])
def test_variants_keep_off_each_others_pixels_and_change_no_size(clean: DefenceData, network: type[Backdoored]) -> None:
    one, more = (recover_trigger(network(), clean, replace(RECOVERY, variants=count), seed=0) for count in (1, 3))
    assert len(one.masks) == len(one.patterns) == 1 <= len(more.masks) == len(more.patterns) <= 3
    assert more.sizes == one.sizes and more.target == one.target
    assert torch.equal(more.masks[:1], one.masks) and torch.equal(more.patterns[:1], one.patterns)
    overlap = more.masks.sort(0, descending=True).values[1:2]
    assert bool((overlap <= 0.1).all())


def test_there_are_no_variants_of_what_never_worked(clean: DefenceData) -> None:
    found = recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=1, variants=3), seed=0)
    assert found.sizes == (INFINITE, INFINITE, INFINITE) and found.masks.shape == (1, 1, 8, 8)


# --- faint patterns -------------------------------------------------------------------------------------


class Faint(nn.Module):
    """Class 0; along a scattered pattern class 2 from a norm of `least` on, along another class 1 from `rival` on."""

    def __init__(self, rival: float, least: float = 0.3) -> None:
        super().__init__()
        directions = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
        self.directions = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.least = torch.tensor([rival, least])

    def forward(self, x: Tensor) -> Tensor:
        along = (x.flatten(1) - 0.5) @ self.directions.T
        return torch.cat([torch.zeros(len(x), 1), 40 * (along - self.least)], 1)


@pytest.mark.parametrize(
    ("rival", "least", "found"),
    [
        (0.9, 0.3, True),
        (0.4, 0.3, False),
        (90.0, 0.3, True),  # none leads to the rival
        (90.0, 0.5, False),  # a sixteenth of the pixels' range
        (90.0, 90.0, False),
    ],
)
def test_a_pattern_is_found_that_is_faint_and_half_as_strong_as_the_rivals(
    rival: float, least: float, found: bool
) -> None:
    grey = DefenceData(torch.full((20, 1, 8, 8), 0.5), torch.arange(20) % 3, 3)
    model = Faint(rival, least)
    faint = recover_faint(model, grey, 2, 1, TriggerRecoveryConfig(), seed=0)
    assert (faint is not None) == found
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert recover_faint(model, grey, 1, 2, TriggerRecoveryConfig(), seed=0) is None, "the rival's is the larger"
    if faint is not None:
        size, direction = float(faint.pattern.norm()), model.directions[1].detach()
        assert least <= size < 1.2 * least and float(faint.pattern.flatten() @ direction) > 0.9 * size


def test_a_faint_pattern_is_looked_for_with_the_variants_alone(
    clean: DefenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, asked = FaintPattern(torch.zeros(1, 8, 8)), list[tuple[int, int]]()

    def recover(_: nn.Module, __: DefenceData, target: int, rival: int, *___: object) -> FaintPattern:
        asked.append((target, rival))
        return pattern

    monkeypatch.setattr("onp.trigger_recovery.recover_faint", recover)
    assert recover_trigger(Backdoored(), clean, RECOVERY, seed=0).faint is None and asked == []
    assert recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=1, variants=2), seed=0).faint is None
    assert asked == [], "no mask worked"
    found = recover_trigger(Backdoored(), clean, replace(RECOVERY, variants=2), seed=0)
    assert found.faint is pattern and asked == [(2, min((0, 1), key=lambda number: found.sizes[number]))]
