"""Episodes that begin along the best ones so far."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from agents.restarts import ReturnToBest

WORTH = (0.0, 2.0, -1.0, 4.0)
STEPS = 3


class Picks(gym.Env[np.ndarray, np.int64]):
    """Pick numbers; each is worth what `WORTH` says; three picks make an episode. Shows what was picked."""

    observation_space = spaces.Box(-1, 3, (STEPS,), np.float32)
    action_space = spaces.Discrete(len(WORTH))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.picked: list[int] = []
        self.options = options
        return self.observe(), {"picked": []}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.picked.append(int(action))
        return self.observe(), WORTH[int(action)], len(self.picked) == STEPS, False, {"picked": list(self.picked)}

    def observe(self) -> np.ndarray:
        return np.array(self.picked + [-1] * (STEPS - len(self.picked)), dtype=np.float32)


def play(env: gym.Env[Any, np.int64], *actions: int) -> None:
    env.reset()
    assert env.unwrapped.picked == []  # type: ignore[attr-defined]
    for action in actions:
        env.step(np.int64(action))


def test_a_sequence_ends_where_its_return_was_highest_and_never_ends_its_episode() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, seed=0)
    play(env, 1, 2, 3)  # returns 2, 1, 5: the last would end the episode
    assert list(env.best.values()) == [(2.0, (1,))]
    play(env, 1, 3, 0)
    assert list(env.best.values()) == [(6.0, (1, 3))]


def test_only_the_best_are_remembered_and_an_order_once() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=2, seed=0)
    play(env, 2, 0, 0)  # never gains
    assert env.best == {}
    play(env, 1, 3, 0)
    play(env, 3, 1, 0)
    assert sorted(env.best.values()) == [(4.0, (3,)), (6.0, (1, 3))]


def test_episodes_begin_at_every_point_of_a_best_sequence() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, seed=0)
    play(env, 1, 3, 0)
    env.fraction = 1.0
    starts = []
    for _ in range(60):
        observation, info = env.reset()
        starts.append(tuple(info["picked"]))
        assert observation.tolist() == [*info["picked"], *[-1] * (STEPS - len(info["picked"]))]
    assert set(starts) == {(), (1,), (1, 3)}


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_the_fraction_is_kept(fraction: float) -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, seed=0)
    play(env, 1, 3, 0)
    env.fraction = fraction
    along = sum(bool(env.reset()[1]["picked"]) for _ in range(600))
    assert along == pytest.approx(600 * fraction * 2 / 3, abs=45)  # a third of the replays has length 0


def test_options_reach_the_environment() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, seed=0)
    env.reset(options={"a": 1})
    assert env.unwrapped.options == {"a": 1}  # type: ignore[attr-defined]
