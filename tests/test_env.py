"""The environment's contract: Gymnasium's and SB3's checkers, and rewards recomputed by hand."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from by_hand import known_views
from gymnasium.utils import env_checker
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

import envs  # noqa: F401 (registers the environment)
from envs.pruning import LIMIT, PruningEnv
from envs.rewards import TERMS, Objective
from onp.clues import Clues, find_clues
from onp.config import EnvConfig, RewardConfig, TriggerRecoveryConfig, UnlearnConfig, WarpRecoveryConfig
from onp.data import DefenceData, Normalisation
from onp.graph import EFFECTS
from onp.masks import KeepMask, apply_mask
from onp.trigger_recovery import RecoveredTrigger

REWARD = RewardConfig(clean_accuracy=0.7, clean_fidelity=2.0, unlearning=0.5, trigger_resistance=0.4)
HALVES = (1 / 3, 1 / 2)
"""of a `TinyNet`: 2 units of layers 0 and 1 (actions 23 and 24), 4 and 6 of layer 2 (25, 26), 2 of layer 3 (27)"""
STOP = 28


class TinyNet(nn.Module):
    """Units 0-2 (stem) and 3-5 (branch) are tied by a residual sum; 6-17 are flattened positions, 18-22 neurons."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.branch, self.branch_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.hidden, self.out = nn.Linear(12, 5), nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = nn.functional.avg_pool2d((x + self.branch_norm(self.branch(x))).relu(), 4)
        return self.out(self.hidden(x.flatten(1)).relu())


class Unlearned(TinyNet):
    """Stands for the unlearned copy."""


@pytest.fixture
def data() -> DefenceData:
    images = torch.rand((18, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return DefenceData(images, torch.arange(18) % 3, 3, Normalisation((0.4,), (0.5,)))


@pytest.fixture
def clues() -> Clues:
    """Another network as unlearned copy, and a corner patch for class 1 that is half trusted."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :3, :3] = 0.9
    return Clues(Unlearned(seed=5), RecoveredTrigger(1, mask, torch.ones(1, 1, 8, 8), (6.0, 4.0, 9.0)))


def make_env(data: DefenceData, clues: Clues, **settings: Any) -> PruningEnv:
    return PruningEnv(TinyNet(), data, EnvConfig(**{"max_steps": 5, "reward": REWARD, **settings}), clues)


def quick_config() -> EnvConfig:
    return EnvConfig(
        max_steps=4,
        unlearn=UnlearnConfig(max_epochs=2),
        recovery=TriggerRecoveryConfig(steps=6, batch_size=4),
        warp=WarpRecoveryConfig(steps=2),
    )


def made(data: DefenceData) -> gym.Env[Any, Any]:
    return gym.make("onp/NeuronPruning-v0", model=TinyNet(), data=data, config=quick_config())


def terms_by_hand(data: DefenceData, clues: Clues, mask: KeepMask) -> dict[str, float]:
    """The reward terms from logits of permanently pruned copies, in NumPy; clean ones on cropped and flipped images."""

    def logits(model: nn.Module, images: Tensor, prune: bool = True) -> np.ndarray:
        model = copy.deepcopy(model)
        if prune:
            apply_mask(model, mask)
        with torch.no_grad():
            return model((images - 0.4) / 0.5).double().numpy()

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(1, keepdims=True)

    labels, rows = data.labels.numpy(), np.arange(len(data))
    views = known_views(TinyNet(), data)
    before, after = softmax(logits(TinyNet(), views, prune=False)), softmax(logits(TinyNet(), views))
    cross_entropy = -np.log(softmax(logits(clues.unlearned, data.images))[rows, labels]).mean()
    others = data.images[data.labels != 1].clone()
    others[:, :, :3, :3] = 1  # 0.9 of the patch, doubled, is all of it
    success = softmax(logits(TinyNet(), others))[:, 1].mean()
    return {
        "clean_accuracy": float((after.argmax(1) == labels).mean()),
        "clean_fidelity": -float((before * np.log(before / after)).sum(1).mean()),
        "unlearning": -0.55 * math.log(max(cross_entropy, 0.5 * math.log(3))),  # half trusted: 1 - 0.9 / 2
        "trigger_resistance": -0.5 * math.log(max(success, 1e-3) / (1 - max(success, 1e-3))),
    }


def potential_by_hand(data: DefenceData, clues: Clues, mask: KeepMask) -> float:
    terms = terms_by_hand(data, clues, mask)
    return sum(getattr(REWARD, name) * value for name, value in terms.items())


# --- interface ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["envs", "onp"])
def test_importing_a_package_registers_the_environment_and_imports_nothing_heavy(package: str) -> None:
    script = (
        f"import sys, gymnasium, {package}\n"
        "assert 'onp/NeuronPruning-v0' in gymnasium.registry, 'not registered'\n"
        "heavy = {'torch', 'torch_geometric', 'stable_baselines3', 'envs.pruning', 'onp.units'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["onp/NeuronPruning-v0", "envs:onp/NeuronPruning-v0"])
def test_gymnasium_makes_the_environment(data: DefenceData, name: str) -> None:
    env = gym.make(name, model=TinyNet(), data=data, config=quick_config())
    assert isinstance(env.unwrapped, PruningEnv)
    assert env.action_space == gym.spaces.Discrete(24)
    observation, info = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    assert env.unwrapped.actions.stop == 23  # no layer is large enough for bulk actions
    assert info["units_pruned"] == 0
    assert env.unwrapped.graph.x.shape[0] == 23


def test_gymnasiums_checker_accepts_it(data: DefenceData) -> None:
    env_checker.check_env(made(data).unwrapped)


@pytest.mark.parametrize("fractions", [(), HALVES])
def test_steps_are_deterministic_for_gymnasiums_checker(
    data: DefenceData, clues: Clues, fractions: tuple[float, ...]
) -> None:
    """As `check_env` tests it (infos included), without a registered environment."""
    env = make_env(data, clues, bulk_fractions=fractions)
    env_checker.check_reset_return_type(env)
    env_checker.check_reset_seed_determinism(env)
    env_checker.check_step_determinism(env)


@pytest.mark.parametrize("fractions", [(), HALVES])
def test_stable_baselines_checker_accepts_it(data: DefenceData, clues: Clues, fractions: tuple[float, ...]) -> None:
    sb3_check(make_env(data, clues, bulk_fractions=fractions))


@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_stock_agents_run_on_it(data: DefenceData, clues: Clues, algorithm: type[A2C] | type[DQN]) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES)
    settings: dict[str, Any] = {"n_steps": 4} if algorithm is A2C else {"learning_starts": 4, "buffer_size": 40}
    agent = algorithm("MultiInputPolicy", env, seed=0, device="cpu", **settings).learn(16)
    assert agent.num_timesteps == 16
    assert env.reward_evaluations > 5


# --- reward ---------------------------------------------------------------------------------------------


def test_every_prefix_is_worth_its_mask(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    env.reset()
    mask = KeepMask.all_kept(env.index)
    start = before = potential_by_hand(data, clues, mask)
    total, rewards = 0.0, []
    for unit in (1, 9, 4, 20):
        observation, reward, _, _, info = env.step(unit)
        mask = mask.without([unit])
        now = potential_by_hand(data, clues, mask)
        total += reward
        rewards.append(reward)
        assert reward == pytest.approx(now - before, abs=1e-5)
        assert total == pytest.approx(now - start, abs=1e-5)
        assert info["potential"] == pytest.approx(now, abs=1e-5)
        assert observation["progress"][1] == pytest.approx(total, abs=1e-5)
        before = now
    assert all(abs(reward) > 1e-3 for reward in rewards)  # else the agreement would mean little


def test_info_holds_every_term(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    _, info = env.reset()
    for unit in (2, 7):
        assert set(info) == {
            "terms", "potential", "units_pruned", "invalid_actions", "reward_evaluations", "keep_mask",
        }  # fmt: skip
        assert list(info["terms"]) == list(TERMS)
        assert info["terms"] == pytest.approx(terms_by_hand(data, clues, info["keep_mask"]), abs=1e-5)
        *_, info = env.step(unit)
    assert info["units_pruned"] == 2
    assert (~info["keep_mask"].keep).nonzero().flatten().tolist() == [2, 7]


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
    for env, pruned in ((single, [4]), (grouped, [1, 4])):
        env.reset()
        observation, reward, _, _, info = env.step(4)
        assert np.flatnonzero(observation["kept"] == 0).tolist() == pruned
        assert info["units_pruned"] == len(pruned)
        mask = KeepMask.all_kept(env.index)
        gained = potential_by_hand(data, clues, mask.without(pruned)) - potential_by_hand(data, clues, mask)
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


def pruned(mask: KeepMask) -> list[int]:
    return (~mask.keep).nonzero().flatten().tolist()


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


# --- bookkeeping ----------------------------------------------------------------------------------------


def test_evaluations_count_distinct_masks_and_sensitivity_passes(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    assert env.reward_evaluations == 3  # all kept: its score, its effects, and those on the clean loss
    # Actions, is the mask the best of its episode, evaluations: a new mask costs one, to be the best another.
    episodes = (
        ((17, 17, 9), (True, False, False), (5, 5, 6)),  # the second action is invalid
        ((9, 17, 22), (False, False, True), (7, 7, 9)),  # {9, 17} is known
        ((22, 17, 3), (True, True, False), (11, 13, 14)),
        ((3, 22, 17), (False, False, False), (15, 16, 16)),  # {3, 17, 22} is known
        ((17, 22, env.actions.stop), (True, True, False), (16, 16, 16)),  # so are the masks and their effects
    )
    for actions, rises, expected in episodes:
        env.reset()
        mask = best = env.objective.all_kept
        for action, rose, count in zip(actions, rises, expected, strict=True):
            assert env.step(action)[4]["reward_evaluations"] == count, (actions, action)
            if action != env.actions.stop:
                mask = env.objective.all_kept.without({*pruned(mask), action})
            assert (potential_by_hand(data, clues, mask) > potential_by_hand(data, clues, best)) == rose
            best = mask if rose else best
            assert pruned(env.best) == pruned(best)
    env.reset()
    env.step(9)
    for _ in range(2):
        env.objective.score(env.mask)
        env.objective.effects(env.mask)  # never the best, so no pass was made there yet
        assert env.reward_evaluations == 17
    env.objective.score(env.actions.after(12, env.mask, env.effects["score"]))
    assert env.reward_evaluations == 18


def test_a_bulk_action_costs_as_much_as_a_single_unit(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues, bulk_fractions=HALVES)
    env.reset()
    worths, counts = [potential_by_hand(data, clues, env.mask)], [env.reward_evaluations]
    for action in (25, 26, 25):  # the last is invalid
        counts.append(env.step(action)[4]["reward_evaluations"])
        worths.append(potential_by_hand(data, clues, env.mask))
    assert worths[1] > worths[0] > worths[2] == worths[3]
    assert counts == [3, 5, 6, 6]


def test_reset_restores_the_start(data: DefenceData, clues: Clues) -> None:
    env = make_env(data, clues)
    start, info = env.reset()
    rewards = [env.step(unit)[1] for unit in (2, 11)]
    again, restored = env.reset(seed=7)
    assert all(np.array_equal(start[key], again[key]) for key in start)
    assert again["progress"].tolist() == [1.0, 0.0]
    assert restored["units_pruned"] == restored["invalid_actions"] == 0
    assert restored["potential"] == info["potential"]
    assert [env.step(unit)[1] for unit in (2, 11)] == rewards


def test_twins_in_a_vectorised_environment_go_the_way_of_single_ones(data: DefenceData, clues: Clues) -> None:
    episodes = ((3, 7, 7, 1, 0), (12, 3, 22, 5, 1), (2, 11, 4, 9, 8), (3, 26, 7, 25, 23))
    env = make_env(data, clues, bulk_fractions=HALVES)
    together = DummyVecEnv([env.twin for _ in episodes])
    singles = [make_env(data, clues, bulk_fractions=HALVES) for _ in episodes]
    seen = together.reset()
    for row, single in enumerate(singles):
        observation, _ = single.reset()
        assert all(np.array_equal(seen[key][row], observation[key]) for key in observation)
    for actions in zip(*episodes, strict=True):
        seen, rewards, dones, infos = together.step(np.array(actions))
        for row, (single, action) in enumerate(zip(singles, actions, strict=True)):
            observation, reward, terminated, _, info = single.step(action)
            now = infos[row]["terminal_observation"] if dones[row] else {key: seen[key][row] for key in seen}
            assert all(np.array_equal(now[key], observation[key]) for key in observation)
            assert rewards[row] == np.float32(reward) and bool(dones[row]) == terminated
            assert infos[row]["keep_mask"] == info["keep_mask"] and infos[row]["terms"] == info["terms"]
            assert infos[row]["invalid_actions"] == info["invalid_actions"]
    assert env.reward_evaluations == infos[-1]["reward_evaluations"]  # shared
    assert env.reward_evaluations < sum(single.reward_evaluations for single in singles)
    assert env.mask == env.objective.all_kept


def test_an_episode_leaves_both_networks_bit_identical(data: DefenceData, clues: Clues) -> None:
    model = TinyNet()
    env = PruningEnv(model, data, EnvConfig(max_steps=5, reward=REWARD), clues)
    networks = (model, clues.unlearned)
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    flags = [[parameter.requires_grad for parameter in network.parameters()] for network in networks]
    env.reset()
    for unit in (0, 3, 8, 12, 21):
        env.step(unit)
    for network, weights, grads in zip(networks, before, flags, strict=True):
        after = network.state_dict()
        assert all(torch.equal(after[key], value) for key, value in weights.items())
        assert [parameter.requires_grad for parameter in network.parameters()] == grads
        assert all(parameter.grad is None for parameter in network.parameters())


def test_construction_leaves_the_network_as_it_was(data: DefenceData) -> None:
    model = TinyNet()
    before = copy.deepcopy(model.state_dict())
    PruningEnv(model, data, quick_config())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not model.training


def test_same_seed_same_episode(data: DefenceData) -> None:
    runs = []
    for seed in (1, 1, 2):
        env = PruningEnv(TinyNet(), data, quick_config(), seed=seed)
        observations = [env.reset(seed=0)[0]]
        rewards = []
        for action in (4, 17, 4, 19):
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(reward)
        runs.append((np.concatenate([np.concatenate(list(o.values())) for o in observations]), rewards, env.graph.x))
    one, two, other = runs
    assert np.array_equal(one[0], two[0]) and one[1] == two[1] and torch.equal(one[2], two[2])
    assert one[1] != other[1]  # the seed reaches the unlearned copy and the recovered trigger


# --- no trigger -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [PruningEnv.__init__, find_clues, Objective.__init__, Clues.__init__])
def test_no_place_for_a_known_trigger(function: Any) -> None:
    """Recovered triggers come as clues."""
    parameters = inspect.signature(function).parameters
    named = [name for name in parameters if any(word in name for word in ("trigger", "poison", "attack", "test"))]
    assert named == []
    kinds = {parameter.kind for parameter in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_a_trigger_is_refused(data: DefenceData, clues: Clues) -> None:
    model: Any = TinyNet()
    with pytest.raises(TypeError, match="trigger"):
        PruningEnv(model, data, quick_config(), clues, trigger=clues.mask)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="trigger"):
        find_clues(model, data, quick_config(), 0, trigger=clues.mask)  # type: ignore[call-arg]
    index = make_env(data, clues).index
    with pytest.raises(TypeError, match="trigger"):
        Objective(model, clues, index, data, REWARD, trigger=clues.mask)  # type: ignore[call-arg]
