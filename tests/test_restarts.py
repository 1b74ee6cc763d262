"""Episodes that begin along the best ones so far."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from agents.restarts import ReturnToBest

WORTH = (0.0, 2.0, -1.0, 4.0)
STEPS = 3


class Picks(gym.Env[np.ndarray, np.int64]):
    """Pick numbers; each is worth what `WORTH` says; `steps` picks make an episode. Shows what was picked."""

    action_space = spaces.Discrete(len(WORTH))

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.observation_space = spaces.Box(-1, 3, (steps,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.picked: list[int] = []
        self.options = options
        return self.observe(), {"picked": []}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.picked.append(int(action))
        return self.observe(), WORTH[int(action)], len(self.picked) == self.steps, False, {"picked": list(self.picked)}

    def observe(self) -> np.ndarray:
        return np.array(self.picked + [-1] * (self.steps - len(self.picked)), dtype=np.float32)


def play(env: gym.Env[Any, np.int64], *actions: int) -> list[tuple[float, bool, bool]]:
    """Whole-episode return, terminated and truncated after each action."""
    env.reset()
    assert env.unwrapped.picked == []  # type: ignore[attr-defined]
    steps = [env.step(np.int64(action)) for action in actions]
    return [(info["return"], terminated, truncated) for _, _, terminated, truncated, info in steps]


def test_a_sequence_ends_where_its_return_was_highest_and_never_ends_its_episode() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 1, 2, 3)  # returns 2, 1, 5: the last would end the episode
    assert list(env.best.values()) == [(2.0, (1,))]
    play(env, 1, 3, 0)
    assert list(env.best.values()) == [(6.0, (1, 3))]


def test_only_the_best_are_remembered_and_an_order_once() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=2, patience=9, seed=0)
    play(env, 2, 0, 0)  # never gains
    assert env.best == {}
    play(env, 1, 3, 0)
    play(env, 3, 1, 0)
    assert sorted(env.best.values()) == [(4.0, (3,)), (6.0, (1, 3))]


def test_episodes_begin_at_every_point_of_a_best_sequence() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
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
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 1, 3, 0)
    env.fraction = fraction
    along = sum(bool(env.reset()[1]["picked"]) for _ in range(600))
    assert along == pytest.approx(600 * fraction * 2 / 3, abs=45)  # a third of the replays has length 0


def test_options_reach_the_environment() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    env.reset(options={"a": 1})
    assert env.unwrapped.options == {"a": 1}  # type: ignore[attr-defined]


# --- patience and returns -------------------------------------------------------------------------------


def test_an_episode_is_truncated_when_its_best_return_has_not_risen_for_a_while() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=2, seed=0)
    # 3 is a new best; the next two steps, one without gain, are not.
    assert play(env, 1, 2, 1, 0, 0) == [
        (2.0, False, False), (1.0, False, False), (3.0, False, False), (3.0, False, False), (3.0, False, True),
    ]  # fmt: skip
    assert play(env, 2, 1, 2) == [(-1.0, False, False), (1.0, False, False), (0.0, False, False)]  # counted anew
    assert play(env, 0, 0)[-1] == (0.0, False, True)  # keeping everything is worth 0


@pytest.mark.parametrize("patience", [1, 3, 4])
def test_patience_counts_steps_in_a_row(patience: int) -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=patience, seed=0)
    truncated = [ended for _, _, ended in play(env, 3, 2, 2, 2, 2)]
    assert truncated == [step >= patience for step in range(5)]


def test_the_end_of_the_episode_may_come_together_with_the_end_of_patience() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=2, seed=0)
    assert play(env, 1, 0, 0)[-1] == (2.0, True, True)
    assert play(env, 1, 2, 1)[-1] == (3.0, True, False)


def test_what_was_replayed_counts_in_the_return_and_not_for_patience() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=2, seed=0)
    play(env, 1, 0, 0, 3)  # patience ends before the 3: only who goes on sees it
    assert list(env.best.values()) == [(6.0, (1, 0, 0, 3))]
    env.fraction, starts = 1.0, set[tuple[int, ...]]()
    while len(starts) < 5:
        _, info = env.reset()
        start = tuple(info["picked"])
        starts.add(start)
        gained = sum(WORTH[pick] for pick in start)
        steps = [env.step(np.int64(0)) for _ in range(2)]
        assert [step[2:4] for step in steps] == [(False, False), (False, True)], start
        assert [step[4]["return"] for step in steps] == [gained, gained]
        assert [step[1] for step in steps] == [0.0, 0.0]  # the rewards are those of the steps
    assert starts == {(), (1,), (1, 0), (1, 0, 0), (1, 0, 0, 3)}


def test_a_monitor_around_it_sees_the_steps_behind_the_start_and_passes_the_whole_return() -> None:
    restarts = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    play(restarts, 1, 3, 0)
    restarts.fraction, seen = 1.0, set[int]()
    env = Monitor(restarts)
    for _ in range(40):
        _, info = env.reset()
        replayed, ended = len(info["picked"]), False
        while not ended:
            *_, ended, _, info = env.step(np.int64(0))
        assert info["episode"]["l"] == STEPS - replayed
        assert info["episode"]["r"] == 0 and info["return"] == (0.0, 2.0, 6.0)[replayed]
        seen.add(replayed)
    assert seen == {0, 1, 2}
