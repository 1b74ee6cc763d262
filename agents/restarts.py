"""Return, then explore: training episodes that begin along the best ones so far, end in time, and repeat no mistake."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

DERIVED = {"progress", "action_mask"}
"""parts of an observation that depend on the way to a place, and not on the place alone"""
ROUNDING = 1e-9
"""of returns: along two ways to one mask they are sums of other rewards"""


class ReturnToBest(gym.Wrapper[Any, np.int64, Any, np.int64]):
    """Begin a fraction of the episodes along one of the best action sequences (Ecoffet et al. 2021).

    Anywhere along it, so that its early steps, which decide most, are followed otherwise as often as the last: every
    episode's first action of its own is one that none has taken there. The sequence is replayed, so the environment has
    to be deterministic; where it answers masks from memory, that costs no reward evaluation. A sequence is what led to
    a new best return of its episode, without ending it. An episode is truncated when `patience` steps
    in a row have not raised its best return: what is left of the budget is better spent elsewhere. For the same reason
    an action that earned nothing (stopping, too) is invalid where it was taken, whatever the progress by then, until no
    other is left: a policy that has settled would never use up its budget.
    """

    def __init__(self, env: gym.Env[Any, np.int64], fraction: float, elites: int, patience: int, seed: int) -> None:
        super().__init__(env)
        self.fraction, self.elites, self.patience = fraction, elites, patience
        self.generator = np.random.default_rng(seed)
        self.best: dict[bytes, tuple[float, tuple[int, ...]]] = {}
        """return and actions of the best sequences, the shortest to each set of kept units"""
        self.taken: dict[bytes, set[int]] = {}
        """by what an observation shows of a place, the actions that have been taken there"""
        self.fruitless: dict[bytes, set[int]] = {}
        """those of them that earned nothing"""
        self._place = b""
        self._valid = self._shown = np.zeros(0)
        self._actions: tuple[int, ...] = ()
        self._return = self._highest = 0.0
        self._idle = 0
        self._usual = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and perhaps replay; `seed` and `options` go to the environment.

        With `options`, which ask for a start of their own, nothing is replayed, and no sequence remembered.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._usual = not options
        self._actions, self._return, self._highest, self._idle = (), 0.0, 0.0, 0
        self._arrive(observation)
        if self._usual and self.best and self.generator.random() < self.fraction:
            _, actions = list(self.best.values())[self.generator.integers(len(self.best))]
            for action in actions[: self.generator.integers(len(actions)) + 1]:
                observation, _, _, _, info = self._step(np.int64(action))
            self._highest, self._idle = self._return, 0
        return self._without(observation, self.taken, self.fruitless), info

    def step(self, action: np.int64) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and remember the sequence where it is among the best; `info["return"]` counts what was replayed too."""
        observation, *outcome = self._step(action)
        return self._without(observation, self.fruitless), *outcome

    def _step(self, action: np.int64) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        place, valid = self._place, action in self._valid.nonzero()[0]
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.taken.setdefault(place, set()).add(int(action))
        if float(reward) <= 0 and valid:
            self.fruitless.setdefault(place, set()).add(int(action))
        self._arrive(observation)
        self._actions, self._return = (*self._actions, int(action)), self._return + float(reward)
        self._idle += 1
        if self._return > self._highest + ROUNDING:
            self._highest, self._idle = self._return, 0
            if self._usual and not (terminated or truncated):
                self._remember(observation["kept"].tobytes())
        info = {**info, "return": self._return}
        return observation, reward, terminated, truncated or self._idle >= self.patience, info

    def _arrive(self, observation: dict[str, np.ndarray]) -> None:
        self._place = b"".join(value.tobytes() for name, value in observation.items() if name not in DERIVED)
        self._valid = observation["action_mask"]

    def action_masks(self) -> np.ndarray:
        """Which actions the last observation shows as valid, bool: what sb3-contrib's MaskablePPO asks for."""
        return self._shown.astype(bool)

    def _without(self, observation: dict[str, np.ndarray], *spent: dict[bytes, set[int]]) -> dict[str, np.ndarray]:
        """The observation without this place's actions in the first of `spent` that leaves any; else as it is."""
        self._shown = self._valid
        for actions in spent:
            left = self._valid.copy()
            left[list(actions.get(self._place, ()))] = 0
            if left.any():
                self._shown = left
                break
        return {**observation, "action_mask": self._shown}

    def _remember(self, kept: bytes) -> None:
        shorter = kept not in self.best or len(self._actions) < len(self.best[kept][1])
        if self._return > 0 and shorter:
            self.best[kept] = (self._return, self._actions)
            if len(self.best) > self.elites:
                del self.best[min(self.best, key=lambda other: self.best[other][0])]
