"""The policy: a graph attention network over units, as a Stable-Baselines3 actor-critic.

An encoder of graph attention layers (GATv2, Brody et al. 2022) embeds every unit once per update; a light decoder
reads the embeddings for each observation and points at the unit to prune or restore next (the encode-once,
decode-per-step scheme of Kool et al. 2019). Every parameter is shared between units, so scores are
permutation-equivariant and the same weights fit a network of any size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GATv2Conv
from torch_geometric.utils import scatter

from onp.config import AgentConfig
from onp.errors import ConfigError

Latents = tuple[Tensor, Tensor]


class GraphEncoder(nn.Module):
    """Embeds the nodes of a unit graph: (N, features) to (N, hidden)."""

    def __init__(self, features: int, edge_features: int, config: AgentConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(features, config.hidden)
        self.attention = nn.ModuleList(
            GATv2Conv(config.hidden, config.hidden // config.heads, config.heads, edge_dim=edge_features)
            for _ in range(config.layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(config.layers))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        hidden = self.embed(x)
        for attention, norm in zip(self.attention, self.norms, strict=True):
            hidden = hidden + attention(norm(hidden), edge_index, edge_attr).relu()
        return hidden


class PointerNetwork(nn.Module):
    """Observation to masked action logits (batch, N + B + 1) and values (batch, 1).

    A unit is read by its embedding, a bulk action by the mean embedding of its layer and the size of its bite. What
    speaks for pruning a unit speaks against restoring it. The logits start at a prior, minus a multiple of the log of
    an action's rank by the estimated effects in the observation, so that an untrained policy samples near the
    gradient's choice, whatever the network's size.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    layer: Tensor
    bulk_layer: Tensor
    bites: Tensor

    def __init__(self, graph: Data, config: AgentConfig) -> None:
        super().__init__()
        # Not persistent: the graph belongs to one network, the weights to any.
        self.register_buffer("x", graph.x, persistent=False)
        self.register_buffer("edge_index", graph.edge_index, persistent=False)
        self.register_buffer("edge_attr", graph.edge_attr, persistent=False)
        self.register_buffer("layer", graph.layer, persistent=False)
        self.register_buffer("bulk_layer", graph.bulk_layer, persistent=False)
        sizes = torch.bincount(graph.layer)[graph.bulk_layer]
        bites = torch.stack([graph.bulk_count.log2() / 10, graph.bulk_count / sizes], 1)
        self.register_buffer("bites", bites, persistent=False)
        hidden = config.hidden
        self.bulk = nn.Linear(hidden + 2, hidden)
        self.encoder = GraphEncoder(graph.x.shape[1], graph.edge_attr.shape[1], config)
        self.context = nn.Sequential(nn.Linear(2 * hidden + 2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.query = nn.Linear(hidden, hidden)
        self.bias = nn.Linear(hidden, 1)
        self.stop = nn.Linear(hidden, 1)
        self.value = nn.Linear(hidden, 1)
        self.prior_weight = nn.Parameter(torch.tensor(3.0))
        for head in (self.query, self.bias, self.stop):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.stop.bias, -2.0)
        self._embedding: tuple[Tensor, Tensor] | None = None

    def forward(self, observation: dict[str, Tensor]) -> Latents:
        embedding, context = self._read(observation)
        return self._logits(embedding, context, observation), self.value(context)

    def forward_actor(self, observation: dict[str, Tensor]) -> Tensor:
        embedding, context = self._read(observation)
        return self._logits(embedding, context, observation)

    def forward_critic(self, observation: dict[str, Tensor]) -> Tensor:
        return self.value(self._read(observation)[1])

    def _read(self, observation: dict[str, Tensor]) -> Latents:
        embedding, kept = self._embed(), observation["kept"]
        pruned = 1 - kept
        mean_kept = kept @ embedding / kept.sum(1, keepdim=True).clamp(min=1)
        mean_pruned = pruned @ embedding / pruned.sum(1, keepdim=True).clamp(min=1)
        return embedding, self.context(torch.cat([mean_kept, mean_pruned, observation["progress"]], 1))

    def _embed(self) -> Tensor:
        """Embeddings of all units; between updates they are computed once."""
        if torch.is_grad_enabled():
            return self.encoder(self.x, self.edge_index, self.edge_attr)
        weights = nn.utils.parameters_to_vector(self.encoder.parameters())  # no version of theirs tells of every write
        if self._embedding is None or not torch.equal(self._embedding[0], weights):
            self._embedding = (weights, self.encoder(self.x, self.edge_index, self.edge_attr))
        return self._embedding[1]

    def _logits(self, embedding: Tensor, context: Tensor, observation: dict[str, Tensor]) -> Tensor:
        layers = scatter(embedding, self.layer, reduce="mean")
        bulks = self.bulk(torch.cat([layers[self.bulk_layer], self.bites], 1))
        choices = torch.cat([embedding, bulks])
        pruning = self.query(context) @ choices.T / math.sqrt(choices.shape[1]) + self.bias(choices).T
        signs = nn.functional.pad(2 * observation["kept"] - 1, (0, len(bulks)), value=1.0)
        effects = observation["effects"].masked_fill(observation["action_mask"][:, :-1] < 0.5, -torch.inf)
        # Ties share a rank: the prior must not depend on how units are numbered.
        rank = effects.shape[1] - torch.searchsorted(effects.sort(dim=1).values, effects, right=True)
        acting = signs * pruning - self.prior_weight * torch.log1p(rank)
        logits = torch.cat([acting, self.stop(context)], 1)
        if not bool(logits.isfinite().all()):
            raise ConfigError("the policy's outputs are not finite; lower --agent.learning-rate, or leave --policy out")
        return logits.masked_fill(observation["action_mask"] < 0.5, -1e8)


def blank_policy(config: AgentConfig, features: int, edge_features: int) -> GraphPolicy:
    """A policy over a graph of one unit, to hold or to check weights."""
    graph = Data(torch.zeros(1, features), torch.empty(2, 0, dtype=torch.long), torch.empty(0, edge_features))
    graph.layer, graph.bulk_layer, graph.bulk_count = torch.zeros(1).long(), torch.zeros(0).long(), torch.zeros(0)
    space = spaces.Dict({"kept": spaces.MultiBinary(1)})
    return GraphPolicy(space, spaces.Discrete(2), lambda _: 0.0, graph=graph, config=config)


class PassThrough(BaseFeaturesExtractor):
    """Hands the dict observation on as it is."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        return observations


class GraphPolicy(ActorCriticPolicy):
    """Stable-Baselines3 policy for `PruningEnv`: pass `policy_kwargs={"graph": env.unwrapped.graph}`.

    Invalid actions get no probability: the policy masks its logits from the observation's `action_mask`.
    """

    def __init__(self, *args: Any, graph: Data, config: AgentConfig | None = None, **kwargs: Any) -> None:
        self.graph, self.config = graph, config or AgentConfig()
        super().__init__(*args, **{"features_extractor_class": PassThrough, **kwargs})

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = PointerNetwork(self.graph, self.config)  # type: ignore[assignment]
        self.action_net = self.value_net = nn.Identity()  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "graph": self.graph, "config": self.config}
