"""PPO has to learn: a toy whose optimum is known, and where neither chance nor the prior finds it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.ppo import build_agent, roll_out, train_agent
from envs import pruning
from envs.pruning import PruningEnv
from envs.rewards import PLACES, TERMS, Objective, Score
from onp.clues import Clues
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.masks import KeepMask
from onp.trigger_recovery import RecoveredTrigger

UNITS, STEPS, BUDGET = 32, 8, 1500
BAD = frozenset({3, 8, 13, 17, 22, 29})


class PlantedObjective(Objective):
    """Pruning a bad unit gains 1, pruning a good one costs 1; first-order effects, and so the prior, tell nothing."""

    def effects(self, mask: KeepMask) -> dict[str, Tensor]:
        if mask.key not in self._effects:
            self.evaluations += 1
            self._effects[mask.key] = {name: torch.zeros(len(self.index)) for name in ("score", *PLACES)}
        return self._effects[mask.key]

    def score(self, mask: KeepMask) -> Score:
        if mask.key not in self.scores:
            self.evaluations += 1
            pruned = set((~mask.keep).nonzero().flatten().tolist())
            worth = float(len(pruned & BAD) - len(pruned - BAD))
            self.scores[mask.key] = (mask, Score(worth, dict.fromkeys(TERMS, worth)))
        return self.scores[mask.key][1]


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> PruningEnv:
    """32 hidden neurons, 6 of them bad: their weights are larger, which shows only noisily in the node features."""
    monkeypatch.setattr(pruning, "Objective", PlantedObjective)
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        net[1].weight[sorted(BAD)] *= 1.6
    data = DefenceData(torch.rand((12, 1, 4, 4), generator=generator), torch.arange(12) % 3, 3)
    blank = RecoveredTrigger(0, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), (1.0, 2.0, 2.0))
    return PruningEnv(net, data, EnvConfig(max_steps=STEPS, bulk_fractions=()), Clues(copy.deepcopy(net), blank))


def random_return(env: PruningEnv, generator: np.random.Generator) -> float:
    observation, _ = env.reset()
    done, total = False, 0.0
    while not done:
        action = generator.choice(np.flatnonzero(observation["action_mask"]))
        observation, reward, done, _, _ = env.step(action)
        total += reward
    return total


def test_the_toy_is_no_giveaway(env: PruningEnv) -> None:
    graph = env.graph
    observation, _ = env.reset()
    assert bool((observation["effects"] == 0).all())
    assert bool((graph.x[:, graph.feature_names.index("effect_score")] == 0).all())
    for number, name in enumerate(graph.feature_names):
        for column in (graph.x[:, number], -graph.x[:, number]):
            if column.unique().numel() > 1:
                assert set(column.topk(len(BAD)).indices.tolist()) != BAD, f"{name} alone gives the bad units away"
    generator = np.random.default_rng(0)
    returns = [random_return(env, generator) for _ in range(100)]
    assert np.mean(returns) < 0.5 * len(BAD) and max(returns) < 0.5 * len(BAD)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_what_no_prior_knows(env: PruningEnv, seed: int) -> None:
    # 4500 steps of plain PPO: restarts and barred mistakes find good masks without any learning.
    config = AgentConfig(steps_per_evaluation=3, restart_fraction=0)
    agent = build_agent(env, config, seed)
    curve = train_agent(agent, config, BUDGET, lambda used, budget: None)
    assert np.mean(curve.returns[:30]) < 0.5 * len(BAD)
    assert np.mean(curve.returns[-50:]) > np.mean(curve.returns[:50]) + 0.4 * len(BAD)
    assert np.mean(curve.returns[-50:]) >= 2 / 3 * len(BAD)
    assert roll_out(agent, env) >= len(BAD) - 1  # the last unit depends on how a processor rounds
    assert env.reward_evaluations <= BUDGET + 1
