"""The objective: its effects and scores against computations by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from by_hand import cross_entropies, known_views, loss_effects, toggled, toggling_slopes
from torch import Tensor, nn
from toy_networks import EveryKind, grey_images

from envs.rewards import PLACES, Objective, _divergence_probe
from onp.clues import Clues
from onp.config import RewardConfig
from onp.data import DefenceData
from onp.engine import Engine
from onp.masks import KeepMask, apply_mask
from onp.trigger_recovery import RecoveredTrigger
from onp.units import UnitIndex, index_units
from onp.untargeted_recovery import UntargetedTrigger
from onp.warp_recovery import RecoveredWarp
from onp.wave_recovery import RecoveredWave


@pytest.fixture
def network(randomised: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(EveryKind())


@pytest.fixture
def data() -> DefenceData:
    return grey_images()


@pytest.fixture
def index(network: nn.Module) -> UnitIndex:
    return index_units(network, (1, 8, 8))


WEIGHTS = RewardConfig(clean_accuracy=1.0, clean_fidelity=2.0, unlearning=0.5, trigger_resistance=0.4)


@pytest.fixture
def clues() -> Clues:
    """Another network as unlearned copy, and a corner patch for class 1 that is half trusted."""
    torch.manual_seed(4)
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :3, :3] = 0.8
    return Clues(EveryKind().eval(), RecoveredTrigger(1, mask, torch.ones(1, 1, 8, 8), (6.0, 4.0, 9.0)))


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

    def log_odds(model: nn.Module) -> Tensor:
        success = model(triggered).softmax(1)[:, 1].mean()
        return (success / (1 - success)).log()

    gains = {
        "unlearning": toggling_slopes(
            clues.unlearned, mask, lambda model: -0.5 * 0.55 * cross_entropies(data, data.labels)(model).mean().log()
        ),
        "trigger_resistance": toggling_slopes(network, mask, lambda model: -0.4 * 0.5 * log_odds(model)),
    }
    assert set(effects) == {"score", *PLACES} == {"score", "clean_fidelity", *gains}
    for name, expected in gains.items():
        assert torch.allclose(effects[name].double(), expected, atol=2e-5, rtol=2e-3), name
        assert float(expected.abs().max()) > 1e-3, name
    for name in PLACES:
        assert effects[name].shape == (len(index),) and effects[name].dtype == torch.float32
        assert not effects[name].requires_grad
    total = effects["clean_fidelity"] + effects["unlearning"] + effects["trigger_resistance"]
    assert torch.allclose(effects["score"], total, atol=1e-6)


def test_clean_terms_see_images_shifted_by_a_sixteenth_and_flipped_where_the_network_knows_the_views() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():  # says 1 whatever it sees
        net[3].weight.zero_()
        net[3].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    data = DefenceData(torch.rand(60, 1, 16, 16), torch.arange(60) % 3, 3)
    trigger = RecoveredTrigger(1, torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16), (4.0, 8.0, 9.0))
    objective = Objective(net, Clues(copy.deepcopy(net), trigger), index_units(net, (1, 16, 16)), data, WEIGHTS)
    places = set()
    for image, label, seen in zip(data.images, data.labels, objective.engines["pruned"].inputs, strict=True):
        if int(label) != 1:
            assert torch.equal(seen, image)
            continue
        padded = nn.functional.pad(image, (1, 1, 1, 1))  # a pixel of 16
        windows = {
            (top, left, axes): padded[:, top : top + 16, left : left + 16].flip(axes)
            for top, left, axes in itertools.product(range(3), range(3), ((), (2,)))
        }
        (place,) = (place for place, window in windows.items() if torch.equal(seen, window))
        places.add(place)
    tops, lefts, axes = (set(values) for values in zip(*places, strict=True))
    assert tops == lefts == {0, 1, 2} and axes == {(), (2,)}


@pytest.mark.parametrize("pruned", [False, True])
def test_the_effect_on_fidelity_is_what_slope_costs_or_restoring_gains_and_half_the_curvature_of_the_divergence(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By differences of each unit's gates, in double precision, on cropped and flipped images; mean of all signs."""
    mask, eps = some_pruned(index) if pruned else KeepMask.all_kept(index), 1e-3
    inputs = data.normalise(known_views(network, data)).double()
    assert not torch.equal(inputs, data.inputs.double())
    with torch.no_grad():
        original = copy.deepcopy(network).double()(inputs).log_softmax(1)
        here = toggled(network, mask, 0, 0)(inputs).log_softmax(1)

    def divergence(model: nn.Module, start: Tensor) -> float:
        return float((start.exp() * (start - model(inputs).log_softmax(1))).sum(1).mean())

    def curvature(unit: int) -> float:
        with torch.no_grad():
            near, far = (divergence(toggled(network, mask, unit, by), here) for by in (eps, 2 * eps))
        return 2 * (2 * near / eps**2) - 2 * far / (2 * eps) ** 2

    slope = -2.0 * toggling_slopes(network, mask, lambda model: divergence(model, original))
    assert bool((slope[mask.keep] > 1e-4).any()) == bool((slope[~mask.keep] > 1e-4).any()) == pruned
    cost = -2.0 * torch.tensor([curvature(unit) for unit in range(len(index))]).double() / 2
    expected = cost + torch.where(mask.keep, slope.clamp(max=0), slope)
    single = Objective(network, clues, index, data, WEIGHTS).effects(mask)["clean_fidelity"].double()
    estimates = []
    for signs in itertools.product((0, 1), repeat=3):  # one pattern for every image
        objective = Objective(network, clues, index, data, WEIGHTS)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda high, shape, signs=signs, **_: torch.tensor(signs).expand(shape))
            estimates.append(objective.effects(mask)["clean_fidelity"].double())
    found = torch.stack(estimates).mean(0)
    assert torch.allclose(found, expected, atol=2e-6, rtol=2e-3)
    assert float(expected.min()) < -1e-2
    # One random sign an image and class, as it is used: of the right size, with the noise of 20 images.
    assert bool((single[mask.keep] <= 0).all())
    assert float((single - expected + cost).sum() / cost.sum()) == pytest.approx(1, abs=0.4)
    assert float(torch.corrcoef(torch.stack([single, expected]))[0, 1]) > 0.9


def test_the_divergence_probe_is_a_random_root_of_the_fisher_information() -> None:
    """Its gradient is r' B with B' B = diag(p) - p p' and signs r, so its square is z' H z on average."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    images = 40_000
    given = (p.log() + 2).expand(images, 4).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_divergence_probe(given.detach())(given), given)
    root = p.sqrt().diag() - p.sqrt().outer(p)
    fisher = p.diag() - p.outer(p)
    assert torch.allclose(root.T @ root, fisher, atol=1e-12)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64) @ root
    distance, nearest = torch.cdist(gradient, patterns).min(1)
    assert float(distance.max()) < 1e-6
    counts = torch.bincount(nearest, minlength=16) / images
    assert float((counts - 1 / 16).abs().max()) < 0.01  # every pattern of signs, equally often
    assert torch.allclose(gradient.T @ gradient / images, fisher, atol=5e-3)
    for z in torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, -1.0, 2.0, 0.0], [0.0, 0.0, -1.0, 3.0]], dtype=torch.float64):
        by_hand = float((p * z.square()).sum() - (p * z).sum() ** 2)  # the variance of z under p
        assert float((gradient @ z).square().mean()) == pytest.approx(by_hand, rel=0.03)
        moved = (p.log() + 1e-3 * z).log_softmax(0)
        assert float((p * (p.log() - moved)).sum()) == pytest.approx(1e-6 * by_hand / 2, rel=5e-3)
    assert torch.allclose(gradient.sum(1), torch.zeros(1).double(), atol=1e-9)  # a shift of all logits changes nothing


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
    others = data.subset((data.labels != clues.mask.target).nonzero().flatten()[:8])
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
    inside = Engine(network, index, data.inputs).effects(mask, data.cross_entropy).sum(0)
    torch.testing.assert_close(inside[mask.keep], loss_effects(cut, index, data)[mask.keep], rtol=1e-4, atol=1e-6)
    restored = toggling_slopes(network, mask, lambda model: cross_entropies(data, data.labels)(model).mean())
    torch.testing.assert_close(inside[~mask.keep].double(), restored[~mask.keep], rtol=2e-3, atol=1e-6)
    assert not torch.allclose(inside, loss_effects(network, index, data), atol=1e-3)


def test_effects_of_broken_outputs_are_finite(network: nn.Module, index: UnitIndex, data: DefenceData) -> None:
    """They are observations, whose space is finite."""
    trigger = RecoveredTrigger(1, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), (4.0, 8.0, 9.0))
    objective = Objective(network, Clues(copy.deepcopy(network), trigger), index, data, RewardConfig())
    for engine in objective.engines.values():
        engine.network.graph_module.get_parameter("out.bias").fill_(float("nan"))
    effects = objective.effects(objective.all_kept.without([0]))
    assert all(bool(torch.isfinite(values).all()) for values in effects.values())


def test_broken_outputs_count_as_the_lowest_worth(network: nn.Module, index: UnitIndex, data: DefenceData) -> None:
    trigger = RecoveredTrigger(1, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), (4.0, 8.0, 9.0))
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
    trigger = RecoveredTrigger(1, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), (4.0, 8.0, 9.0))
    objective = Objective(network, Clues(copy.deepcopy(network), trigger), index, alike, RewardConfig())
    score = objective.score(KeepMask.all_kept(index))
    with torch.no_grad():  # the trigger covers nothing
        success = float(network(alike.inputs).softmax(1)[:, 1].double().mean())
    assert score.terms["trigger_resistance"] == pytest.approx(math.log(1 - success) - math.log(success), abs=1e-4)


def test_the_trigger_that_can_be_trusted_more_leads_each_class_to_its_own(
    network: nn.Module, index: UnitIndex, data: DefenceData, clues: Clues
) -> None:
    turn = 5 * torch.eye(3, dtype=torch.int64).roll(1, 1) + 3 * torch.eye(3, dtype=torch.int64)  # 3 of 8 stay
    everyone = UntargetedTrigger(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), 2.5, turn)
    assert everyone.goals(torch.tensor([2, 0, 1, 1])).tolist() == [0, 1, 2, 2]
    staying = replace(everyone, moves=torch.tensor([[4.0, 0.0], [1.0, 2.0]]))
    assert staying.goals(torch.tensor([0, 1])).tolist() == [0, 0], "nothing leads class 0 anywhere"
    assert everyone.moves.diagonal().tolist() == [3, 3, 3], "counted as they are"
    less, more = replace(clues, untargeted=replace(everyone, size=3.0)), replace(clues, untargeted=everyone)
    for one in (clues, less):
        assert (one.trigger, one.trust) == (clues.mask, 0.5), "6 pixels against 4; 4 against 3"
    assert (more.trigger, more.trust) == (everyone, pytest.approx(0.6)), "4 pixels against 2.5"
    score = Objective(network, more, index, data, RewardConfig()).score(KeepMask.all_kept(index))
    with torch.no_grad():  # the trigger covers nothing
        success = network(data.inputs).softmax(1).double()[torch.arange(len(data)), (data.labels + 1) % 3].mean()
    assert score.terms["trigger_resistance"] == pytest.approx(0.6 * math.log(1 / success - 1), abs=1e-4)


def test_the_reward_goes_by_the_trigger_that_the_verdict_goes_by() -> None:
    mask = RecoveredTrigger(0, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), (8.0, 10.0, 30.0))
    moves = 5 * torch.eye(3, dtype=torch.long).roll(1, 1)
    flow = torch.zeros(2, 8, 8)
    alone = Clues(nn.Identity(), mask)
    assert (alone.family, alone.trigger, alone.trust) == ("mask", mask, 0.25)
    for size, agreement, warps, leading, trust in (
        (8.0, 1.0, (0.9, 0.9, 0.9), "mask", 0.25),
        (5.0, 1.0, (0.9, 0.9, 0.9), "all-to-all", 0.6),
        (5.0, 0.9, (0.9, 0.2, 0.9), "warp", 0.9),
        (5.0, 0.1, (0.9, 0.2, 0.9), "all-to-all", 0.6),
        (2.0, 1.0, (0.9, 0.1, 0.9), "warp", 1.0),  # both would be trusted fully; 9 times is more than 4 times
        (8.0, 0.8, (5.0, 0.8, 5.0), "mask", 0.25),  # beyond an eighth of 8 pixels every warp counts as 1
        (8.0, 0.8, (math.inf, 0.5, math.inf), "warp", 0.8),
    ):
        everyone = UntargetedTrigger(mask.masks[0], mask.patterns[0], size, moves)
        warp = RecoveredWarp(1, flow, warps, agreement)
        clues = Clues(nn.Identity(), mask, everyone, warp)
        assert clues.family == leading and clues.trust == pytest.approx(trust)
        assert clues.trigger is {"mask": mask, "all-to-all": everyone, "warp": warp}[leading]
        assert leading != "warp" or clues.trigger.goals(torch.tensor([0, 1, 2])).tolist() == [1, 1, 1]


def test_a_wave_guides_the_reward_where_nothing_else_tells_of_its_class() -> None:
    mask = RecoveredTrigger(0, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), (6.0, 9.0, 30.0))
    warp = RecoveredWarp(1, torch.zeros(2, 8, 8), (0.9, 0.3, 0.9), agreement=0.8)
    pattern = torch.zeros(1, 8, 8)
    for sizes, guide in (((0.1, 1.5, 1.5), mask), ((1.5, 0.1, 1.5), warp), ((1.5, 1.5, 0.1), None)):
        wave = RecoveredWave(sizes.index(0.1), pattern, sizes)
        clues = Clues(nn.Identity(), mask, None, warp, wave)
        assert (clues.family, clues.trigger, clues.trust) == ("wave", wave, 1), "fifteen times"
        assert clues.guide is (guide or wave)
        blurred = Clues(nn.Identity(), replace(mask, sizes=(8.0, 9.0, 9.0)), None, replace(warp, agreement=0.2), wave)
        assert blurred.guide is wave, "neither stands out enough to tell of a class"
    assert Clues(nn.Identity(), mask, None, warp).guide is warp
