"""Reward terms, sensitivities and trigger recovery against computations by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.rewards import (
    PLACES,
    TERMS,
    Clues,
    Objective,
    Outputs,
    clean_accuracy,
    clean_fidelity,
    trigger_resistance,
    unlearning,
)
from onp.config import RewardConfig, TriggerRecoveryConfig
from onp.data import DefenceData, Normalisation
from onp.engine import Engine
from onp.masks import KeepMask, apply_mask
from onp.trigger_recovery import RecoveredTrigger, recover_trigger
from onp.units import UnitIndex, UnitLayer, index_units

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads, and badly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(*probabilities: list[float]) -> Tensor:
    """Logits of the given rows of probabilities, shifted by what softmax has to ignore."""
    return torch.tensor(probabilities).log() + 3


def outputs(**changes: Any) -> Outputs:
    sure = logits([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    return replace(Outputs(torch.tensor([0, 1]), sure, sure, sure, sure, target=2, trust=0.5), **changes)


# --- terms ----------------------------------------------------------------------------------------------


def test_clean_accuracy() -> None:
    right_wrong = logits([0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    assert float(clean_accuracy(outputs(pruned=right_wrong))) == 0.5
    assert float(clean_accuracy(outputs())) == 1.0


def test_clean_fidelity_is_minus_the_divergence_from_the_original() -> None:
    pruned = logits([0.25, 0.5, 0.25], [0.25, 0.25, 0.5])
    # KL(original || pruned): row 0: .5 ln 2 - .25 ln 2; row 1: .5 ln 2 - .25 ln 2
    assert float(clean_fidelity(outputs(pruned=pruned))) == pytest.approx(-0.25 * math.log(2), abs=1e-6)
    assert float(clean_fidelity(outputs())) == pytest.approx(0, abs=1e-6)
    lopsided = logits([0.8, 0.1, 0.1], [0.25, 0.5, 0.25])  # not symmetric: which is the reference matters
    expected = -(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(2.5)) / 2
    assert float(clean_fidelity(outputs(pruned=lopsided))) == pytest.approx(expected, abs=1e-6)


def test_unlearning_is_minus_log_cross_entropy_with_a_floor() -> None:
    collapsed = logits([0.01, 0.01, 0.98], [0.02, 0.02, 0.96])
    loss = -(math.log(0.01) + math.log(0.02)) / 2
    assert float(unlearning(outputs(unlearned=collapsed))) == pytest.approx(-math.log(loss), abs=1e-5)
    floored = -math.log(0.5 * math.log(3))
    for confidence in (0.9, 0.999):  # cross-entropies below half of a uniform guess's
        rest = (1 - confidence) / 2
        healed = logits([confidence, rest, rest], [rest, confidence, rest])
        assert float(unlearning(outputs(unlearned=healed))) == pytest.approx(floored, abs=1e-6)
    above = logits([0.55, 0.225, 0.225], [0.225, 0.55, 0.225])  # -log 0.55 = 0.598 > 0.549
    assert float(unlearning(outputs(unlearned=above))) == pytest.approx(-math.log(-math.log(0.55)), abs=1e-5)


def test_trigger_resistance_is_minus_log_success_times_trust_with_a_floor() -> None:
    triggered = logits([0.1, 0.1, 0.8], [0.3, 0.3, 0.4])
    assert float(trigger_resistance(outputs(triggered=triggered))) == pytest.approx(-0.5 * math.log(0.6), abs=1e-6)
    assert float(trigger_resistance(outputs(triggered=triggered, target=0))) == pytest.approx(
        -0.5 * math.log(0.2), abs=1e-6
    )
    for success in (0.0004, 0.00001):
        rest = (1 - success) / 2
        gone = logits([rest, rest, success], [rest, rest, success])
        assert float(trigger_resistance(outputs(triggered=gone))) == pytest.approx(-0.5 * math.log(5e-4), abs=1e-5)
    assert float(trigger_resistance(outputs(triggered=triggered, trust=0.0))) == 0


def test_terms_carry_the_names_of_their_weights() -> None:
    assert set(TERMS) == set(vars(RewardConfig()))


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
        ((INFINITE, INFINITE, INFINITE), 0.0),
    ],
)
def test_trust_grows_with_the_distance_to_the_runner_up(sizes: tuple[float, ...], trust: float) -> None:
    found = RecoveredTrigger(0, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), sizes)
    assert found.trust == pytest.approx(trust, abs=1e-9)


def test_a_recovered_trigger_blends_by_its_mask() -> None:
    mask, pattern = torch.tensor([[[0.0, 0.25], [1.0, 0.5]]]), torch.tensor([[[1.0, 1.0], [0.3, 0.0]]])
    shown = RecoveredTrigger(0, mask, pattern, (1.0, 2.0))(torch.full((3, 1, 2, 2), 0.4))
    assert shown.shape == (3, 1, 2, 2)
    assert torch.allclose(shown[2], torch.tensor([[[0.4, 0.55], [0.3, 0.2]]]))


# --- sensitivity ----------------------------------------------------------------------------------------


class EveryKind(nn.Module):
    """Units of all four kinds: conv without and with batch-norm, batch-norm alone, linear, linear_input."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(1, 3, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.alone = nn.BatchNorm2d(3)
        self.hidden, self.out = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.softplus(self.plain(x))
        x = x + nn.functional.softplus(self.norm(self.conv(x)))
        x = nn.functional.avg_pool2d(self.alone(x), 4)
        return self.out(nn.functional.softplus(self.hidden(x.flatten(1))))


@pytest.fixture
def network(randomised: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(EveryKind())


@pytest.fixture
def data() -> DefenceData:
    images = torch.rand((20, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return DefenceData(images, torch.arange(20) % 3, 3, Normalisation((0.4,), (0.5,)))


@pytest.fixture
def index(network: nn.Module) -> UnitIndex:
    return index_units(network, (1, 8, 8))


def shrunk(model: nn.Module, layer: UnitLayer, unit: int, by: float) -> nn.Module:
    """A double-precision copy whose gates of one unit are multiplied by 1 - by."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, axis in layer.gates:
            model.get_parameter(name).select(axis, unit).mul_(1 - by)
    return model


def slopes(model: nn.Module, index: UnitIndex, loss: Callable[[nn.Module], Tensor], eps: float = 1e-4) -> Tensor:
    """Central differences of `loss` by shrinking each unit's gates, one entry of the loss per row: (N, entries)."""
    rows = []
    with torch.no_grad():
        for layer in index:
            for unit in range(layer.size):
                down, up = (loss(shrunk(model, layer, unit, by)) for by in (eps, -eps))
                rows.append((down - up).reshape(-1) / (2 * eps))
    return torch.stack(rows)


def cross_entropies(data: DefenceData, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    inputs = data.inputs.double()
    return lambda model: nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def loss_effects(network: nn.Module, index: UnitIndex, data: DefenceData) -> Tensor:
    return Engine(network, index, data.inputs).effects(KeepMask.all_kept(index), data.cross_entropy)


def test_first_order_effects_are_the_slopes_of_the_loss(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    assert {layer.kind for layer in index} == {"conv", "batch_norm", "linear", "linear_input"}
    expected = slopes(network, index, lambda model: cross_entropies(data, data.labels)(model).mean())[:, 0]
    found = loss_effects(network, index, data)
    assert found.shape == (len(index),)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-3)
    assert float(expected.abs().min()) > 1e-5  # every unit takes part


def test_first_order_effects_leave_frozen_parameters_frozen(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    expected = loss_effects(network, index, data)
    names = ["norm.weight", "hidden.weight", "plain.bias"]
    for name in names:
        network.get_parameter(name).requires_grad_(False)
    weights = copy.deepcopy(network.state_dict())
    assert torch.equal(loss_effects(network, index, data), expected)
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == sorted(
        names, key=[name for name, _ in network.named_parameters()].index
    )
    assert all(torch.equal(network.state_dict()[key], value) for key, value in weights.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_first_order_effects_of_any_function_are_its_slopes(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    """A function that is no mean over images: the slopes of a batch depend on every other batch."""

    def function(logits: Tensor) -> Tensor:
        return logits.softmax(1)[:, 2].mean().log() + 0.3 * logits[:, 0].var()

    inputs = data.inputs
    expected = slopes(network, index, lambda model: function(model(inputs.double())))[:, 0]
    whole = KeepMask.all_kept(index)
    found = Engine(network, index, inputs).effects(whole, function)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-3)
    assert float(expected.abs().min()) > 1e-5
    for chunk in (1, 7, 19, 20):
        again = Engine(network, index, inputs, chunk=chunk).effects(whole, function)
        assert torch.allclose(again, found, atol=1e-6, rtol=1e-4), chunk
    engine = Engine(network, index, inputs, chunk=8)
    few = slopes(network, index, lambda model: function(model(inputs[:11].double())))[:, 0]
    assert torch.allclose(engine.effects(whole, function, 11).double(), few, atol=1e-5, rtol=1e-3)


def test_layers_that_the_outputs_do_not_need_have_no_effect(index: UnitIndex, network: Any, data: DefenceData) -> None:
    network.out.weight.data.zero_()
    number = next(i for i, layer in enumerate(index) if layer.module == "hidden")
    engine, whole = Engine(network, index, data.inputs), KeepMask.all_kept(index)
    effects = engine.effects(whole, lambda logits: logits.square().mean())
    assert bool((effects[index.layer_of <= number] == 0).all())
    constant = engine.effects(whole, lambda logits: 0 * logits.sum() + 1)
    assert bool((constant == 0).all())


# --- effects of the objective ---------------------------------------------------------------------------

WEIGHTS = RewardConfig(clean_accuracy=1.0, clean_fidelity=2.0, unlearning=0.5, trigger_resistance=0.4)


@pytest.fixture
def clues() -> Clues:
    """Another network as unlearned copy, and a corner patch for class 1 that is half trusted."""
    torch.manual_seed(4)
    mask = torch.zeros(1, 8, 8)
    mask[0, :3, :3] = 0.8
    return Clues(EveryKind().eval(), RecoveredTrigger(1, mask, torch.ones(1, 8, 8), (6.0, 4.0, 9.0)))


def some_pruned(index: UnitIndex) -> KeepMask:
    """A mask that prunes a unit of every second layer."""
    return KeepMask.all_kept(index).without([layer.offset for layer in list(index)[::2]])


@pytest.mark.parametrize("pruned", [False, True])
def test_effects_are_the_weighted_slopes_of_the_terms(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues, pruned: bool
) -> None:
    mask = some_pruned(index) if pruned else KeepMask.all_kept(index)
    effects = Objective(network, clues, index, data, WEIGHTS).effects(mask)
    triggered = data.normalise(clues.trigger(data.images[data.labels != 1])).double()
    with torch.no_grad():
        before = copy.deepcopy(network).double()(data.inputs.double()).log_softmax(1)
    cut, cut_unlearned = copy.deepcopy(network), copy.deepcopy(clues.unlearned)
    apply_mask(cut, mask)
    apply_mask(cut_unlearned, mask)

    def divergence(model: nn.Module) -> Tensor:
        return (before.exp() * (before - model(data.inputs.double()).log_softmax(1))).sum(1).mean()

    gains = {
        "clean_fidelity": slopes(cut, index, lambda model: -2.0 * divergence(model))[:, 0],
        "unlearning": slopes(
            cut_unlearned, index, lambda model: -0.5 * cross_entropies(data, data.labels)(model).mean().log()
        )[:, 0],
        "trigger_resistance": slopes(
            cut, index, lambda model: -0.4 * 0.5 * model(triggered).softmax(1)[:, 1].mean().log()
        )[:, 0],
    }
    assert set(effects) == {"score", *PLACES} == {"score", *gains}
    for name, expected in gains.items():
        assert effects[name].shape == (len(index),) and effects[name].dtype == torch.float32
        assert not effects[name].requires_grad
        assert torch.allclose(effects[name].double(), expected, atol=2e-5, rtol=2e-3), name
        slope = float(expected.abs().max())  # where nothing is pruned the divergence is at its minimum
        assert slope > 1e-3 if pruned or name != "clean_fidelity" else slope < 1e-6, name
        assert bool((effects[name][~mask.keep] == 0).all())
    total = effects["clean_fidelity"] + effects["unlearning"] + effects["trigger_resistance"]
    assert torch.allclose(effects["score"], total, atol=1e-6)


def test_effects_are_remembered_and_count_one_evaluation_a_pass(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues
) -> None:
    objective = Objective(network, clues, index, data, WEIGHTS)
    assert objective.evaluations == 0
    first = objective.effects(objective.all_kept.without([2, 5]))
    assert objective.evaluations == 1
    again = objective.effects(objective.all_kept.without([5]).without([2]))  # the same units in another order
    assert objective.evaluations == 1
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = objective.effects(objective.all_kept.without([5]))
    assert objective.evaluations == 2
    assert not torch.allclose(other["score"], first["score"], atol=1e-4)
    objective.score(objective.all_kept.without([5]))  # a pass is no score
    assert objective.evaluations == 3


def test_effects_of_few_images_are_those_of_the_first_and_scores_those_of_all(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues
) -> None:
    few = Objective(network, clues, index, data, WEIGHTS, effect_images=8)
    every = Objective(network, clues, index, data, WEIGHTS)
    first = Objective(network, clues, index, data.subset(torch.arange(8)), WEIGHTS)
    others = data.subset((data.labels != clues.trigger.target).nonzero().flatten()[:8])
    triggered = Objective(network, clues, index, others, WEIGHTS)
    mask = few.all_kept.without([2, 5])
    for name in ("clean_fidelity", "unlearning"):
        assert torch.allclose(few.effects(mask)[name], first.effects(mask)[name], atol=1e-7, rtol=1e-4), name
        assert not torch.allclose(few.effects(mask)[name], every.effects(mask)[name], atol=1e-7, rtol=1e-3), name
    found, expected = few.effects(mask)["trigger_resistance"], triggered.effects(mask)["trigger_resistance"]
    assert torch.allclose(found, expected, atol=1e-6)
    assert few.score(mask) == every.score(mask)


def test_effects_leave_both_networks_bit_identical(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues
) -> None:
    network.get_parameter("norm.weight").requires_grad_(False)
    networks = (network, clues.unlearned)
    before = [copy.deepcopy(model.state_dict()) for model in networks]
    flags = [[parameter.requires_grad for parameter in model.parameters()] for model in networks]
    objective = Objective(network, clues, index, data, WEIGHTS)
    for mask in (objective.all_kept, some_pruned(index)):
        objective.effects(mask)
    for model, weights, grads in zip(networks, before, flags, strict=True):
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module.training for module in model.modules())


def test_effects_do_not_change_scores(network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues) -> None:
    mask = some_pruned(index)
    plain, other = (Objective(network, clues, index, data, WEIGHTS) for _ in range(2))
    other.effects(mask)
    assert other.score(mask) == plain.score(mask)
    alone = plain.effects(mask)  # after the score
    assert all(torch.equal(alone[key], value) for key, value in other.effects(mask).items())


def test_effects_of_the_masked_network_are_those_of_the_function_there(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    mask = some_pruned(index)
    cut = copy.deepcopy(network)
    apply_mask(cut, mask)
    inside = Engine(network, index, data.inputs).effects(mask, data.cross_entropy)
    assert bool((inside[~mask.keep] == 0).all())
    torch.testing.assert_close(inside, loss_effects(cut, index, data), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(inside, loss_effects(network, index, data), atol=1e-3)


def test_effects_of_broken_outputs_are_finite(network: nn.Module, index: UnitIndex, data: DefenceData) -> None:
    """They are observations, whose space is finite."""
    trigger = RecoveredTrigger(1, torch.zeros(1, 8, 8), torch.ones(1, 8, 8), (4.0, 8.0, 9.0))
    objective = Objective(network, Clues(copy.deepcopy(network), trigger), index, data, RewardConfig())
    for engine in objective.engines.values():
        engine.network.graph_module.get_parameter("out.bias").fill_(float("nan"))
    effects = objective.effects(objective.all_kept.without([0]))
    assert all(bool(torch.isfinite(values).all()) for values in effects.values())


def test_broken_outputs_count_as_the_lowest_worth(network: nn.Module, index: UnitIndex, data: DefenceData) -> None:
    trigger = RecoveredTrigger(1, torch.zeros(1, 8, 8), torch.ones(1, 8, 8), (4.0, 8.0, 9.0))
    objective = Objective(network, Clues(copy.deepcopy(network), trigger), index, data, RewardConfig())
    fine = objective.score(objective.all_kept)
    for engine in objective.engines.values():
        engine.network.graph_module.get_parameter("out.bias").fill_(float("nan"))
    broken = objective.score(objective.all_kept.without([0]))
    assert math.isfinite(broken.potential) and broken.potential < -1e5 < fine.potential
    assert all(math.isfinite(value) for value in broken.terms.values())


def test_a_trigger_class_that_every_image_has_still_gives_triggered_images(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    alike = replace(data, labels=torch.ones(20, dtype=torch.int64))
    trigger = RecoveredTrigger(1, torch.zeros(1, 8, 8), torch.ones(1, 8, 8), (4.0, 8.0, 9.0))
    objective = Objective(network, Clues(copy.deepcopy(network), trigger), index, alike, RewardConfig())
    score = objective.score(KeepMask.all_kept(index))
    assert 0 < score.terms["trigger_resistance"] <= -math.log(5e-4)  # without images it would be the lowest worth


# --- trigger recovery -----------------------------------------------------------------------------------

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


RECOVERY = TriggerRecoveryConfig(steps=250, batch_size=16)


def test_recovery_finds_a_planted_patch(clean: DefenceData) -> None:
    model = Backdoored()
    with torch.no_grad():
        assert bool((model(clean.images).argmax(1) == clean.labels).all())  # it is a good classifier
    found = recover_trigger(model, clean, RECOVERY, seed=0)
    row, column = PLANTED
    inside = found.mask[0, row : row + 2, column : column + 2]
    assert found.target == 2
    assert float(inside.sum() / found.mask.sum()) > 0.9
    assert float(inside.min()) > 0.2
    assert float(found.pattern[0, row : row + 2, column : column + 2].min()) > 0.9
    assert found.trust == 1
    assert found.sizes[2] < 4 < min(found.sizes[:2])
    assert found.sizes[2] == pytest.approx(float(found.mask.sum()), rel=1e-5)
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

    def fail(step: int, steps: int) -> None:
        raise RuntimeError("stopped by hand")

    with pytest.raises(RuntimeError, match="stopped by hand"):
        recover_trigger(model, clean, RECOVERY, 0, fail)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_recovery_without_success_is_not_trusted(clean: DefenceData) -> None:
    found = recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=1), seed=0)
    assert found.sizes == (INFINITE, INFINITE, INFINITE)
    assert found.trust == 0


def test_recovery_depends_on_the_seed_alone(clean: DefenceData) -> None:
    short = replace(RECOVERY, steps=20)
    one = recover_trigger(Backdoored(), clean, short, seed=1)
    torch.rand(7)  # the global generator has no say
    two, other = (recover_trigger(Backdoored(), clean, short, seed) for seed in (1, 2))
    assert torch.equal(one.mask, two.mask) and torch.equal(one.pattern, two.pattern) and one.sizes == two.sizes
    assert not torch.equal(one.mask, other.mask)


def test_recovery_reports_its_progress(clean: DefenceData) -> None:
    seen: list[tuple[int, int]] = []
    recover_trigger(Backdoored(), clean, replace(RECOVERY, steps=3), 0, lambda step, steps: seen.append((step, steps)))
    assert seen == [(0, 3), (1, 3), (2, 3)]
