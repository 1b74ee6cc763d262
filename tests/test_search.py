"""Searches: budgets, choices on planted objectives, and the same result for the same seed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.policy import GraphPolicy
from agents.ppo import build_agent, roll_out, train_agent
from agents.search import SEARCHES, greedy_search, one_shot_ranking, random_search, ranked_units
from envs import pruning
from envs.pruning import PruningEnv
from envs.rewards import PLACES, TERMS, Objective, Score
from onp.clues import Clues
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.masks import KeepMask
from onp.purification import choose_mask
from onp.trigger_recovery import RecoveredTrigger
from onp.units import index_units

UNITS = 12
PRIOR = (5, 2, 9, 0, 7, 1, 3, 4, 6, 8, 10, 11)
"""units by first-order score, the best first"""
WORTH = {2: 2.0, 9: 3.0, 7: 1.0, 11: 5.0}
"""what pruning a unit is worth on the planted objective; -1 for any other"""


class PlantedObjective(Objective):
    """The worths of the pruned units add up; first-order scores rank the units as `PRIOR` does."""

    def effects(self, mask: KeepMask) -> dict[str, Tensor]:
        if mask.key not in self._effects:
            self.evaluations += 1
            scores = torch.zeros(UNITS)
            scores[list(PRIOR)] = torch.arange(UNITS, 0, -1).float()
            self._effects[mask.key] = dict.fromkeys(("score", *PLACES), scores * mask.keep)
        return self._effects[mask.key]

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

    def make(max_steps: int = 4, pairs: int = 0, **settings: Any) -> PruningEnv:
        """With `pairs` the first units are tied two by two ({0, 1}, {2, 3}, ...) and pruned in groups."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).eval()
        data = DefenceData(torch.rand(12, 1, 4, 4), torch.arange(12) % 3, 3)
        blank = RecoveredTrigger(0, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), (1.0, 2.0, 2.0))
        index, config = (
            index_units(net, data.input_shape),
            EnvConfig(max_steps=max_steps, prune_groups=pairs > 0, **settings),
        )
        groups = torch.tensor([unit - unit % 2 if unit < 2 * pairs else unit for unit in range(UNITS)])
        clues = Clues(copy.deepcopy(net), blank)
        return PruningEnv(net, data, config, clues, index=replace(index, groups=groups))

    return make


# --- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SEARCHES))
@pytest.mark.parametrize("budget", [5, 6, 12, 16, 37])
def test_searches_stay_within_the_budget(make_env: Callable[..., PruningEnv], name: str, budget: int) -> None:
    env = make_env()
    reported: list[tuple[int, int]] = []
    SEARCHES[name](env, budget, 0, lambda used, whole: reported.append((used, whole)))
    # A ranking runs out of units: one mask a unit, beside the 3 evaluations that construction takes.
    whole = min(budget, 3 + UNITS) if name == "ranked" else budget
    assert whole - (name == "random") <= env.reward_evaluations <= whole  # a step may cost 2: one may be left over
    assert env.reward_evaluations == env.objective.evaluations
    assert all(used <= whole == budget for used, whole in reported)


@pytest.mark.parametrize("name", list(SEARCHES))
def test_searches_end_where_there_is_nothing_left_to_try(make_env: Callable[..., PruningEnv], name: str) -> None:
    """Random episodes reach 1 + 12 + 66 masks, the others fewer than 90; the budget lies beyond them."""
    env = make_env(max_steps=2)
    SEARCHES[name](env, 500, 0, ignore)
    assert env.reward_evaluations <= 1 + 2 * 90


def test_random_search_ends_where_short_episodes_have_seen_every_mask(make_env: Callable[..., PruningEnv]) -> None:
    """Episodes of one step reach 12 masks; a budget beyond them must not keep the search going for ever."""
    env, calls = make_env(max_steps=1), list[int]()

    def count(used: int, budget: int) -> None:
        calls.append(used)
        assert len(calls) < 5000, "the search goes on although nothing is left to try"

    random_search(env, 60, 0, count)
    assert len(env.objective.scores) == 1 + UNITS
    assert calls.count(calls[-1]) == 1 + 100  # the step that scored the last new mask, and 100 episodes without one


@pytest.mark.parametrize("name", list(SEARCHES))
@pytest.mark.parametrize("pairs", [0, 6])
def test_searches_cope_with_more_steps_than_units(make_env: Callable[..., PruningEnv], name: str, pairs: int) -> None:
    """Every unit is pruned before the episode ends."""
    env = make_env(max_steps=UNITS + 2, pairs=pairs)
    SEARCHES[name](env, 60, 0, ignore)
    assert env.reward_evaluations <= 60


@pytest.mark.parametrize("budget", [20, 40])
def test_ppo_stays_within_the_budget(make_env: Callable[..., PruningEnv], budget: int) -> None:
    env, config = make_env(), AgentConfig(n_steps=16, batch_size=8, n_epochs=1)
    reported: list[int] = []
    agent = build_agent(env, config, seed=0)
    curve = train_agent(agent, config, budget, lambda used, whole: reported.append(used))
    assert env.reward_evaluations <= budget + 1  # a step costs 2: a mask and a sensitivity pass
    assert agent.num_timesteps <= max(budget * config.steps_per_evaluation, 16) + 16
    assert max(reported) <= budget
    assert len(curve.evaluations) == len(curve.returns) > 0
    assert curve.evaluations == sorted(curve.evaluations)
    assert curve.evaluations[-1] <= budget + 1


def test_ppo_never_takes_a_fruitless_action_twice_at_a_mask(
    make_env: Callable[..., PruningEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are worth what they are worth at any mask, and there always is one left that was not tried.

    Where a mask is come back to by restoring, other effects show.
    """
    chosen = Counter[tuple[bytes, int]]()
    forward = GraphPolicy.forward

    def watched(self: GraphPolicy, observation: dict[str, Tensor], deterministic: bool = False) -> Any:
        actions, *rest = forward(self, observation, deterministic)
        chosen[b"".join(observation[name].numpy().tobytes() for name in ("kept", "effects")), int(actions)] += 1
        return actions, *rest

    monkeypatch.setattr(GraphPolicy, "forward", watched)
    env, config = make_env(), AgentConfig(n_steps=16, batch_size=8, n_epochs=1)
    train_agent(build_agent(env, config, seed=0), config, 60, ignore)
    assert {count for (_, action), count in chosen.items() if action not in WORTH} == {1}
    assert len({action for _, action in chosen if action not in WORTH}) > 3


@pytest.mark.parametrize(
    ("budget", "gained", "used"),
    [(4, 0, 3), (5, 2, 5), (6, 2, 5), (7, 1, 6), (8, 4, 8), (9, 4, 8), (10, 5, 10), (math.inf, 5, 10)],
)
def test_an_episode_of_the_learned_policy_stops_before_the_budget(
    make_env: Callable[..., PruningEnv], budget: float, gained: float, used: int
) -> None:
    """Construction takes 3; units 2, 9 and 7 gain 2, 3 and 1 for 2 evaluations each, and 5 loses 1 for one."""
    env, actions = make_env(), iter((2, 5, 9, 7))

    class Scripted:
        def predict(self, observation: Any, deterministic: bool) -> tuple[int, None]:
            assert deterministic
            return next(actions), None

    agent: Any = Scripted()
    assert roll_out(agent, env, budget) == gained
    assert env.reward_evaluations == used


def test_ppo_ends_where_masks_repeat(make_env: Callable[..., PruningEnv]) -> None:
    """Episodes of one step know 13 masks; the limit on steps ends learning."""
    env, config = make_env(max_steps=1), AgentConfig(n_steps=16, batch_size=8, n_epochs=1, steps_per_evaluation=3)
    agent = build_agent(env, config, seed=0)
    train_agent(agent, config, 40, ignore)
    assert env.reward_evaluations <= 3 + 2 * UNITS
    assert 120 <= agent.num_timesteps < 120 + 16


# --- choices --------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_candidate_of_each_step(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env(max_steps=3)
    greedy_search(env, 3 + 3 * 5, 0, ignore)  # a sensitivity pass and 4 candidates a step
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried[1:5] == [[5], [2], [9], [0]]  # the first four by first-order score
    assert tried[5:9] == [[5, 9], [2, 9], [0, 9], [7, 9]]  # 9 was worth most; 7 moves up
    assert tried[9:] == [[2, 5, 9], [0, 2, 9], [2, 7, 9], [1, 2, 9]]
    best = max(env.objective.scores.values(), key=lambda item: item[1].potential)
    assert pruned(best[0]) == [2, 7, 9]
    assert best[1].potential == 6.0


def test_greedy_ranks_anew_at_every_step(make_env: Callable[..., PruningEnv], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the units rank the other way round once an odd number of them is pruned."""
    effects = PlantedObjective.effects

    def turning(self: PlantedObjective, mask: KeepMask) -> dict[str, Tensor]:
        sign = -1 if mask.units_pruned % 2 else 1
        return {name: sign * values for name, values in effects(self, mask).items()}

    monkeypatch.setattr(PlantedObjective, "effects", turning)
    env = make_env(max_steps=3)
    greedy_search(env, 3 + 3 * 4, 0, ignore)  # 3 candidates a step
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried[1:] == [[5], [2], [9], [9, 11], [9, 10], [8, 9], [5, 9, 11], [2, 9, 11], [0, 9, 11]]
    assert env.reward_evaluations == 3 + 3 * 4  # two passes, nine masks, and a pass that nothing is left for


def test_greedy_takes_bulk_actions_among_its_candidates(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env(max_steps=3, bulk_fractions=(1 / 4,))  # 3 of 12 units
    greedy_search(env, 3 + 3 * 5, 0, ignore)
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried[1:5] == [[2, 5, 9], [5], [2], [9]]  # worth 4, -1, 2 and 3
    assert tried[5:9] == [[0, 1, 2, 5, 7, 9], [0, 2, 5, 9], [2, 5, 7, 9], [1, 2, 5, 9]]  # 3, 3, 5 and 3
    assert tried[9:] == [[0, 1, 2, 3, 5, 7, 9], [0, 2, 5, 7, 9], [1, 2, 5, 7, 9], [2, 3, 5, 7, 9]]


def test_greedy_ends_where_no_bulk_fits_any_more(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env(bulk_fractions=(5 / 12,))
    greedy_search(env, 1000, 0, ignore)
    assert max(mask.units_pruned for mask, _ in env.objective.scores.values()) == UNITS
    assert env.reward_evaluations < 1000


def test_greedy_ends_where_every_unit_is_pruned(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    greedy_search(env, 1000, 0, ignore)
    deepest = max(env.objective.scores.values(), key=lambda item: item[0].units_pruned)[0]
    assert deepest.units_pruned == UNITS
    # Every unit that is left at each step, and a pass at each but the first, whose pass is known.
    assert env.reward_evaluations == 3 + UNITS * (UNITS + 1) // 2 + UNITS - 1


def test_ranking_prunes_in_the_order_of_the_first_order_score(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    assert ranked_units(env) == list(PRIOR)
    one_shot_ranking(env, 1000, 0, ignore)
    tried = [pruned(mask) for mask, _ in env.objective.scores.values()]
    assert tried == [sorted(PRIOR[:count]) for count in range(UNITS + 1)]


@pytest.mark.parametrize("name", list(SEARCHES))
def test_searches_prune_whole_groups(make_env: Callable[..., PruningEnv], name: str) -> None:
    env = make_env(max_steps=3, pairs=4)
    SEARCHES[name](env, 40, 0, ignore)
    tried = [set(pruned(mask)) for mask, _ in env.objective.scores.values()]
    assert all(({2 * pair} <= units) == ({2 * pair + 1} <= units) for units in tried for pair in range(4))
    if name == "ranked":  # by the sums of first-order scores: 11 + 6, 5 + 12, 9 + 7, 4 + 8, then 10, 3, 2 and 1
        expected, seen = [set()], set[int]()
        for units in ((2, 3), (4, 5), (0, 1), (6, 7), (9,), (8,), (10,), (11,)):
            expected.append(seen := seen | set(units))
        assert tried == expected
    if name == "greedy":  # 11 candidates a step, those tied twice: {2, 3} gains 1, {9} 3, {11} 5, {6, 7} 0
        assert max(env.objective.scores.values(), key=lambda item: item[1].potential)[1].potential == 9.0
        assert {2, 3, 9, 11} in tried


def test_random_search_prunes_valid_units_only(make_env: Callable[..., PruningEnv]) -> None:
    env = make_env()
    steps: list[int] = []
    units_of = env.actions.units

    def watched(action: int, mask: KeepMask, effects: Tensor) -> list[int]:
        assert mask.keep[action]
        steps.append(mask.units_pruned)
        return units_of(action, mask, effects)

    env.actions.units = watched  # type: ignore[method-assign]
    random_search(env, 40, 0, ignore)
    assert steps[:12] == [0, 1, 2, 3] * 3


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
