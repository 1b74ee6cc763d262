"""Searches and the job: budgets, choices on planted objectives, and the same result for the same seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.monitor import Monitor
from torch import Tensor, nn

from agents.ppo import build_agent, train_agent
from agents.search import SEARCHES, greedy_search, one_shot_ranking, random_search, ranked_units
from baselines_rnp.recover import RecoverConfig
from baselines_rnp.rnp import RNPConfig
from envs import pruning
from envs.pruning import PruningEnv
from envs.rewards import TERMS, Clues, Objective, Score
from onp.config import AgentConfig, EnvConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.data import DefenceData
from onp.graph import EFFECTS
from onp.masks import KeepMask, masked
from onp.purify import METHODS, Purification, PurifyConfig, choose_mask, purify
from onp.trigger_recovery import RecoveredTrigger

UNITS = 12
PRIOR = (5, 2, 9, 0, 7, 1, 3, 4, 6, 8, 10, 11)
"""units by first-order score, the best first"""
WORTH = {2: 2.0, 9: 3.0, 7: 1.0, 11: 5.0}
"""what pruning a unit is worth on the planted objective; -1 for any other"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads, and badly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PlantedObjective(Objective):
    """The worths of the pruned units add up; first-order scores rank the units as `PRIOR` does."""

    def sensitivity(self) -> dict[str, Tensor]:
        self.evaluations += 4
        scores = torch.zeros(UNITS)
        scores[list(PRIOR)] = torch.arange(UNITS, 0, -1).float()
        return dict.fromkeys(EFFECTS, scores)

    def score(self, mask: KeepMask) -> Score:
        if mask.key not in self.scores:
            self.evaluations += 1
            total = sum(WORTH.get(unit, -1.0) for unit in pruned(mask))
            self.scores[mask.key] = (mask, Score(total, dict.fromkeys(TERMS, total)))
        return self.scores[mask.key][1]


def pruned(mask: KeepMask) -> list[int]:
    return (~mask.keep).nonzero().flatten().tolist()


def ignore(used: int, budget: int) -> None:
    """No progress bar."""


@pytest.fixture
def make_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PruningEnv]:
    """Builds planted environments of `UNITS` hidden neurons."""
    monkeypatch.setattr(pruning, "Objective", PlantedObjective)

    def make(max_steps: int = 4) -> PruningEnv:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).eval()
        data = DefenceData(torch.rand(12, 1, 4, 4), torch.arange(12) % 3, 3)
        blank = RecoveredTrigger(0, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), (1.0, 2.0, 2.0))
        return PruningEnv(net, data, EnvConfig(max_steps=max_steps), Clues(copy.deepcopy(net), blank))

    return make


# --- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SEARCHES))
@pytest.mark.parametrize("budget", [5, 6, 12, 16, 37])
def test_searches_stay_within_the_budget(make_env: Callable[..., PruningEnv], name: str, budget: int) -> None:
    env = make_env()
    reported: list[tuple[int, int]] = []
    SEARCHES[name](env, budget, 0, lambda used, whole: reported.append((used, whole)))
    # A ranking runs out of units: one mask a unit, beside the 5 evaluations that construction takes.
    assert env.reward_evaluations == (min(budget, 5 + UNITS) if name == "ranked" else budget)
    assert len(env.objective.scores) == env.reward_evaluations - 4
    assert all(used <= whole == budget for used, whole in reported)


@pytest.mark.parametrize("name", list(SEARCHES))
def test_searches_end_where_there_is_nothing_left_to_try(make_env: Callable[..., PruningEnv], name: str) -> None:
    """2^12 masks at the most, and a budget beyond them."""
    env = make_env(max_steps=UNITS)
    SEARCHES[name](env, 2 * 2**UNITS, 0, ignore)
    assert env.reward_evaluations <= 4 + 2**UNITS


def test_random_search_ends_where_short_episodes_have_seen_every_mask(make_env: Callable[..., PruningEnv]) -> None:
    """Episodes of one step reach 12 masks; a budget beyond them must not keep the search going for ever."""
    env, calls = make_env(max_steps=1), 0

    def count(used: int, budget: int) -> None:
        nonlocal calls
        calls += 1
        assert calls < 5000, "the search goes on although nothing is left to try"

    random_search(env, 40, 0, count)
    assert env.reward_evaluations <= 5 + UNITS


@pytest.mark.parametrize("budget", [20, 40])
def test_ppo_stays_within_the_budget(make_env: Callable[..., PruningEnv], budget: int) -> None:
    env, config = make_env(), AgentConfig(n_steps=16, batch_size=8, n_epochs=1)
    reported: list[int] = []
    agent = build_agent(Monitor(env), config, seed=0)
    curve = train_agent(agent, config, budget, lambda used, whole: reported.append(used))
    assert env.reward_evaluations <= budget
    assert agent.num_timesteps <= max(budget * config.steps_per_evaluation, 16) + 16
    assert max(reported) <= budget
    assert len(curve.evaluations) == len(curve.returns) > 0
    assert curve.evaluations == sorted(curve.evaluations)
    assert curve.evaluations[-1] <= budget


def test_ppo_ends_where_masks_repeat(make_env: Callable[..., PruningEnv]) -> None:
    """Episodes of one step know 13 masks; the limit on steps ends learning."""
    env, config = make_env(max_steps=1), AgentConfig(n_steps=16, batch_size=8, n_epochs=1, steps_per_evaluation=3)
    agent = build_agent(Monitor(env), config, seed=0)
    train_agent(agent, config, 40, ignore)
    assert env.reward_evaluations <= 4 + 1 + UNITS
    assert 120 <= agent.num_timesteps < 120 + 16


# --- choices --------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_candidate_of_each_step(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env(max_steps=3)
    greedy_search(env, 5 + 3 * 4, 0, ignore)  # 4 candidates a step
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried[1:5] == [[5], [2], [9], [0]]  # the first four by first-order score
    assert tried[5:9] == [[5, 9], [2, 9], [0, 9], [7, 9]]  # 9 was worth most; 7 moves up
    assert tried[9:] == [[2, 5, 9], [0, 2, 9], [2, 7, 9], [1, 2, 9]]
    best = max(env.objective.scores.values(), key=lambda item: item[1].potential)
    assert pruned(best[0]) == [2, 7, 9]
    assert best[1].potential == 6.0


def test_greedy_ends_where_every_unit_is_pruned(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    greedy_search(env, 1000, 0, ignore)
    deepest = max(env.objective.scores.values(), key=lambda item: item[0].units_pruned)[0]
    assert deepest.units_pruned == UNITS
    assert env.reward_evaluations == 5 + UNITS * (UNITS + 1) // 2


def test_ranking_prunes_in_the_order_of_the_first_order_score(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    assert ranked_units(env) == list(PRIOR)
    one_shot_ranking(env, 1000, 0, ignore)
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried == [sorted(PRIOR[:count]) for count in range(UNITS + 1)]


def test_ranking_of_a_real_network_sorts_its_scores(data: DefenceData) -> None:
    torch.manual_seed(3)
    model = network()
    mask = torch.zeros(1, 8, 8)
    mask[0, :3, :3] = 1
    clues = Clues(network(5), RecoveredTrigger(1, mask, torch.ones(1, 8, 8), (6.0, 4.0, 9.0)))
    env = PruningEnv(model, data, EnvConfig(), clues)
    scores = env.effects["first_order_score"].tolist()
    assert [scores[unit] for unit in ranked_units(env)] == sorted(scores, reverse=True)
    assert sorted(ranked_units(env)) == list(range(len(env.index)))


def test_random_search_prunes_valid_units_only(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    steps: list[tuple[float, int]] = []
    step = env.step

    def watched(action: Any) -> Any:
        result = step(action)
        steps.append((result[4]["units_pruned"], result[4]["invalid_actions"]))
        return result

    env.step = watched  # type: ignore[method-assign]
    random_search(env, 40, 0, ignore)
    assert [count for count, _ in steps][:8] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert all(invalid == 0 for _, invalid in steps)


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)])
def test_random_search_depends_on_its_seed_alone(make_env: Callable[..., PruningEnv], seeds: tuple[int, int]) -> None:
    tried = []
    for seed in seeds:
        env = make_env()
        np.random.seed(len(tried))
        random_search(env, 30, seed, ignore)
        tried.append(list(env.objective.scores))
    assert (tried[0] == tried[1]) == (seeds[0] == seeds[1])


# --- choosing the final mask ----------------------------------------------------------------------------


def scored(env: PruningEnv, worths: dict[tuple[int, ...], float]) -> Objective:
    """An objective that knows the worth of some masks, by the units that they prune."""
    objective = copy.copy(env.objective)
    masks = [(env.objective.all_kept.without(units), worth) for units, worth in worths.items()]
    objective.scores = {mask.key: (mask, Score(worth, {})) for mask, worth in masks}
    return objective


CASES = {
    "the held-out half decides": ({(): 0.0, (1,): 3.0, (2,): 2.0}, {(): 0.0, (1,): 0.5, (2,): 1.0}, 5, [2]),
    "keeping all competes": ({(): 0.0, (1,): 3.0, (2,): 2.0}, {(): 0.1, (1,): -0.5, (2,): 0.0}, 5, []),
    "keeping all competes unranked": ({(): 0.0, (1,): 3.0, (2,): 2.0}, {(): 0.1, (1,): -0.5, (2,): 9.0}, 1, []),
    "all kept on ties": ({(): 0.0, (1,): 3.0, (1, 2): 2.0}, {(): 1.0, (1,): 1.0, (1, 2): 1.0}, 5, []),
    "fewer units on ties": ({(): 0.0, (3, 4): 5.0, (1,): 3.0}, {(): 0.0, (3, 4): 1.0, (1,): 1.0}, 5, [1]),
    "only finalists": ({(): 0.0, (1,): 3.0, (2,): 2.0, (3,): 1.0}, {(): 0.0, (1,): 1.0, (2,): 2.0, (3,): 9.0}, 2, [2]),
    "ties among finalists": ({(): 0.0, (1, 2): 3.0, (3,): 3.0}, {(): 0.0, (1, 2): 9.0, (3,): 1.0}, 1, [3]),
}


@pytest.mark.parametrize("case", CASES)
def test_choose_mask(make_env: Callable[..., PruningEnv], case: str) -> None:
    search, held_out, finalists, expected = CASES[case]
    env = make_env()
    assert pruned(choose_mask(scored(env, search), scored(env, held_out), finalists)) == expected


# --- the job --------------------------------------------------------------------------------------------

QUICK = PurifyConfig(
    budget=16,
    finalists=4,
    env=EnvConfig(
        4,
        unlearn=UnlearnConfig(max_epochs=3, stop_on="batch", milestones=()),
        recovery=TriggerRecoveryConfig(steps=15, batch_size=4),
    ),
    agent=AgentConfig(hidden=8, n_steps=8, batch_size=4, n_epochs=1),
    rnp=RNPConfig(UnlearnConfig(max_epochs=2), RecoverConfig(epochs=2), max_accuracy_drop=0.5),
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).eval()  # fmt: skip


@pytest.fixture
def data() -> DefenceData:
    generator = torch.Generator().manual_seed(1)
    return DefenceData(torch.rand((24, 1, 8, 8), generator=generator), torch.arange(24) % 3, 3)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_deterministic_and_leave_the_network_alone(method: str, data: DefenceData) -> None:
    results = []
    for disturbance in (0, 1):
        model = network()
        weights, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
        torch.manual_seed(disturbance)  # global generators have no say
        np.random.seed(disturbance)
        results.append(Purification(model, data, QUICK).run(method))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert not any(module.training for module in model.modules())
    one, two = results
    assert one.mask is not None and two.mask is not None
    assert (one.mask.key, one.mask.order, one.note) == (two.mask.key, two.mask.order, two.note)
    assert one.method == method
    assert one.reward_evaluations == two.reward_evaluations <= (0 if method == "rnp" else QUICK.budget)
    assert one.seconds > 0
    if method == "rnp":
        assert one.rnp_values is not None and two.rnp_values is not None
        assert torch.equal(one.rnp_values, two.rnp_values)
    if method == "onp":
        assert one.agent is not None and two.agent is not None and one.curve is not None
        assert one.curve == two.curve
        parameters = [result.agent.policy.state_dict() for result in (one, two)]  # type: ignore[union-attr]
        assert all(torch.equal(parameters[0][key], parameters[1][key]) for key in parameters[0])


@pytest.mark.parametrize("method", ["random", "greedy", "ranked", "onp"])
def test_methods_search_one_half_and_choose_on_the_other(
    method: str, data: DefenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Objective] = []
    construct = Objective.__init__

    def watched(self: Objective, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Objective, "__init__", watched)
    result = Purification(network(), data, QUICK).run(method)
    search, held_out = seen
    assert len(search.data) == len(held_out.data) == 12
    rows = {tuple(image.flatten().tolist()) for image in torch.cat([search.data.images, held_out.data.images])}
    assert len(rows) == 24  # no image is in both halves
    assert len(held_out.scores) <= QUICK.finalists + 1
    assert set(held_out.scores) <= set(search.scores)
    assert search.evaluations == result.reward_evaluations <= QUICK.budget
    assert result.mask is not None
    best = max(score.potential for _, score in held_out.scores.values())
    assert held_out.score(result.mask).potential == best


def test_purify_returns_a_pruned_copy(data: DefenceData) -> None:
    model = network()
    weights = copy.deepcopy(model.state_dict())
    done = purify(model, data, QUICK)
    assert done.model is not model
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    with torch.no_grad(), masked(model, done.mask):
        expected = model(data.inputs)
    with torch.no_grad():
        assert torch.equal(done.model(data.inputs), expected)
    assert done.results["onp"].mask is done.mask
