"""What actions do to the mask, and the effects that guide them, by hand."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from by_hand import known_views
from tiny_env import (
    HALVES,
    REWARD,
    STOP,
    TinyNet,
    Unlearned,
    make_env,
    potential_by_hand,
    pruned,
    tiny_clues,
    tiny_data,
)
from torch import nn

from envs.pruning import LIMIT, PruningEnv
from envs.rewards import Objective
from onp.clues import Clues
from onp.config import RewardConfig
from onp.data import DefenceData
from onp.graph import EFFECTS
from onp.masks import KeepMask


@pytest.fixture
def data() -> DefenceData:
    return tiny_data()


@pytest.fixture
def clues() -> Clues:
    return tiny_clues()


# --- actions --------------------------------------------------------------------------------------------


def test_an_invalid_action_is_a_counted_no_op(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    env.reset()
    _, _, _, _, first = env.step(8)
    observation, reward, terminated, truncated, info = env.step(8)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["invalid_actions"] == 1
    assert info["units_pruned"] == 1
    assert info["reward_evaluations"] == first["reward_evaluations"]
    assert observation["progress"][0] == pytest.approx(1 - 2 / 5)
    *_, info = env.step(np.int64(8))
    assert info["invalid_actions"] == 2
    _, info = env.reset()
    assert info["invalid_actions"] == 0


def test_stop_ends_the_episode_without_reward(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    env.reset()
    env.step(0)
    observation, reward, terminated, truncated, info = env.step(env.actions.stop)
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info["invalid_actions"] == 0
    assert observation["kept"].tolist() == [0] + 22 * [1]


def test_the_step_limit_terminates_and_counts_no_ops(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, max_steps=3)
    env.reset()
    ends = [env.step(action)[2:4] for action in (6, 6, 7)]
    assert ends == [(False, False), (False, False), (True, False)]
    assert env._observation()["progress"][0] == 0


def test_groups_are_pruned_together(data: DefenceData, clues: Clues) -> None:
    single, grouped = make_env(data, clues), make_env(data, clues, prune_groups=True)
    for env, units in ((single, [4]), (grouped, [1, 4])):
        env.reset()
        observation, reward, _, _, info = env.step(4)
        assert np.flatnonzero(observation["kept"] == 0).tolist() == units
        assert info["units_pruned"] == len(units)
        mask = KeepMask.all_kept(env.index)
        gained = potential_by_hand(data, clues, mask.without(units)) - potential_by_hand(data, clues, mask)
        assert reward == pytest.approx(gained, abs=1e-5)
    _, reward, _, _, info = grouped.step(1)
    assert (reward, info["invalid_actions"]) == (0.0, 1)


def test_a_pruned_unit_can_be_restored_but_not_at_once(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    env.reset()
    env.step(4)
    observation, *_ = env.step(9)
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [9]
    both, one = (env.objective.all_kept.without(units) for units in ([4, 9], [9]))
    observation, reward, _, _, info = env.step(4)
    assert info["keep_mask"] == one and info["units_pruned"] == 1 and info["invalid_actions"] == 0
    assert reward == pytest.approx(potential_by_hand(data, clues, one) - potential_by_hand(data, clues, both), abs=1e-5)
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [4]
    assert np.array_equal(env.action_masks(), observation["action_mask"].astype(bool))
    assert env.step(4)[4]["invalid_actions"] == 1
    assert env.step(9)[4]["units_pruned"] == 0


def test_action_mask_shows_what_is_valid(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    observation, _ = env.reset()
    assert observation["action_mask"].tolist() == 24 * [1]
    observation, *_ = env.step(5)
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [5]
    assert env.observation_space.contains(observation)


def test_after_leaves_masks_and_the_episode_alone(data: DefenceData, clues: Clues) -> None:
    for settings, expected in (({}, [4, 9]), ({"prune_groups": True}, [1, 4, 9])):
        env = make_env(data, clues, **settings)
        env.reset()
        given = env.objective.all_kept.without([9])
        assert pruned(env.actions.after(4, given, env.effects["score"])) == expected
        assert given == env.objective.all_kept.without([9])
        assert env.mask == env.objective.all_kept


# --- bulk actions ---------------------------------------------------------------------------------------


def best_by_hand(env: PruningEnv, mask: KeepMask, best: KeepMask, units: range, count: int) -> list[int]:
    """The units of a layer that `mask` keeps, by the effects under `best`, computed anew; the best `count`."""
    objective = Objective(TinyNet(), env.objective.clues, env.index, env.objective.data, REWARD)
    effects = objective.effects(best)["score"].tolist()
    return sorted((unit for unit in units if mask.keep[unit]), key=lambda unit: -effects[unit])[:count]


def test_bulk_actions_prune_the_best_units_of_a_layer_by_the_best_mask_so_far(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES)
    assert env.action_space == gym.spaces.Discrete(29)
    assert env.actions.stop == STOP
    observation, start = env.reset()
    mask = best = KeepMask.all_kept(env.index)
    layers = {24: (range(3, 6), 2), 25: (range(6, 18), 4), 27: (range(18, 23), 2)}
    for number, action in enumerate((25, 27, 25, 24), 1):
        chosen = best_by_hand(env, mask, best, *layers[action])
        effects = observation["effects"]
        assert effects.shape == (28,)
        assert effects[action] == pytest.approx(sum(float(effects[unit]) for unit in chosen), abs=1e-5)
        mask = mask.without(chosen)
        before = env.score.potential
        observation, reward, terminated, truncated, info = env.step(action)
        assert info["keep_mask"] == mask and info["keep_mask"].order == mask.order
        assert info["units_pruned"] == mask.units_pruned == (4, 6, 10, 12)[number - 1]
        assert reward == pytest.approx(potential_by_hand(data, clues, mask) - before, abs=1e-5)
        assert info["potential"] - start["potential"] == pytest.approx(
            potential_by_hand(data, clues, mask) - potential_by_hand(data, clues, env.objective.all_kept), abs=1e-5
        )
        assert (terminated, truncated, info["invalid_actions"]) == (False, False, 0)
        assert observation["progress"][0] == pytest.approx(1 - number / 5)  # one step, however many units
        best = max(best, mask, key=lambda one: potential_by_hand(data, clues, one))
        assert np.flatnonzero(observation["kept"] == 0).tolist() == pruned(mask)
        assert env.observation_space.contains(observation)


def test_a_bulk_of_more_units_than_are_left_is_a_counted_no_op(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES)
    observation, _ = env.reset()
    assert observation["action_mask"].tolist() == 29 * [1]
    observation, *_ = env.step(26)  # 6 of 12
    assert observation["action_mask"][23:].tolist() == [1, 1, 1, 1, 1, 1]  # 6 are left
    observation, _, _, _, first = env.step(25)  # 2 are left
    assert observation["action_mask"][23:].tolist() == [1, 1, 0, 0, 1, 1]
    for count, action in enumerate((25, 26), 1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert info["invalid_actions"] == count
        assert info["units_pruned"] == 10 and info["keep_mask"] == first["keep_mask"]
        assert info["reward_evaluations"] == first["reward_evaluations"]
    assert env.reset()[1]["invalid_actions"] == 0


def test_a_bulk_takes_the_last_units_of_a_layer(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES)
    env.reset()
    env.step(1)
    observation, _, _, _, info = env.step(23)
    assert pruned(info["keep_mask"]) == [0, 1, 2]
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [23]  # single units can be restored
    observation, reward, terminated, _, info = env.step(STOP)
    assert (reward, terminated, info["invalid_actions"]) == (0.0, True, 0)


def test_a_bulk_takes_whole_groups_where_they_are_pruned_together(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES, prune_groups=True)
    env.reset()
    one, two = best_by_hand(env, env.mask, env.objective.all_kept, range(3), 2)
    observation, reward, _, _, info = env.step(23)
    assert pruned(info["keep_mask"]) == sorted([one, one + 3, two, two + 3])  # the branch is tied to the stem
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [23, 24]
    gained = potential_by_hand(data, clues, env.mask) - potential_by_hand(data, clues, env.objective.all_kept)
    assert reward == pytest.approx(gained, abs=1e-5)


def test_the_graph_knows_the_bulk_actions(data: DefenceData, clues: Clues) -> None:
    graph = make_env(data, clues, bulk_fractions=HALVES).graph
    assert graph.bulk_layer.tolist() == [0, 1, 2, 2, 3] and graph.bulk_layer.dtype == torch.int64
    assert graph.bulk_count.tolist() == [2.0, 2.0, 4.0, 6.0, 2.0] and graph.bulk_count.dtype == torch.float32
    none = make_env(data, clues, bulk_fractions=()).graph
    assert none.bulk_layer.shape == none.bulk_count.shape == (0,)


# --- effects --------------------------------------------------------------------------------------------


def test_observed_effects_are_those_of_the_best_mask_so_far(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    observation, _ = env.reset()
    assert set(env.effects) == set(EFFECTS)
    assert np.array_equal(observation["effects"], env.effects["score"].numpy())
    mask = best = env.objective.all_kept
    order, rose = observation["effects"].argsort(), set()
    for unit in (int(order[-1]), int(order[0]), 9, 3):
        observation, *_ = env.step(unit)
        mask = mask.without([unit])
        before, best = best, max(best, mask, key=lambda one: potential_by_hand(data, clues, one))
        rose.add(best != before)
        now = Objective(TinyNet(), clues, env.index, data, REWARD).effects(best)["score"]  # nothing memoised
        assert observation["effects"].dtype == np.float32 and observation["effects"].shape == (len(env.index),)
        assert np.array_equal(observation["effects"], torch.where(mask.keep == best.keep, now, -now).numpy())
        assert env.observation_space.contains(observation)
    assert rose == {True, False}
    observation, _ = env.reset()
    assert np.array_equal(observation["effects"], env.effects["score"].numpy())


def test_effects_of_all_kept_by_hand(data: DefenceData, clues: Clues) -> None:
    """Each unit's gates shrunk a little, in double precision; the clean loss is that of cropped and flipped images."""
    env, eps = make_env(data, clues), 1e-5
    views = data.normalise(known_views(TinyNet(), data)).double()

    def loss(model: nn.Module, name: str, axis: int, unit: int, factor: float) -> float:
        model = copy.deepcopy(model).double()
        with torch.no_grad():
            model.get_parameter(name).select(axis, unit).mul_(factor)
            inputs = data.inputs.double() if isinstance(model, Unlearned) else views
            return float(nn.functional.cross_entropy(model(inputs), data.labels))

    for layer in env.index:
        for unit in range(layer.size):
            for effect, model in (("clean_loss", TinyNet()), ("unlearning", Unlearned(seed=5))):
                slope = sum(
                    (loss(model, *gate, unit, 1 - eps) - loss(model, *gate, unit, 1 + eps)) / (2 * eps)
                    for gate in layer.gates
                )
                if effect == "unlearning":
                    with torch.no_grad():
                        worst = float(nn.functional.cross_entropy(clues.unlearned(data.inputs), data.labels))
                    slope *= -0.55 * REWARD.unlearning / worst
                found = float(env.effects[effect][layer.offset + unit])
                assert found == pytest.approx(slope, abs=1e-4, rel=1e-3), (effect, layer.name, unit)
    assert bool((env.effects["clean_fidelity"] <= 0).all())  # it is at its maximum: any unit can only cost
    assert float(env.effects["clean_fidelity"].min()) < -1e-2


def test_observations_stay_in_their_finite_space(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, reward=RewardConfig(unlearning=1e12))
    boxes = [space for space in env.observation_space.values() if isinstance(space, gym.spaces.Box)]  # type: ignore[attr-defined]
    assert len(boxes) == 2
    assert all(np.isfinite(box.low).all() and np.isfinite(box.high).all() for box in boxes)
    observation, _ = env.reset()
    assert float(np.abs(observation["effects"]).max()) == LIMIT
    for unit in (0, 9, 20):
        assert env.observation_space.contains(observation)
        observation, *_ = env.step(unit)
    assert abs(float(observation["progress"][1])) == LIMIT
