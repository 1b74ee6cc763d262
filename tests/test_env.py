"""The environment's contract: Gymnasium's and SB3's checkers, and rewards recomputed by hand."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils import env_checker
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_env import HALVES, REWARD, TinyNet, make_env, potential_by_hand, pruned, terms_by_hand, tiny_clues, tiny_data

import envs  # noqa: F401 (registers the environment)
from envs.pruning import PruningEnv
from envs.rewards import TERMS, Objective
from onp.clues import Clues, find_clues
from onp.config import EnvConfig, TriggerRecoveryConfig, UnlearnConfig, WarpRecoveryConfig, WaveRecoveryConfig
from onp.data import DefenceData
from onp.masks import KeepMask


@pytest.fixture
def data() -> DefenceData:
    return tiny_data()


@pytest.fixture
def clues() -> Clues:
    return tiny_clues()


def quick_config() -> EnvConfig:
    return EnvConfig(
        max_steps=4,
        unlearn=UnlearnConfig(max_epochs=2),
        recovery=TriggerRecoveryConfig(steps=6, batch_size=4),
        warp=WarpRecoveryConfig(steps=2),
        wave=WaveRecoveryConfig(steps=2),
    )


def made(data: DefenceData) -> gym.Env[Any, Any]:
    return gym.make("onp/NeuronPruning-v0", model=TinyNet(), data=data, config=quick_config())


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
