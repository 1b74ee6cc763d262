"""The graph policy: permutation-equivariant, masked, portable between networks, and safe to store."""

from __future__ import annotations

import copy
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from torch import Tensor, nn
from torch_geometric.data import Data

from agents.policy import GraphPolicy, PointerNetwork
from agents.ppo import build_agent, train_agent
from envs.pruning import PruningEnv
from onp.checkpoints import load_checkpoint, save_weights
from onp.clues import Clues
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.errors import CheckpointError, ConfigError
from onp.masks import KeepMask
from onp.trigger_recovery import RecoveredTrigger

CONFIG = AgentConfig(n_steps=8, batch_size=4, n_epochs=1)
PRIOR_WEIGHT = 3.0
"""of an untrained policy"""
Observation = dict[str, Tensor]


def make_env(width: int = 6, fractions: tuple[float, ...] = (1 / 3, 1 / 2)) -> PruningEnv:
    """A pruning environment around a network of 2 x width + 4 x width units, by default with 6 bulk actions."""
    torch.manual_seed(width)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 3),
    ).eval()  # fmt: skip
    unlearned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in unlearned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    data = DefenceData(torch.rand(18, 1, 8, 8), torch.arange(18) % 3, 3)
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :2, :2] = 1
    clues = Clues(unlearned, RecoveredTrigger(1, mask, 1 - mask, (6.0, 4.0, 9.0)))
    return PruningEnv(net, data, EnvConfig(max_steps=5, bulk_fractions=fractions), clues)


@pytest.fixture(scope="module")
def env() -> PruningEnv:
    return make_env()


def agent_of(env: PruningEnv, seed: int = 0) -> PPO:
    return build_agent(env, CONFIG, seed)


def stirred(agent: PPO, seed: int = 3) -> PPO:
    """Large random weights everywhere: an untrained policy's heads are nearly zero, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return agent


def observations(env: PruningEnv, count: int = 5, seed: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(count, len(env.index), generator=generator) > 0.3
    effects = torch.randn(count, env.actions.stop, generator=generator)
    return {
        "kept": kept.float(),
        "action_mask": torch.stack([env.actions.valid(KeepMask(env.index, row)) for row in kept]).float(),
        "effects": effects.mul(4).round() / 4,  # some are equal
        "progress": torch.rand(count, 2, generator=generator),
    }


def probabilities(agent: PPO, observation: Observation) -> Tensor:
    with torch.no_grad():
        return agent.policy.get_distribution(observation).distribution.probs  # type: ignore[arg-type, attr-defined]


def permuted(graph: Data, order: Tensor, bulk_order: Tensor) -> Data:
    """The graph whose node i is node order[i] of `graph`; edges, layers and bulk actions come in another order, too."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    shuffle = torch.randperm(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(5))
    layers = torch.tensor([2, 0, 1])  # the new numbers of the three layers
    return Data(
        x=graph.x[order],
        edge_index=place[graph.edge_index][:, shuffle],
        edge_attr=graph.edge_attr[shuffle],
        feature_names=graph.feature_names,
        layer=layers[graph.layer[order]],
        bulk_layer=layers[graph.bulk_layer[bulk_order]],
        bulk_count=graph.bulk_count[bulk_order],
    )


# --- equivariance and masks -----------------------------------------------------------------------------


def test_permuting_units_and_bulk_actions_permutes_their_logits_alone(env: PruningEnv) -> None:
    units, bulks = len(env.index), len(env.actions.bulks)
    assert (units, bulks) == (36, 6)
    generator = torch.Generator().manual_seed(1)
    order, bulk_order = torch.randperm(units, generator=generator), torch.randperm(bulks, generator=generator)
    network = stirred(agent_of(env)).policy.mlp_extractor
    other = PointerNetwork(permuted(env.graph, order, bulk_order), CONFIG)
    other.load_state_dict(network.state_dict())
    one, choices = observations(env), torch.cat([order, units + bulk_order])
    two = {
        "kept": one["kept"][:, order],
        "action_mask": torch.cat([one["action_mask"][:, choices], one["action_mask"][:, -1:]], 1),
        "effects": one["effects"][:, choices],
        "progress": one["progress"],
    }
    with torch.no_grad():
        (logits, values), (moved, moved_values) = network(one), other(two)
    valid = two["action_mask"][:, :-1].bool()
    assert torch.allclose(moved[:, :-1][valid], logits[:, :-1][:, choices][valid], atol=1e-4, rtol=1e-4)
    assert torch.allclose(moved[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.allclose(moved_values, values, atol=1e-4, rtol=1e-4)
    assert values.shape == (5, 1) and float(values.std()) > 1e-3
    assert float(logits[:, :units][one["kept"].bool()].std()) > 0.1  # units differ, so their order shows
    assert bool(valid[:, units:].any()) and not bool(valid[:, units:].all())
    untied = {**one, "effects": torch.zeros_like(one["effects"]), "action_mask": torch.ones(5, units + bulks + 1)}
    with torch.no_grad():
        alike = network(untied)[0][:, units:-1]
    assert float(alike.std(1).min()) > 0.1  # so do bulk actions, without the prior


def test_a_bulk_action_is_read_by_the_mean_of_its_layer_and_the_size_of_its_bite(env: PruningEnv) -> None:
    """Without edges a unit's embedding is its own; the query is made constant, so nothing but the choice counts."""
    graph = env.graph.clone()
    graph.edge_index, graph.edge_attr = graph.edge_index[:, :0], graph.edge_attr[:0]
    network = stirred(agent_of(env)).policy.mlp_extractor
    untied = observations(env, count=1)
    untied = {**untied, "effects": torch.zeros(1, 42), "action_mask": torch.ones(1, 43)}

    def bulk_logits(changed: Data) -> Tensor:
        other = PointerNetwork(changed, CONFIG)
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            other.query.weight.zero_()
            return other(untied)[0][0, 36:42]

    before, first = bulk_logits(graph), graph.layer == 0
    moved, swapped, bites = graph.clone(), graph.clone(), graph.clone()
    moved.x = graph.x + first[:, None].float()
    assert (bulk_logits(moved) - before).abs().gt(1e-3).tolist() == [True, True, False, False, False, False]
    swapped.x = graph.x.clone()
    swapped.x[first] = graph.x[first].flip(0)
    assert torch.allclose(bulk_logits(swapped), before, atol=1e-4)
    bites.bulk_count = graph.bulk_count + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert (bulk_logits(bites) - before).abs().gt(1e-3).tolist() == [True, False, False, False, False, False]


def test_a_network_without_bulk_actions_has_a_policy_with_the_same_weights(env: PruningEnv) -> None:
    bare = make_env(fractions=())
    assert len(bare.actions) == 37
    agent = agent_of(bare)
    agent.policy.load_state_dict(stirred(agent_of(env)).policy.state_dict(), strict=True)
    chances = probabilities(agent, observations(bare))
    assert chances.shape == (5, 37) and torch.allclose(chances.sum(1), torch.ones(5))
    agent.learn(8)


def test_edges_matter(env: PruningEnv) -> None:
    network = stirred(agent_of(env)).policy.mlp_extractor
    lonely = env.graph.clone()
    lonely.edge_index, lonely.edge_attr = lonely.edge_index[:, :0], lonely.edge_attr[:0]
    other = PointerNetwork(lonely, CONFIG)
    other.load_state_dict(network.state_dict())
    observation = observations(env)
    with torch.no_grad():
        assert not torch.allclose(network(observation)[0], other(observation)[0], atol=1e-2)


def test_invalid_actions_have_probability_zero(env: PruningEnv) -> None:
    agent, observation = stirred(agent_of(env)), observations(env)
    chances = probabilities(agent, observation)
    invalid = observation["action_mask"] == 0
    assert bool(invalid[:, len(env.index) :].any())  # bulk actions, too
    assert bool((chances[invalid] == 0).all())
    assert bool((chances[~invalid] > 0).all())
    assert torch.allclose(chances.sum(1), torch.ones(5))
    with torch.no_grad():
        actions = torch.stack([agent.policy(observation)[0] for _ in range(50)], 1)
    assert bool(observation["action_mask"].gather(1, actions).bool().all())


def test_weights_without_meaning_are_one_clear_error(env: PruningEnv) -> None:
    agent = agent_of(env)
    with torch.no_grad():
        agent.policy.mlp_extractor.query.weight.fill_(3e38)  # type: ignore[operator, union-attr]
    with pytest.raises(ConfigError, match=r"outputs are not finite; lower --agent\.learning-rate, or leave --policy"):
        agent.policy.get_distribution(observations(env))  # type: ignore[arg-type]


def test_all_pruned_leaves_stopping_and_a_finite_value(env: PruningEnv) -> None:
    units = len(env.index)
    observation = {
        "kept": torch.zeros(1, units),
        "action_mask": torch.tensor([[0.0] * env.actions.stop + [1.0]]),
        "effects": torch.zeros(1, env.actions.stop),
        "progress": torch.zeros(1, 2),
    }
    agent = stirred(agent_of(env))
    assert probabilities(agent, observation).tolist() == [[0.0] * env.actions.stop + [1.0]]
    with torch.no_grad():
        value = agent.policy.predict_values(observation)  # type: ignore[arg-type]
    assert bool(torch.isfinite(value).all())


def test_the_actor_and_critic_paths_agree(env: PruningEnv) -> None:
    network, observation = stirred(agent_of(env)).policy.mlp_extractor, observations(env)
    logits, values = network(observation)
    assert torch.equal(network.forward_actor(observation), logits)
    assert torch.equal(network.forward_critic(observation), values)


def negated(policy: GraphPolicy) -> None:
    with torch.no_grad():
        policy.mlp_extractor.encoder.embed.weight.mul_(-1)


def written_over(policy: GraphPolicy) -> None:
    policy.mlp_extractor.encoder.embed.weight.data.mul_(-1)  # PyTorch counts no version of it


def of_a_vector(policy: GraphPolicy) -> None:
    policy.load_from_vector(-policy.parameters_to_vector())


@pytest.mark.parametrize("change", [negated, written_over, of_a_vector])
def test_remembered_embeddings_follow_the_weights(env: PruningEnv, change: Callable[[GraphPolicy], None]) -> None:
    agent, observation = stirred(agent_of(env)), observations(env)
    before = probabilities(agent, observation)
    change(agent.policy)
    after = probabilities(agent, observation)
    fresh = agent_of(env)
    fresh.policy.load_state_dict(agent.policy.state_dict())
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, probabilities(fresh, observation))


# --- prior ----------------------------------------------------------------------------------------------


def plain(agent: PPO) -> PPO:
    """Without the small random weights of the heads: the prior and the biases alone."""
    network = agent.policy.mlp_extractor
    with torch.no_grad():
        for head in (network.query, network.bias, network.stop):
            head.weight.zero_()
    return agent


def all_kept(env: PruningEnv, effects: Tensor) -> Observation:
    """Effects are those of units and bulk actions."""
    observation = observations(env, count=1)
    observation["kept"][:] = observation["action_mask"][:] = 1
    return {**observation, "effects": effects.reshape(1, -1)}


def test_an_untrained_policy_follows_the_prior(env: PruningEnv) -> None:
    """On the observation of the environment itself, where effects tie at most by chance."""
    reset = {key: torch.as_tensor(value).float().unsqueeze(0) for key, value in env.reset()[0].items()}
    score = reset["effects"][0]
    assert torch.equal(score[: len(env.index)], env.effects["score"]) and len(score) == len(env.index) + 6
    chances = probabilities(agent_of(env), reset)[0, :-1]
    ranks = torch.tensor([int((score > value).sum()) for value in score])
    prior = (1 + ranks.double()) ** -PRIOR_WEIGHT
    assert torch.allclose(chances.double() / chances.sum(), prior / prior.sum(), rtol=0.3)  # heads are nearly zero
    best = chances[score.argsort(descending=True)]
    assert bool((best[:-4] > best[4:]).all())  # monotone in rank, four ranks apart
    assert int(chances.argmax()) == int(score.argmax())


def test_without_head_noise_the_prior_is_exact(env: PruningEnv) -> None:
    choices = env.actions.stop  # units and bulk actions are ranked together
    effects = torch.randperm(choices, generator=torch.Generator().manual_seed(2)).float()
    observation, agent = all_kept(env, effects), plain(agent_of(env))
    with torch.no_grad():
        logits = agent.policy.mlp_extractor(observation)[0][0]
    expected = -PRIOR_WEIGHT * (choices - effects.double()).log()  # the best has rank 0
    assert torch.allclose(logits[:-1].double(), expected, atol=1e-5)
    assert float(logits[-1]) == -2.0  # stopping


def test_the_prior_looks_at_the_order_of_the_effects_alone(env: PruningEnv) -> None:
    agent = plain(agent_of(env))
    effects = torch.randn(env.actions.stop, generator=torch.Generator().manual_seed(2))
    before = probabilities(agent, all_kept(env, effects))
    assert torch.equal(before, probabilities(agent, all_kept(env, 1000 * effects - 7)))
    turned = probabilities(agent, all_kept(env, effects.flip(0)))
    assert torch.allclose(turned[:, :-1].flip(1), before[:, :-1], rtol=1e-4)


def test_equal_effects_share_a_rank_and_invalid_actions_have_none(env: PruningEnv) -> None:
    choices, agent = env.actions.stop, plain(agent_of(env))
    effects = torch.full((choices,), -1.0)
    effects[[3, 5, 8, 11, 20, 37, 40]] = torch.tensor([9.0, 2.0, 2.0, 1.0, 7.0, 2.0, 8.0])  # 37 and 40 are bulks
    observation = all_kept(env, effects)
    observation["kept"][0, [3, 20]] = 0
    observation["action_mask"][0, [3, 20, 40]] = 0  # the three best
    with torch.no_grad():
        logits = agent.policy.mlp_extractor(observation)[0][0]
    assert float(logits[5]) == float(logits[8]) == float(logits[37]) == 0  # rank 0, together
    assert float(logits[11]) == pytest.approx(-PRIOR_WEIGHT * math.log(4), abs=1e-5)
    others = torch.tensor([action for action in range(choices) if action not in (3, 5, 8, 11, 20, 37, 40)])
    assert torch.allclose(logits[others], torch.tensor(-PRIOR_WEIGHT * math.log(5)), atol=1e-5)
    assert bool((probabilities(agent, observation)[0, [3, 20, 40]] == 0).all())
    uniform = probabilities(agent, all_kept(env, torch.zeros(choices)))[0, :-1]
    assert bool((uniform == uniform[0]).all())


def test_what_speaks_for_pruning_a_unit_speaks_against_restoring_it(env: PruningEnv) -> None:
    agent = stirred(agent_of(env))
    network, units = agent.policy.mlp_extractor, len(env.index)
    with torch.no_grad():
        network.context[-2].weight.zero_()  # the same context whatever is kept
        observation = all_kept(env, torch.zeros(env.actions.stop))
        before = network(observation)[0][0]
        observation["kept"][0, [3, 20]] = 0
        after = network(observation)[0][0]
    assert torch.equal(after[[3, 20]], -before[[3, 20]]) and float(before[[3, 20]].abs().min()) > 1e-3
    others = [action for action in range(len(before)) if action not in (3, 20)]
    assert torch.equal(after[others], before[others]) and len(before) > units + 1


# --- weights --------------------------------------------------------------------------------------------


def test_the_graph_is_not_in_the_state_dict(env: PruningEnv) -> None:
    agent = agent_of(env)
    network = agent.policy.mlp_extractor
    names = set(agent.policy.state_dict())
    buffers = {"x", "edge_index", "edge_attr", "layer", "bulk_layer", "bites"}
    assert {name for name, _ in network.named_buffers()} == buffers
    assert names == {name for name, _ in agent.policy.named_parameters()}
    assert all(len(env.index) not in value.shape for value in agent.policy.state_dict().values())


def test_the_bulk_actions_of_a_network_are_not_in_the_state_dict(env: PruningEnv) -> None:
    other = agent_of(make_env(fractions=(1 / 4,))).policy.state_dict()
    weights = agent_of(env).policy.state_dict()
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in other.items()}


def test_every_parameter_is_optimised(env: PruningEnv) -> None:
    agent = agent_of(env)
    optimised = {id(parameter) for group in agent.policy.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in agent.policy.parameters()}
    before = copy.deepcopy(agent.policy.state_dict())
    agent.learn(8)
    moved = [name for name, value in agent.policy.state_dict().items() if not torch.equal(value, before[name])]
    unmoved = sorted(set(before) - set(moved))
    assert not unmoved, f"one update leaves {unmoved} as they were"


def test_the_rollout_buffer_holds_a_few_bytes_per_unit_and_step(env: PruningEnv) -> None:
    """At most 8 per unit, besides a few numbers per step; nothing in it grows with the edges."""
    units, per_step = [], []
    for width in (6, 30):
        agent = build_agent(make_env(width), CONFIG, seed=0)
        agent.learn(CONFIG.n_steps)
        buffer = agent.rollout_buffer
        arrays = [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
        observed = sum(array.nbytes for array in buffer.observations.values())  # type: ignore[attr-defined]
        per_step.append((observed + sum(array.nbytes for array in arrays)) / CONFIG.n_steps)
        units.append(len(make_env(width).index))
    assert (per_step[1] - per_step[0]) / (units[1] - units[0]) <= 8
    assert per_step[0] <= 8 * units[0] + 64


def test_environments_that_advance_together_learn_within_the_budget(env: PruningEnv) -> None:
    config = replace(CONFIG, n_envs=3)
    agent = build_agent(env, config, seed=0)
    curve = train_agent(agent, config, 60, lambda used, budget: None)
    assert agent.n_envs == 3 and agent.num_timesteps % 3 == 0
    assert len(curve.returns) >= 3 and agent._n_updates > 0
    assert 60 <= env.reward_evaluations < 60 + 2 * 3


def test_the_learning_curve_has_the_returns_of_whole_episodes(env: PruningEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was replayed: the potential at an episode's end, less that of the whole network."""
    config = replace(CONFIG, restart_fraction=0.9, patience=2)
    agent = build_agent(env, config, seed=0)
    gained, lengths = list[float](), list[int]()
    step = Monitor.step

    def watched(self: Monitor[Any, Any], action: Any) -> Any:
        observation, reward, terminated, truncated, info = step(self, action)
        if terminated or truncated:
            gained.append(info["potential"] - env.initial_score.potential)
            lengths.append(info["episode"]["l"])
        return observation, reward, terminated, truncated, info

    monkeypatch.setattr(Monitor, "step", watched)
    used = env.reward_evaluations
    curve = train_agent(agent, config, used + 60, lambda used, budget: None)
    assert curve.returns == pytest.approx(gained, abs=1e-6)
    assert len(curve.returns) == len(curve.evaluations) > 10 and len({round(value, 5) for value in gained}) > 5
    assert sum(lengths) <= agent.num_timesteps  # replayed steps are not learned from


def test_weights_move_between_networks_of_different_size(env: PruningEnv, tmp_path: Path) -> None:
    trained, path = stirred(agent_of(env)), tmp_path / "policy.safetensors"
    save_weights(trained.policy, path)
    larger = make_env(9, fractions=(1 / 4,))
    assert len(larger.index) > len(env.index) and len(larger.actions.bulks) == 3
    agent = agent_of(larger, seed=4)
    observation = observations(larger)
    before = probabilities(agent, observation)
    load_checkpoint(agent.policy, path)
    agent.policy.load_state_dict(trained.policy.state_dict(), strict=True)
    weights = trained.policy.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in agent.policy.state_dict().items())
    after = probabilities(agent, observation)
    assert after.shape == (5, len(larger.index) + 3 + 1)
    assert not torch.allclose(before, after, atol=1e-3)


def test_safetensors_round_trip_gives_the_same_actions(env: PruningEnv, tmp_path: Path) -> None:
    trained, path = stirred(agent_of(env)), tmp_path / "policy.safetensors"
    save_weights(trained.policy, path)
    agent = agent_of(env, seed=9)
    observation = observations(env, count=20)
    assert not torch.allclose(probabilities(agent, observation), probabilities(trained, observation), atol=1e-2)
    load_checkpoint(agent.policy, path)
    assert torch.equal(probabilities(agent, observation), probabilities(trained, observation))
    arrays = {key: value.numpy() for key, value in observation.items()}
    actions = [one.predict(arrays, deterministic=True)[0] for one in (agent, trained)]
    assert np.array_equal(*actions)
    assert len(set(actions[0].tolist())) > 1


def test_another_architecture_is_refused(env: PruningEnv, tmp_path: Path) -> None:
    save_weights(agent_of(env).policy, tmp_path / "policy.safetensors")
    wider = build_agent(env, AgentConfig(hidden=16), seed=0)
    with pytest.raises(CheckpointError, match="expected"):
        load_checkpoint(wider.policy, tmp_path / "policy.safetensors")


def test_the_zip_can_be_written_and_read(env: PruningEnv, tmp_path: Path) -> None:
    agent, path = stirred(agent_of(env)), tmp_path / "policy.zip"
    agent.save(path)
    assert "policy.pth" in zipfile.ZipFile(path).namelist()
    loaded = PPO.load(path, device="cpu")
    assert isinstance(loaded.policy, GraphPolicy)
    observation = observations(env)
    assert torch.equal(probabilities(loaded, observation), probabilities(agent, observation))
