"""What can be done to a network: single units, the best units of a layer at once, stopping."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from envs.actions import ActionSet, Bulk
from onp.config import EnvConfig
from onp.masks import KeepMask
from onp.units import UnitIndex, index_units

SIZES = (3, 8, 1, 40)
"""units 0-2, 3-10, 11 and 12-51"""
UNITS = 52
FRACTIONS = (1 / 4, 1 / 2)
BULKS = [(0, 2), (1, 2), (1, 4), (3, 10), (3, 20)]
"""layers and counts: a quarter and half of each layer, where that makes two units; actions 52 to 56"""
STOP = 57


def chain(*sizes: int) -> UnitIndex:
    """The units of linear layers of these sizes, one behind the other."""
    widths = (4, *sizes, 3)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return index_units(nn.Sequential(nn.Flatten(), *layers).eval(), (1, 2, 2))


@pytest.fixture
def index() -> UnitIndex:
    return chain(*SIZES)


@pytest.fixture
def actions(index: UnitIndex) -> ActionSet:
    return ActionSet(index, FRACTIONS, groups=False)


@pytest.fixture
def effects() -> Tensor:
    """Layer 1 (units 3 to 10) has 5, 1, -2, 7, 0, 3, -4, 2; layer 3 falls from 0 to -39; layer 0 has 1, 3, 2."""
    return torch.cat(
        [
            torch.tensor([1.0, 3.0, 2.0]),
            torch.tensor([5.0, 1.0, -2.0, 7.0, 0.0, 3.0, -4.0, 2.0]),
            torch.tensor([9.0]),
            -torch.arange(40.0),
        ]
    )


def whole(index: UnitIndex) -> KeepMask:
    return KeepMask.all_kept(index)


# --- which there are ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "fractions", "expected"),
    [
        (SIZES, FRACTIONS, BULKS),  # of 3, a quarter is 1 (0.75) and a half 2 (1.5); a layer of 1 has none
        (SIZES, (1 / 2, 1 / 4, 1 / 4), BULKS),  # in whatever order, and once each
        (SIZES, (), []),
        (SIZES, (0.0, 1.0, 2.0, -1.0), []),  # nothing, everything and more
        ((5,), (0.4, 0.45, 0.5, 0.55), [(0, 2), (0, 3)]),  # 2, 2.25, 2.5 (to even) and 2.75
        ((2, 3), (0.99,), []),
        ((15, 24, 256), (1 / 64, 1 / 16), [(1, 2), (2, 4), (2, 16)]),  # 15 / 16 is 1 unit, 24 / 16 are 2
    ],
)
def test_bulk_actions_are_the_parts_of_a_layer_that_make_two_units_or_more(
    sizes: tuple[int, ...], fractions: tuple[float, ...], expected: list[tuple[int, int]]
) -> None:
    actions = ActionSet(chain(*sizes), fractions, groups=False)
    assert actions.bulks == tuple(Bulk(layer, count) for layer, count in expected)
    assert len(actions) == sum(sizes) + len(expected) + 1
    assert actions.stop == sum(sizes) + len(expected)


# --- validity -------------------------------------------------------------------------------------------


def test_an_action_is_valid_while_there_are_units_enough(index: UnitIndex, actions: ActionSet) -> None:
    assert actions.valid(whole(index)).tolist() == [True] * 58
    assert actions.valid(whole(index)).dtype == torch.bool
    mask = whole(index).without([0, 3, 4, 5, 6, 20])  # left: 2 of layer 0, 4 of layer 1, 39 of layer 3
    assert actions.valid(mask).tolist() == [True] * 58  # what is pruned can be restored
    mask = mask.without([1, 7])  # left: 1 of layer 0, 3 of layer 1
    assert (~actions.valid(mask)).nonzero().flatten().tolist() == [52, 54]
    nothing = whole(index).without(range(UNITS))
    assert (~actions.valid(nothing)).nonzero().flatten().tolist() == [52, 53, 54, 55, 56]


# --- estimates ------------------------------------------------------------------------------------------


def test_the_estimate_of_a_bulk_is_the_sum_of_its_best_units(
    index: UnitIndex, actions: ActionSet, effects: Tensor
) -> None:
    totals = actions.totals(whole(index), effects)
    assert totals.shape == (57,) and torch.equal(totals[:UNITS], effects)
    # 3 + 2; 7 + 5; 7 + 5 + 3 + 2; 0 to -9; 0 to -19
    assert totals[UNITS:].tolist() == [5.0, 12.0, 17.0, -45.0, -190.0]


def test_pruned_units_are_no_part_of_an_estimate(index: UnitIndex, actions: ActionSet, effects: Tensor) -> None:
    mask = whole(index).without([1, 3, 6, 7, 12, 13])
    effects[~mask.keep] = 0  # as the environment has it, which is better than much of what is kept
    totals = actions.totals(mask, effects)
    # 2 + 1; 3 + 2; 3 + 2 + 1 - 2; -2 to -11; -2 to -21
    assert totals[UNITS:].tolist() == [3.0, 5.0, 4.0, -65.0, -230.0]
    few = mask.without([0, *range(12, 47)])  # 1 unit of layer 0 is left, 5 of layer 3: -35 to -39
    assert actions.totals(few, effects)[[52, 55, 56]].tolist() == [2.0, -185.0, -185.0]  # sums of what is left
    assert actions.totals(whole(index).without(range(UNITS)), effects)[UNITS:].tolist() == [0.0] * 5


# --- units ----------------------------------------------------------------------------------------------


def test_units_of_an_action_come_best_first(index: UnitIndex, actions: ActionSet, effects: Tensor) -> None:
    found = [actions.units(action, whole(index), effects) for action in (0, 11, 51, 52, 53, 54, 55, STOP)]
    assert found == [[0], [11], [51], [1, 2], [6, 3], [6, 3, 8, 10], list(range(12, 22)), []]


def test_a_bulk_skips_units_that_are_pruned_already(index: UnitIndex, actions: ActionSet, effects: Tensor) -> None:
    mask = whole(index).without([3, 6, 1, *range(12, 20)])
    effects[~mask.keep] = 0
    assert actions.units(52, mask, effects) == [2, 0]
    assert actions.units(53, mask, effects) == [8, 10]
    assert actions.units(54, mask, effects) == [8, 10, 4, 7]  # 3, 2, 1 and 0; 0 of the pruned ones is not meant
    assert actions.units(55, mask, effects) == list(range(20, 30))
    after = mask.without(actions.units(54, mask, effects))
    assert after.units_pruned == mask.units_pruned + 4 and after.order[-4:] == (8, 10, 4, 7)


def test_equal_estimates_are_pruned_by_number(index: UnitIndex, actions: ActionSet) -> None:
    assert actions.units(54, whole(index), torch.zeros(UNITS)) == [3, 4, 5, 6]


@pytest.mark.parametrize("scale", [1e-30, 1e30, -1.0])
def test_units_agree_with_the_estimate(index: UnitIndex, actions: ActionSet, effects: Tensor, scale: float) -> None:
    mask, effects = whole(index).without([4, 30]), effects * scale
    totals = actions.totals(mask, effects)
    for action in range(UNITS, STOP):
        chosen = actions.units(action, mask, effects)
        assert len(set(chosen)) == actions.bulks[action - UNITS].count
        assert bool(mask.keep[chosen].all())
        assert float(totals[action]) == pytest.approx(float(effects[chosen].double().sum()), rel=1e-5)


def test_a_single_unit_is_pruned_or_restored(index: UnitIndex, actions: ActionSet, effects: Tensor) -> None:
    mask = actions.after(53, actions.after(5, whole(index), effects), effects)
    assert mask.order == (5, 6, 3) and mask == whole(index).without([3, 5, 6])
    back = actions.after(6, mask, effects)
    assert back == whole(index).without([3, 5]) and back.order == (5, 3)
    assert actions.after(6, back, effects) == mask and actions.after(STOP, mask, effects) == mask
    assert [actions.undoing(action) for action in (6, 51, 52, STOP)] == [[6], [51], [], []]


# --- groups ---------------------------------------------------------------------------------------------


def tied(index: UnitIndex, *groups: tuple[int, ...]) -> UnitIndex:
    numbers = torch.arange(len(index))
    for group in groups:
        numbers[list(group)] = group[0]
    return replace(index, groups=numbers)


def test_groups_go_together(index: UnitIndex, effects: Tensor) -> None:
    index = tied(index, (0, 6), (3, 11, 40), (2, 8))
    apart, together = (ActionSet(index, FRACTIONS, groups) for groups in (False, True))
    assert together.bulks == apart.bulks
    for action, alone, all_of_them in (
        (0, [0], [0, 6]),
        (40, [40], [3, 11, 40]),
        (1, [1], [1]),
        (52, [1, 2], [0, 6, 2, 8]),  # groups are worth the sum over their units: 0 and 2 are worth 8 and 5
        (53, [6, 3], [0, 6, 2, 8]),  # 6 and 8 the same, 3 is worth -14
    ):
        assert apart.units(action, whole(index), effects) == alone
        assert together.units(action, whole(index), effects) == all_of_them
    assert together.units(STOP, whole(index), effects) == []
    totals = together.totals(whole(index), effects)
    assert totals[[0, 6, 40, 1, 52, 53]].tolist() == [8, 8, -14, 3, 13, 13]
    pruned = together.after(6, whole(index).without([0, 20]), effects)
    assert pruned == whole(index).without([0, 6, 20])
    half = together.totals(whole(index).without([0, 3]), effects)  # as a mask may be that an episode begins at
    assert half[[0, 6, 3, 11, 40]].tolist() == [1, 7, 5, -19, -19]
    assert together.after(0, pruned, effects) == whole(index).without([20])
    assert together.undoing(40) == [3, 11, 40] and apart.undoing(40) == [40]


def test_a_group_with_several_units_in_one_bulk_is_pruned_once(index: UnitIndex, effects: Tensor) -> None:
    """A concatenation behind a sum ties units of one layer."""
    index = tied(index, (3, 6, 11))
    actions = ActionSet(index, FRACTIONS, groups=True)
    mask = whole(index).without(actions.units(53, whole(index), effects))
    assert actions.totals(whole(index), effects)[53] == 21
    assert mask.pruned == {3, 6, 11} and mask.units_pruned == 3
    assert sorted(mask.order) == [3, 6, 11]  # the path has three steps
    assert [step.units_pruned for step in mask.path()] == [0, 1, 2, 3]


# --- settings -------------------------------------------------------------------------------------------


def test_actions_of_a_network_with_convolutions() -> None:
    """Layers as the index has them: 32 channels, the same, and 128 positions behind the flatten."""
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 3),
    ).eval()  # fmt: skip
    index = index_units(net, (1, 8, 8))
    assert [layer.size for layer in index] == [32, 32, 128]
    settings = EnvConfig()
    actions = ActionSet(index, settings.bulk_fractions, settings.prune_groups)
    assert [(bulk.layer, bulk.count) for bulk in actions.bulks] == [(0, 2), (1, 2), (2, 2), (2, 8)]
    effects = torch.linspace(1, 0, 192)
    assert [actions.units(192 + number, whole(index), effects) for number in range(4)] == [
        [0, 1], [32, 33], [64, 65], list(range(64, 72)),
    ]  # fmt: skip
