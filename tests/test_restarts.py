"""Episodes that begin along the best ones so far, and do not repeat what earned nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from agents.restarts import ReturnToBest

WORTH = (0.0, 2.0, -1.0, 4.0)
STEPS = 3


class Picks(gym.Env[dict[str, np.ndarray], np.int64]):
    """Pick numbers; each is worth what `WORTH` says; `steps` picks make an episode.

    1, 2 and 3 are kept until they are picked, and valid as long; 0 changes nothing and always is. What is invalid may
    be picked all the same.
    """

    action_space = spaces.Discrete(len(WORTH))

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        kept, left = spaces.MultiBinary(len(WORTH) - 1), spaces.MultiBinary(len(WORTH))
        self.observation_space = spaces.Dict({"kept": kept, "action_mask": left})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.picked: list[int] = []
        self.options = options
        return self.observe(), {"picked": []}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.picked.append(int(action))
        return self.observe(), WORTH[int(action)], len(self.picked) == self.steps, False, {"picked": list(self.picked)}

    def observe(self) -> dict[str, np.ndarray]:
        kept = kept_after(self.picked)
        return {"kept": np.array(kept, dtype=np.int8), "action_mask": np.array([1, *kept], dtype=np.int8)}


def kept_after(picked: list[int]) -> list[int]:
    return [int(number not in picked) for number in (1, 2, 3)]


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


def test_steps_that_brought_nothing_end_no_sequence() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=9, patience=9, seed=0)
    play(env, 1, 2, 0, 3, 0)  # returns 2, 1, 1, 5, 5
    assert sorted(env.best.values()) == [(2.0, (1,)), (5.0, (1, 2, 0, 3))]


def test_only_the_best_are_remembered_and_an_order_once() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=2, patience=9, seed=0)
    play(env, 2, 0, 0)  # never gains
    assert env.best == {}
    play(env, 1, 3, 0)
    play(env, 3, 1, 0)
    assert sorted(env.best.values()) == [(4.0, (3,)), (6.0, (1, 3))]


def test_of_the_ways_to_one_set_the_shortest_is_remembered() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=9, patience=9, seed=0)
    for actions in ((1, 0, 3), (3, 1), (3, 0, 0, 1)):
        play(env, *actions)
    assert sorted(env.best.values()) == [(2.0, (1,)), (4.0, (3,)), (6.0, (3, 1))]


def test_episodes_begin_anywhere_along_a_best_sequence() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 1, 2, 0, 3)
    env.fraction = 1.0
    starts = Counter[tuple[int, ...]]()
    for _ in range(3200):
        observation, info = env.reset()
        starts[tuple(info["picked"])] += 1
        assert observation["kept"].tolist() == kept_after(info["picked"])
    expected = {(1, 2, 0, 3): 800, (1, 2, 0): 800, (1, 2): 800, (1,): 800}
    assert starts == pytest.approx(expected, abs=75)


def test_episodes_begin_along_any_of_the_best_sequences() -> None:
    env = ReturnToBest(Picks(2), fraction=0.0, elites=2, patience=9, seed=0)
    play(env, 1, 0)
    play(env, 3, 0)
    env.fraction = 1.0
    starts = Counter(tuple(env.reset()[1]["picked"]) for _ in range(1600))
    assert starts == pytest.approx({(1,): 800, (3,): 800}, abs=75)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_the_fraction_is_kept(fraction: float) -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 1, 3, 0)
    env.fraction = fraction
    along = sum(bool(env.reset()[1]["picked"]) for _ in range(1600))
    assert along == pytest.approx(1600 * fraction, abs=60)


def test_options_reach_the_environment() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    env.reset(options={"a": 1})
    assert env.unwrapped.options == {"a": 1}  # type: ignore[attr-defined]


# --- what earned nothing --------------------------------------------------------------------------------


def left(env: gym.Env[Any, np.int64], *actions: int) -> list[list[int]]:
    """The actions that an episode shows as valid, at its start and after each of `actions`."""
    seen = [env.reset()[0], *(env.step(np.int64(action))[0] for action in actions)]
    assert all(env.observation_space.contains(observation) for observation in seen)
    return [np.flatnonzero(observation["action_mask"]).tolist() for observation in seen]


def test_an_action_that_earned_nothing_is_invalid_where_it_was_taken_and_only_there() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    assert left(env, 2) == [[0, 1, 2, 3], [0, 1, 3]]  # 2 costs 1
    assert left(env, 1, 0, 3) == [[0, 1, 3], [0, 2, 3], [2, 3], [0, 2]]  # 0 is worth 0; it is left where 3 went too
    assert left(env, 3, 1, 2) == [[0, 3], [0, 1, 2], [0, 2], [0]]  # 2 has not been tried behind 3
    assert left(env, 1, 3) == [[0], [2, 3], [0]]  # in another order, the same is kept
    assert left(ReturnToBest(Picks(9), 0.0, 1, 9, 0)) == [[0, 1, 2, 3]]


def test_every_episode_begins_as_none_has_but_for_those_along_the_best() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    starts = [left(env, action, 1)[0] for action in (3, 1, 2, 0)]
    assert starts == [[0, 1, 2, 3], [0, 1, 2], [0, 2], [0]]
    assert left(env, 3)[0] == [1, 3], "where all have been begun with, those that gained are there again"
    env.fraction = 1.0
    seen = {tuple(env.reset()[1]["picked"]) for _ in range(30)}
    assert seen == {(3,), (3, 1)}, "what is replayed is not held against it"


@pytest.mark.parametrize(("name", "same"), [("effects", False), ("progress", True)])
def test_places_that_look_different_are_different_but_for_the_progress(name: str, same: bool) -> None:
    class Counting(Picks):
        def observe(self) -> dict[str, np.ndarray]:
            return {**super().observe(), name: np.array([len(self.picked)], dtype=np.float32)}

    env = ReturnToBest(Counting(9), fraction=0.0, elites=1, patience=9, seed=0)
    env.reset()
    assert [np.flatnonzero(env.step(np.int64(0))[0]["action_mask"]).tolist() for _ in range(2)] == [
        [1, 2, 3] if same else [0, 1, 2, 3]
    ] * 2


def test_what_is_valid_on_the_way_makes_no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was last taken is invalid, as undoing is; 0 leads back to where it is taken."""
    env = Picks(9)
    seen = env.observe

    def observe() -> dict[str, np.ndarray]:
        observation = seen()
        if env.picked:
            observation["action_mask"][env.picked[-1]] = 0
        return observation

    monkeypatch.setattr(env, "observe", observe)
    wrapped = ReturnToBest(env, fraction=0.0, elites=1, patience=9, seed=0)
    assert left(wrapped, 3, 2) == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    assert left(wrapped, 1, 0, 0) == [[0, 1, 2], [0, 2, 3], [2, 3], [2, 3]]
    assert left(wrapped, 1) == [[0, 2], [2, 3]], "0 earned nothing behind 1, where 1 or 0 came last"


def test_actions_that_gained_stay_valid() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    for _ in range(3):
        assert left(env, 3, 1)[1:] == [[0, 1, 2], [0, 2]]


def test_where_every_action_earned_nothing_the_valid_ones_come_back() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    assert left(env, 1, 3, 0)[-1] == [2]
    assert left(env, 1, 3, 2)[2:] == [[2], [0]]
    for _ in range(2):
        assert left(env, 1, 3, 0)[2:] == [[0, 2], [0, 2]]  # neither 1 nor 3, which are invalid there
    assert left(env, 1)[-1] == [0, 2, 3]


def starts(env: ReturnToBest) -> dict[tuple[int, ...], list[int]]:
    """What episodes that begin along the best sequences show as valid, by what they replayed."""
    env.fraction, shown = 1.0, dict[tuple[int, ...], list[int]]()
    for _ in range(40):
        observation, info = env.reset()
        shown[tuple(info["picked"])] = np.flatnonzero(observation["action_mask"]).tolist()
    env.fraction = 0.0
    return shown


def test_a_start_along_a_best_sequence_goes_on_as_none_has() -> None:
    env = ReturnToBest(Picks(), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 1, 3, 0)
    assert starts(env) == {(1,): [0, 2], (1, 3): [2]}  # behind 1, the best sequence itself took 3, which gained
    play(env, 1, 2, 0)
    assert starts(env) == {(1,): [0], (1, 3): [2]}
    play(env, 1, 0)
    assert starts(env) == {(1,): [3], (1, 3): [2]}, "where every action was taken, those that gained come back"


def test_only_the_first_action_behind_a_start_has_to_be_new() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    play(env, 3, 1, 0)
    assert left(env, 1, 0) == [[0, 1, 2], [0, 2, 3], [2, 3]]
    assert left(env, 0, 3) == [[0, 2], [1, 2, 3], [0, 1, 2]]  # 1 gained behind 3


def test_the_last_action_of_an_episode_counts_too() -> None:
    env = ReturnToBest(Picks(1), fraction=0.0, elites=1, patience=9, seed=0)
    assert [left(env, action)[0] for action in (2, 0, 1, 3)] == [[0, 1, 2, 3], [0, 1, 3], [1, 3], [3]]


def test_with_a_start_of_ones_own_nothing_is_replayed_or_remembered() -> None:
    env = ReturnToBest(Picks(9), fraction=1.0, elites=9, patience=9, seed=0)
    for _ in range(9):
        _, info = env.reset(options={"from": "elsewhere"})
        assert info["picked"] == []
        env.step(np.int64(1))
    assert env.best == {}
    env.reset()
    env.step(np.int64(1))
    assert [actions for _, actions in env.best.values()] == [(1,)]
    assert env.reset()[1]["picked"] == [1] and env.reset(options={"from": "elsewhere"})[1]["picked"] == []


def test_action_masks_are_those_of_the_observation() -> None:
    env = ReturnToBest(Picks(9), fraction=0.0, elites=1, patience=9, seed=0)
    for action in (1, 0, 2):
        observation, _ = env.reset()
        assert env.action_masks().tolist() == observation["action_mask"].astype(bool).tolist()
        observation = env.step(np.int64(action))[0]
        assert env.action_masks().tolist() == observation["action_mask"].astype(bool).tolist()
    assert env.reset()[0]["action_mask"].tolist() == [0, 0, 0, 1], "what was taken is no longer shown"


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
    for _ in range(40):
        _, info = env.reset()
        start = tuple(info["picked"])
        starts.add(start)
        gained = sum(WORTH[pick] for pick in start)
        steps = [env.step(np.int64(0)) for _ in range(2)]
        assert [step[2:4] for step in steps] == [(False, False), (False, True)], start
        assert [step[4]["return"] for step in steps] == [gained, gained]
        assert [step[1] for step in steps] == [0.0, 0.0]  # the rewards are those of the steps
    assert starts == {(1,), (1, 0), (1, 0, 0), (1, 0, 0, 3)}


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
    assert seen == {1, 2}
