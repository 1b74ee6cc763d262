"""The environment in other people's hands: wrappers, processes, frozen networks, data that does not quite fit."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import TinyNet, linear

from agents.ppo import build_agent
from baselines_rnp.recover import RecoverConfig
from baselines_rnp.unlearn import unlearn
from envs.pruning import PruningEnv
from onp.attacks.fitting import FitConfig
from onp.checks import check_network
from onp.clues import Clues, find_clues
from onp.config import AgentConfig, EnvConfig, RewardConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.data import DefenceData
from onp.engine import Engine
from onp.errors import ConfigError, DataError, MaskError, ModelError
from onp.masks import KeepMask
from onp.models import build_model
from onp.trigger_recovery import RecoveredTrigger
from onp.units import index_units


@pytest.fixture
def data() -> DefenceData:
    images = torch.rand((24, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return DefenceData(images, torch.arange(24) % 3, 3)


@pytest.fixture
def env(data: DefenceData) -> PruningEnv:
    torch.manual_seed(0)
    model = TinyNet().eval()
    trigger = RecoveredTrigger(1, torch.full((1, 1, 8, 8), 0.1), torch.ones(1, 1, 8, 8), (6.0, 4.0, 9.0))
    return PruningEnv(model, data, EnvConfig(max_steps=5), Clues(copy.deepcopy(model), trigger))


def play(env: Any) -> list[float]:
    env.reset()
    return [float(env.step(np.int64(action))[1]) for action in (2, 5, 0, 7)]


# --- a network may know more classes than the images have ----------------------------------------------------


def backdoored() -> nn.Module:
    """Four classes: each pixel of the first three is one, and the fourth pixel sends everything to class 3."""
    weight = torch.eye(4) * 4
    weight[3, 3] = 40.0
    return linear(torch.cat([weight, torch.zeros(4, 60)], 1))


def few_classes(known: int) -> DefenceData:
    """Images of the first three classes only."""
    images = torch.zeros(18, 64)
    labels = torch.arange(18) % 3
    images[torch.arange(18), labels] = 0.9
    return DefenceData(images.view(18, 1, 8, 8), labels, known)


@pytest.mark.parametrize("known", [3, 9])
def test_a_backdoor_may_lead_to_a_class_that_no_image_is_of(known: int) -> None:
    data = check_network(backdoored(), few_classes(known))
    assert data.num_classes == 4 and torch.equal(data.images, few_classes(known).images)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), *backdoored()).eval()
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    quick = EnvConfig(
        unlearn=UnlearnConfig(max_epochs=1), recovery=TriggerRecoveryConfig(steps=60, batch_size=8, conclusive=0.8)
    )
    for clues in (
        find_clues(net, few_classes(known), quick, 0),
        PruningEnv(net, few_classes(known), quick).objective.clues,
    ):
        assert len(clues.mask.sizes) == 4 and clues.mask.target == 3


def test_the_environment_refuses_what_does_not_fit(data: DefenceData) -> None:
    with pytest.raises(DataError, match="labels go up to 4; the network has 3 outputs"):
        PruningEnv(TinyNet(), replace(data, labels=data.labels + 2, num_classes=5))
    damaged = TinyNet()
    nn.init.constant_(damaged.fc.bias, float("nan"))
    with pytest.raises(ModelError, match=r"fc\.bias holds NaN"):
        PruningEnv(damaged, data)


def test_probabilities_are_no_logits(data: DefenceData) -> None:
    for last, refused in ((nn.Softmax(1), True), (nn.LogSoftmax(1), False), (nn.ReLU(), False), (nn.Sigmoid(), False)):
        model = nn.Sequential(TinyNet(), last).eval()
        with pytest.raises(ModelError, match="gives probabilities; expected logits") if refused else nullcontext():
            assert check_network(model, data).num_classes == 3


@pytest.mark.parametrize(
    ("counts", "left"),
    [((50, 10, 5), [15, 10, 5]), ((5, 60), [5, 5]), ((12, 12), [12, 12]), ((8, 4, 4), [8, 4, 4]), ((0, 9), [0, 9])],
)
def test_clues_go_by_images_of_which_no_class_has_most(
    counts: tuple[int, ...], left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    data = DefenceData(torch.rand(len(labels), 1, 8, 8), labels, 3)
    fewer = data.without_majority()
    assert fewer.labels.bincount().tolist() == left
    assert all(any(torch.equal(image, other) for other in data.images) for image in fewer.images)
    assert torch.equal(fewer.images, data.without_majority().images), "drawn by no generator of the caller's"
    seen: list[DefenceData] = []

    def recover(model: nn.Module, data: DefenceData, *_: Any) -> RecoveredTrigger:
        seen.append(data)
        return RecoveredTrigger(1, torch.full((1, 1, 8, 8), 0.1), torch.ones(1, 1, 8, 8), (60.0, 1.0, 60.0))

    monkeypatch.setattr("onp.clues.recover_trigger", recover)
    find_clues(TinyNet(), data, EnvConfig(unlearn=UnlearnConfig(max_epochs=1)), seed=0)
    assert [found.labels.bincount().tolist() for found in seen] == [left]


# --- frozen networks and modes of autograd -------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["", "conv", "bn"])
def test_a_frozen_network_is_unlearned_like_any_other(frozen: str, data: DefenceData) -> None:
    torch.manual_seed(0)
    model = TinyNet().eval()
    expected = unlearn(model, data, UnlearnConfig(max_epochs=2), seed=0).model.state_dict()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    with torch.no_grad():
        found = unlearn(model, data, UnlearnConfig(max_epochs=2), seed=0).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found["conv.weight"], model.conv.weight)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name.startswith(frozen))


def test_steps_in_inference_mode_are_steps_like_any_other(env: PruningEnv) -> None:
    other = copy.deepcopy(env)
    with torch.inference_mode():
        found = play(other)
    assert found == play(env) == play(other)


# --- wrappers and processes ----------------------------------------------------------------------------------


def test_the_environment_can_be_sent_to_another_process(env: PruningEnv) -> None:
    assert play(pickle.loads(pickle.dumps(env))) == play(env)


class Less(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return float(reward) - 10


def test_twins_without_the_wrappers_of_the_first_are_refused(env: PruningEnv) -> None:
    config = AgentConfig(hidden=8, n_steps=4, batch_size=4)
    build_agent(Less(env), config, seed=0)
    with pytest.raises(ConfigError, match=r"n_envs 2: .* wrappers \(Less\)"):
        build_agent(Less(env), replace(config, n_envs=2), seed=0)
    build_agent(gym.wrappers.OrderEnforcing(env), replace(config, n_envs=2), seed=0)


# --- actions and masks that the network does not have --------------------------------------------------------


@pytest.mark.parametrize("action", [-1, 10, 1000])
def test_numbers_out_of_range_are_invalid_actions(env: PruningEnv, action: int) -> None:
    assert len(env.actions) == 10
    env.reset()
    _, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["invalid_actions"], info["units_pruned"]) == (0.0, False, 1, 0)


def test_action_masks_are_those_of_the_observation(env: PruningEnv) -> None:
    env.reset()
    observation, *_ = env.step(2)
    masks = env.action_masks()
    assert masks.dtype == bool and masks.tolist() == observation["action_mask"].astype(bool).tolist()
    assert not masks[2] and masks[-1]


@pytest.mark.parametrize("units", [[-1], [0, 9]])
def test_a_mask_prunes_units_of_its_network_alone(env: PruningEnv, units: list[int]) -> None:
    with pytest.raises(MaskError, match=rf"units \[{units[-1]}\] .* from 0 to 8"):
        KeepMask.all_kept(env.index).without(units)


def test_the_engine_takes_masks_of_its_own_network(data: DefenceData) -> None:
    def network(width: int) -> nn.Module:
        torch.manual_seed(width)
        norm = nn.BatchNorm2d(width)
        return nn.Sequential(nn.Conv2d(1, width, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    deep = build_model("small_cnn", 1, 3).eval()  # several layers read tensors of units
    own, other = (index_units(deep, (1, 8, 8)) for _ in range(2))
    pruned = KeepMask.all_kept(own).without([2])
    assert KeepMask.all_kept(other).without([2]).check_fits(own) is None and own.layers == other.layers
    assert torch.isfinite(Engine(deep, other, data.inputs).logits(pruned)).all()
    four, eight = network(4).eval(), network(8).eval()
    index = index_units(four, (1, 8, 8))
    engine = Engine(four, index, data.inputs)
    mask = KeepMask.all_kept(index).without([1])
    again = KeepMask.from_json(index_units(network(4).eval(), (1, 8, 8)), mask.to_json())
    assert torch.equal(engine.logits(again), engine.logits(mask)), "read again, with an index of its own"
    with pytest.raises(MaskError, match=r"other units \(\d+ in \d+ layers\) than this one"):
        engine.logits(KeepMask.all_kept(index_units(eight, (1, 8, 8))).without([1]))


# --- what is the user's stays the user's ---------------------------------------------------------------------


def test_the_modes_of_the_network_stay(data: DefenceData, env: PruningEnv) -> None:
    model = TinyNet().train()
    model.bn.eval()  # type: ignore[union-attr]
    quick = EnvConfig(unlearn=UnlearnConfig(max_epochs=1), recovery=TriggerRecoveryConfig(steps=1))
    PruningEnv(model, data, EnvConfig(), env.objective.clues)
    find_clues(model, data, quick, seed=0)
    assert {name: module.training for name, module in model.named_modules()} == {
        name: name != "bn" for name, _ in model.named_modules()
    }


def test_masks_that_go_in_and_out_may_be_written_on(env: PruningEnv) -> None:
    returns = play(env)
    _, info = env.reset()
    info["keep_mask"].keep[:] = False
    given = KeepMask.all_kept(env.index)
    env.reset(options={"keep_mask": given})
    given.keep[:] = False
    scored = KeepMask.all_kept(env.index).without([8])
    env.objective.score(scored)
    scored.keep[:] = False
    assert all(mask.key == key for key, (mask, _) in env.objective.scores.items())
    _, _, _, _, info = env.step(np.int64(3))
    assert info["units_pruned"] == 1
    assert bool(env.reset()[0]["kept"].all()) and play(env) == returns


def test_twins_draw_actions_by_seeds_of_their_own(env: PruningEnv) -> None:
    twin = env.twin()
    env.action_space.seed(0)
    alone = [env.action_space.sample() for _ in range(5)]
    env.action_space.seed(0)
    beside = []
    for _ in range(5):
        beside.append(env.action_space.sample())
        twin.action_space.seed(9)
        twin.action_space.sample()
    assert beside == alone


def test_a_copy_goes_on_from_where_the_episode_is(env: PruningEnv) -> None:
    env.reset()
    env.step(np.int64(2))
    branch = copy.copy(env)
    here, there = env.step(np.int64(5)), branch.step(np.int64(5))
    assert here[1] == there[1] and here[4] == there[4]
    branch.step(np.int64(0))
    assert env.steps == 2 and branch.steps == 3 and branch.objective is env.objective


def test_copies_carry_no_activations(env: PruningEnv) -> None:
    returns, evaluations = play(env), env.reward_evaluations
    assert env.cache.bytes > 0
    other = pickle.loads(pickle.dumps(env))
    assert other.cache.bytes == 0
    env.close()
    assert env.cache.bytes == 0
    env.objective.scores.clear()  # so that masks are computed, and not remembered
    assert play(env) == pytest.approx(returns, abs=1e-6) and env.reward_evaluations > evaluations
    assert env.cache.bytes > 0
    other.objective.scores.clear()
    assert play(other) == pytest.approx(returns, abs=1e-6)


# --- episodes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", [(-1,), (2, -1), (2, 2, 2, 2, 2)])
def test_no_step_follows_the_end(env: PruningEnv, actions: tuple[int, ...]) -> None:
    env.reset()
    for action in actions:
        terminated = env.step(np.int64(action % len(env.actions)))[2]
    assert terminated
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
        env.step(np.int64(0))
    env.reset()
    assert not env.step(np.int64(0))[2]


def test_the_episode_in_words(data: DefenceData, env: PruningEnv) -> None:
    shown = gym.make(
        "onp/NeuronPruning-v0", model=TinyNet(), data=data, config=EnvConfig(max_steps=2), clues=env.objective.clues,
        render_mode="ansi",
    )  # fmt: skip
    shown.reset()
    for action in (0, 1):
        *_, info = shown.step(np.int64(action))
    text = shown.render()
    assert isinstance(text, str) and text.startswith("step 2 of 2, the end\npotential ")
    assert f"unlearning {info['terms']['unlearning']:.4f}" in text
    first = env.index.layers[0]
    assert text.endswith(f"units pruned: 2\n  {first.name}: 2 of {first.size}")
    assert env.render() is None
    with pytest.raises(ConfigError, match="render_mode 'human': expected None or 'ansi'"):
        PruningEnv(TinyNet(), data, EnvConfig(), env.objective.clues, render_mode="human")


def test_reward_terms_of_ones_own(data: DefenceData, env: PruningEnv) -> None:
    torch.manual_seed(0)
    model, clues = TinyNet().eval(), env.objective.clues
    terms = {
        "kept": (0.5, lambda outputs: outputs.kept.float().mean()),
        "weight": (0.0, lambda outputs: outputs.pruned.abs().max()),
        "broken": (1e-9, lambda outputs: float("nan")),
    }
    own = PruningEnv(model, data, env.config, clues, own_terms=terms)
    plain = PruningEnv(model, data, env.config, clues)
    assert np.array_equal(own.reset()[0]["effects"], plain.reset()[0]["effects"])
    for action in (2, 5):
        (_, reward, _, _, info), (_, without, _, _, other) = own.step(np.int64(action)), plain.step(np.int64(action))
        assert reward == pytest.approx(without - 0.5 / len(env.index), abs=1e-6)
        assert info["terms"] == {**other["terms"], **{name: info["terms"][name] for name in terms}}
        assert info["terms"]["kept"] == pytest.approx(1 - info["units_pruned"] / len(env.index))
        assert info["terms"]["weight"] > 0 and info["terms"]["broken"] == -1e6
    with pytest.raises(ConfigError, match="own_terms \\['unlearning'\\]: there are terms of that name"):
        PruningEnv(model, data, env.config, clues, own_terms={"unlearning": terms["kept"]})
    for wrong, words in (
        (terms["kept"][1], "'x': expected a weight and a function"),
        ((1.0, lambda outputs: outputs.kept), "'x' gives shape"),
    ):
        with pytest.raises(ConfigError, match=f"own_terms {words}"):
            PruningEnv(model, data, env.config, clues, own_terms={"x": wrong})


# --- settings ------------------------------------------------------------------------------------------------


def test_an_episode_may_begin_at_a_mask(env: PruningEnv) -> None:
    env.reset()
    for action in (2, 5):
        _, _, _, _, on_the_way = env.step(np.int64(action))
    whole = env.step(np.int64(0))
    assert not whole[2]
    observation, info = env.reset(options={"keep_mask": on_the_way["keep_mask"]})
    assert info["units_pruned"] == 2 and info["potential"] == on_the_way["potential"]
    assert observation["kept"].tolist() == [int(unit not in (2, 5)) for unit in range(len(env.index))]
    assert observation["progress"].tolist() == [1, 0]  # of an episode of its own
    after = env.step(np.int64(0))
    assert after[1] == whole[1] and after[4]["keep_mask"].key == whole[4]["keep_mask"].key
    assert env.reset()[1]["units_pruned"] == 0


def test_an_episode_begins_at_a_mask_of_its_network_alone(env: PruningEnv) -> None:
    other = KeepMask.all_kept(index_units(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), (1, 8, 8)))
    gamma = KeepMask.all_kept(env.index, "gamma")
    for wrong, words in (
        (other, "other units"),
        ([1, 0], r"options\['keep_mask'\] is a list; a KeepMask is expected"),
        (gamma, r"options\['keep_mask'\] is of rule 'gamma'; the environment prunes by rule 'zero'"),
    ):
        with pytest.raises(MaskError, match=words):
            env.reset(options={"keep_mask": wrong})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AgentConfig(hidden=33), r"hidden 33: expected a multiple of heads \(2\)"),
        (lambda: AgentConfig(heads=0), r"AgentConfig\.heads 0: expected at least 1"),
        (lambda: AgentConfig(batch_size=1), r"AgentConfig\.batch_size 1: expected at least 2"),
        (lambda: EnvConfig(cache_gib=float("nan")), r"EnvConfig\.cache_gib nan: expected at least 0"),
        (lambda: UnlearnConfig(batch_size=0), r"UnlearnConfig\.batch_size 0: expected at least 2"),
        (lambda: RecoverConfig(learning_rate=-1.0), r"RecoverConfig\.learning_rate -1\.0: expected at least 0"),
        (lambda: FitConfig(epochs=0), r"FitConfig\.epochs 0: expected at least 1"),
        (lambda: RewardConfig(unlearning=float("nan")), "reward weight unlearning nan: expected a finite number"),
        (lambda: EnvConfig(bulk_fractions=(0.5, 2.0)), r"bulk_fractions \(0.5, 2.0\): expected fractions"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
