"""The graph policy: permutation-equivariant, masked, portable between networks, and safe to store."""

from __future__ import annotations

import copy
import math
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor, nn
from torch_geometric.data import Data

from agents.policy import GraphPolicy, PointerNetwork
from agents.ppo import build_agent, train_agent
from envs.pruning import PruningEnv
from envs.rewards import Clues
from onp.checkpoints import load_checkpoint, save_weights
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.errors import CheckpointError
from onp.trigger_recovery import RecoveredTrigger

CONFIG = AgentConfig(n_steps=8, batch_size=4, n_epochs=1)
PRIOR_WEIGHT = 3.0
"""of an untrained policy"""
Observation = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads, and badly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_env(width: int = 6) -> PruningEnv:
    """A pruning environment around a network of 2 x width + 4 x width units."""
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
    mask = torch.zeros(1, 8, 8)
    mask[0, :2, :2] = 1
    return PruningEnv(
        net, data, EnvConfig(max_steps=5), Clues(unlearned, RecoveredTrigger(1, mask, 1 - mask, (6.0, 4.0, 9.0)))
    )


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


def observations(units: int, count: int = 5, seed: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(count, units, generator=generator) > 0.3).float()
    stop = torch.ones(count, 1)
    return {
        "kept": kept,
        "action_mask": torch.cat([kept, stop], 1),
        "effects": torch.randn(count, units, generator=generator).mul(4).round() / 4,  # some are equal
        "progress": torch.rand(count, 2, generator=generator),
    }


def probabilities(agent: PPO, observation: Observation) -> Tensor:
    with torch.no_grad():
        return agent.policy.get_distribution(observation).distribution.probs  # type: ignore[arg-type, attr-defined]


def permuted(graph: Data, order: Tensor) -> Data:
    """The graph whose node i is node order[i] of `graph`; edges come in another order, too."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    shuffle = torch.randperm(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(5))
    return Data(
        x=graph.x[order],
        edge_index=place[graph.edge_index][:, shuffle],
        edge_attr=graph.edge_attr[shuffle],
        feature_names=graph.feature_names,
    )


# --- equivariance and masks -----------------------------------------------------------------------------


def test_permuting_units_permutes_their_logits_alone(env: PruningEnv) -> None:
    units = len(env.index)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    network = stirred(agent_of(env)).policy.mlp_extractor
    other = PointerNetwork(permuted(env.graph, order), CONFIG)
    other.load_state_dict(network.state_dict())
    one = observations(units)
    two = {
        "kept": one["kept"][:, order],
        "action_mask": torch.cat([one["action_mask"][:, order], one["action_mask"][:, -1:]], 1),
        "effects": one["effects"][:, order],
        "progress": one["progress"],
    }
    with torch.no_grad():
        (logits, values), (moved, moved_values) = network(one), other(two)
    kept = two["kept"].bool()
    assert torch.allclose(moved[:, :-1][kept], logits[:, :-1][:, order][kept], atol=1e-4, rtol=1e-4)
    assert torch.allclose(moved[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.allclose(moved_values, values, atol=1e-4, rtol=1e-4)
    assert values.shape == (5, 1) and float(values.std()) > 1e-3
    assert float(logits[:, :-1][one["kept"].bool()].std()) > 0.1  # units differ, so their order shows


def test_edges_matter(env: PruningEnv) -> None:
    network = stirred(agent_of(env)).policy.mlp_extractor
    lonely = env.graph.clone()
    lonely.edge_index, lonely.edge_attr = lonely.edge_index[:, :0], lonely.edge_attr[:0]
    other = PointerNetwork(lonely, CONFIG)
    other.load_state_dict(network.state_dict())
    observation = observations(len(env.index))
    with torch.no_grad():
        assert not torch.allclose(network(observation)[0], other(observation)[0], atol=1e-2)


def test_invalid_actions_have_probability_zero(env: PruningEnv) -> None:
    agent, observation = stirred(agent_of(env)), observations(len(env.index))
    chances = probabilities(agent, observation)
    invalid = observation["action_mask"] == 0
    assert bool((chances[invalid] == 0).all())
    assert bool((chances[~invalid] > 0).all())
    assert torch.allclose(chances.sum(1), torch.ones(5))
    with torch.no_grad():
        actions = torch.stack([agent.policy(observation)[0] for _ in range(50)], 1)
    assert bool(observation["action_mask"].gather(1, actions).bool().all())


def test_all_pruned_leaves_stopping_and_a_finite_value(env: PruningEnv) -> None:
    units = len(env.index)
    observation = {
        "kept": torch.zeros(1, units),
        "action_mask": torch.tensor([[0.0] * units + [1.0]]),
        "effects": torch.zeros(1, units),
        "progress": torch.zeros(1, 2),
    }
    agent = stirred(agent_of(env))
    assert probabilities(agent, observation).tolist() == [[0.0] * units + [1.0]]
    with torch.no_grad():
        value = agent.policy.predict_values(observation)  # type: ignore[arg-type]
    assert bool(torch.isfinite(value).all())


def test_the_actor_and_critic_paths_agree(env: PruningEnv) -> None:
    network, observation = stirred(agent_of(env)).policy.mlp_extractor, observations(len(env.index))
    logits, values = network(observation)
    assert torch.equal(network.forward_actor(observation), logits)
    assert torch.equal(network.forward_critic(observation), values)


def test_remembered_embeddings_follow_the_weights(env: PruningEnv) -> None:
    agent, observation = stirred(agent_of(env)), observations(len(env.index))
    before = probabilities(agent, observation)
    with torch.no_grad():
        agent.policy.mlp_extractor.encoder.embed.weight.mul_(-1)
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


def all_kept(units: int, effects: Tensor) -> Observation:
    observation = observations(units, count=1)
    observation["kept"][:] = observation["action_mask"][:] = 1
    return {**observation, "effects": effects.reshape(1, -1)}


def test_an_untrained_policy_follows_the_prior(env: PruningEnv) -> None:
    """On the observation of the environment itself, where effects tie at most by chance."""
    reset = {key: torch.as_tensor(value).float().unsqueeze(0) for key, value in env.reset()[0].items()}
    score = env.effects["score"]
    assert torch.equal(reset["effects"][0], score)
    chances = probabilities(agent_of(env), reset)[0, :-1]
    ranks = torch.tensor([int((score > value).sum()) for value in score])
    prior = (1 + ranks.double()) ** -PRIOR_WEIGHT
    assert torch.allclose(chances.double() / chances.sum(), prior / prior.sum(), rtol=0.3)  # heads are nearly zero
    best = chances[score.argsort(descending=True)]
    assert bool((best[:-4] > best[4:]).all())  # monotone in rank, four ranks apart
    assert int(chances.argmax()) == int(score.argmax())


def test_without_head_noise_the_prior_is_exact(env: PruningEnv) -> None:
    units = len(env.index)
    effects = torch.randperm(units, generator=torch.Generator().manual_seed(2)).float()
    observation, agent = all_kept(units, effects), plain(agent_of(env))
    with torch.no_grad():
        logits = agent.policy.mlp_extractor(observation)[0][0]
    expected = -PRIOR_WEIGHT * (units - effects.double()).log()  # the best unit has rank 0
    assert torch.allclose(logits[:-1].double(), expected, atol=1e-5)
    assert float(logits[-1]) == -2.0  # stopping


def test_the_prior_looks_at_the_order_of_the_effects_alone(env: PruningEnv) -> None:
    units, agent = len(env.index), plain(agent_of(env))
    effects = torch.randn(units, generator=torch.Generator().manual_seed(2))
    before = probabilities(agent, all_kept(units, effects))
    assert torch.equal(before, probabilities(agent, all_kept(units, 1000 * effects - 7)))
    turned = probabilities(agent, all_kept(units, effects.flip(0)))
    assert torch.allclose(turned[:, :-1].flip(1), before[:, :-1], rtol=1e-4)


def test_equal_effects_share_a_rank_and_pruned_units_have_none(env: PruningEnv) -> None:
    units, agent = len(env.index), plain(agent_of(env))
    effects = torch.full((units,), -1.0)
    effects[[3, 5, 8, 11, 20]] = torch.tensor([9.0, 2.0, 2.0, 1.0, 7.0])
    observation = all_kept(units, effects)
    for key in ("kept", "action_mask"):
        observation[key][0, [3, 20]] = 0  # the two best
    with torch.no_grad():
        logits = agent.policy.mlp_extractor(observation)[0][0]
    assert float(logits[5]) == float(logits[8]) == 0  # rank 0, together
    assert float(logits[11]) == pytest.approx(-PRIOR_WEIGHT * math.log(3), abs=1e-5)
    others = torch.tensor([unit for unit in range(units) if unit not in (3, 5, 8, 11, 20)])
    assert torch.allclose(logits[others], torch.tensor(-PRIOR_WEIGHT * math.log(4)), atol=1e-5)
    assert bool((probabilities(agent, observation)[0, [3, 20]] == 0).all())
    uniform = probabilities(agent, all_kept(units, torch.zeros(units)))[0, :-1]
    assert bool((uniform == uniform[0]).all())


# --- weights --------------------------------------------------------------------------------------------


def test_the_graph_is_not_in_the_state_dict(env: PruningEnv) -> None:
    agent = agent_of(env)
    network = agent.policy.mlp_extractor
    names = set(agent.policy.state_dict())
    assert {name for name, _ in network.named_buffers()} == {"x", "edge_index", "edge_attr"}
    assert names == {name for name, _ in agent.policy.named_parameters()}
    assert all(len(env.index) not in value.shape for value in agent.policy.state_dict().values())


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


def test_weights_move_between_networks_of_different_size(env: PruningEnv, tmp_path: Path) -> None:
    trained, path = stirred(agent_of(env)), tmp_path / "policy.safetensors"
    save_weights(trained.policy, path)
    larger = make_env(width=9)
    assert len(larger.index) > len(env.index)
    agent = agent_of(larger, seed=4)
    observation = observations(len(larger.index))
    before = probabilities(agent, observation)
    load_checkpoint(agent.policy, path)
    agent.policy.load_state_dict(trained.policy.state_dict(), strict=True)
    weights = trained.policy.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in agent.policy.state_dict().items())
    after = probabilities(agent, observation)
    assert after.shape == (5, len(larger.index) + 1)
    assert not torch.allclose(before, after, atol=1e-3)


def test_safetensors_round_trip_gives_the_same_actions(env: PruningEnv, tmp_path: Path) -> None:
    trained, path = stirred(agent_of(env)), tmp_path / "policy.safetensors"
    save_weights(trained.policy, path)
    agent = agent_of(env, seed=9)
    observation = observations(len(env.index), count=20)
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
    observation = observations(len(env.index))
    assert torch.equal(probabilities(loaded, observation), probabilities(agent, observation))
