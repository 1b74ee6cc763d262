"""Return, then explore: training episodes that begin part of the way along the best ones so far."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class ReturnToBest(gym.Wrapper[Any, np.int64, Any, np.int64]):
    """Begin a fraction of the episodes at a random point of one of the best action sequences (Ecoffet et al. 2021).

    The sequence is replayed, so the environment has to be deterministic; where it answers masks from memory, that costs
    no reward evaluation. A sequence ends where its return was highest, and never ends its episode.
    """

    def __init__(self, env: gym.Env[Any, np.int64], fraction: float, elites: int, seed: int) -> None:
        super().__init__(env)
        self.fraction, self.elites = fraction, elites
        self.generator = np.random.default_rng(seed)
        self.best: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        """return and actions of the best sequences, one for each set of actions"""
        self._actions: tuple[int, ...] = ()
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and perhaps replay; `seed` and `options` go to the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._actions, self._return = (), 0.0
        if self.best and self.generator.random() < self.fraction:
            _, actions = list(self.best.values())[self.generator.integers(len(self.best))]
            for action in actions[: self.generator.integers(len(actions) + 1)]:
                observation, _, _, _, info = self.step(np.int64(action))
        return observation, info

    def step(self, action: np.int64) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and remember the sequence where it is among the best."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._actions, self._return = (*self._actions, int(action)), self._return + float(reward)
        if not (terminated or truncated):
            self._remember()
        return observation, reward, terminated, truncated, info

    def _remember(self) -> None:
        key = frozenset(self._actions)
        if self._return > 0 and (key not in self.best or self._return > self.best[key][0]):
            self.best[key] = (self._return, self._actions)
            if len(self.best) > self.elites:
                del self.best[min(self.best, key=lambda other: self.best[other][0])]
