"""Searches over the same environment, scores and budget as the agent: what RL has to beat.

Each takes an environment that has used part of its budget for the sensitivity passes, and scores masks until the
budget is used up or nothing is left to try. The masks scored stay with the environment's objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from envs.pruning import PruningEnv

Progress = Callable[[int, int], None]


def ranked_units(env: PruningEnv) -> list[int]:
    """All units, the best first-order score first."""
    totals = env.actions.totals(env.objective.all_kept, env.effects["score"])[: len(env.index)]
    return totals.argsort(descending=True, stable=True).tolist()


def one_shot_ranking(env: PruningEnv, budget: int, seed: int, progress: Progress) -> None:
    """Prune in the order of one sensitivity pass; every prefix is scored."""
    mask = env.objective.all_kept
    for unit in ranked_units(env):
        if env.reward_evaluations >= budget:
            break
        if mask.keep[unit]:  # not gone with its group
            mask = env.actions.after(unit, mask, env.effects["score"])
            env.objective.score(mask)
            progress(env.reward_evaluations, budget)


def greedy_search(env: PruningEnv, budget: int, seed: int, progress: Progress) -> None:
    """Step by step take the action that raises the potential most, among those with the best estimates.

    So many are tried per step that the budget lasts for `max_steps` steps.
    """
    width = max(1, (budget - env.reward_evaluations) // env.config.max_steps - 1)  # a step costs a sensitivity pass too
    mask = env.objective.all_kept
    while env.reward_evaluations < budget and bool(mask.keep.any()):
        effects = env.objective.effects(mask)["score"]
        totals, valid = env.actions.totals(mask, effects), env.actions.valid(mask)[:-1]
        valid[: len(mask.keep)] &= mask.keep
        order = totals.masked_fill(~valid, -torch.inf).argsort(descending=True, stable=True)[: int(valid.sum())]
        trials = [env.actions.after(action, mask, effects) for action in order[:width].tolist()]
        for trial in trials[: budget - env.reward_evaluations]:
            env.objective.score(trial)
            progress(env.reward_evaluations, budget)
        scored = [trial for trial in trials if trial.key in env.objective.scores]
        mask = max(scored, key=lambda trial: env.objective.score(trial).potential, default=mask)


def random_search(env: PruningEnv, budget: int, seed: int, progress: Progress) -> None:
    """Episodes of uniformly random valid units."""
    generator = np.random.default_rng(seed)
    idle = 0  # episodes in a row that scored nothing new: of a tiny network every mask has been seen
    while env.reward_evaluations < budget and idle < 100:
        before, mask = env.reward_evaluations, env.objective.all_kept
        for _ in range(env.config.max_steps):
            if env.reward_evaluations >= budget or mask.units_pruned == len(env.index):
                break
            unit = int(generator.choice(mask.keep.nonzero().flatten().numpy()))
            mask = env.actions.after(unit, mask, env.effects["score"])
            env.objective.score(mask)
            progress(env.reward_evaluations, budget)
        idle = idle + 1 if env.reward_evaluations == before else 0


SEARCHES: dict[str, Callable[[PruningEnv, int, int, Progress], None]] = {
    "random": random_search,
    "ranked": one_shot_ranking,
    "greedy": greedy_search,
}
"""searches by the name of their row: (environment, budget, seed, progress)"""
