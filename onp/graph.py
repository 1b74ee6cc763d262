"""The graph of a network: units are nodes, joined by similarity inside a layer and by connectivity between layers.

ONP (arXiv 2405.17746): the connection strength of a unit is the vector of L1 norms of its incoming kernels; two units
of a layer are joined where the cosine of their strengths exceeds a threshold. Our assumptions: connectivity edges,
outgoing strengths for units without kernels (`batch_norm`, `linear_input`), limits per unit, and the node features:

| feature                                  | meaning                                                        | scale    |
|------------------------------------------|----------------------------------------------------------------|----------|
| `activation_mean`, `_std`, `_max`        | the unit's output on clean images (`linear_input`: its input)  | layer    |
| `activation_positive`                    | fraction of these values above zero                            | as it is |
| `gamma`                                  | absolute batch-norm weight, 0 without batch-norm               | layer    |
| `incoming_strength`, `outgoing_strength` | L2 norm of the L1 norms of its kernels; of those that read it  | layer    |
| `weight_change`                          | `unlearning_signal`, 0 without an unlearned copy               | layer    |
| `effect_...` (see `EFFECTS`)             | first-order effects of pruning the unit, 0 where not given     | network  |
| `position`                               | number of the layer, from 0 (first) to 1 (last)                | as it is |
| `kind_conv`, ..., `kind_linear_input`    | one-hot `UnitLayer.kind`; all 0 for heads                      | as it is |

Scale `layer`: mean 0 and variance 1 over the layer's units. Scale `network`: divided by the root mean square over all
units, so that 0 stays "no effect". Both are cut off at +-10; no variance gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import coalesce

from onp.attention import heads_alone, value_kernels
from onp.config import require
from onp.errors import ConfigError
from onp.flow import Reads
from onp.units import KINDS, UnitIndex, UnitLayer

ACTIVATIONS = ("activation_mean", "activation_std", "activation_positive", "activation_max")
EFFECTS = ("score", "clean_fidelity", "unlearning", "trigger_resistance", "clean_loss")
"""effects that `build_graph` takes: on the potential, on its terms, on the clean cross-entropy"""
FEATURES: tuple[str, ...] = (
    *ACTIVATIONS, "gamma", "incoming_strength", "outgoing_strength", "weight_change",
    *(f"effect_{effect}" for effect in EFFECTS), "position", *(f"kind_{kind}" for kind in KINDS[:-1]),
)  # fmt: skip
"""node features: the columns of `Data.x`"""
EDGE_FEATURES: tuple[str, ...] = ("weight", "similarity", "backward")
"""edge features: the columns of `Data.edge_attr`; the last two are flags"""

_SIMILARITY_BUDGET = 10**11  # multiplications a layer; above it only its strongest connections are compared
_CHUNK = 2**24  # similarities held at a time

Edges = tuple[Tensor, Tensor]
"""pairs of nodes (2, E) and their weights (E,)"""


@dataclass(frozen=True)
class GraphConfig:
    """What becomes an edge; the paper has two thresholds and gives neither, so the values are ours."""

    def __post_init__(self) -> None:
        require(self, similarity_threshold=-1, dormant_threshold=0, max_neighbours=0, max_inputs=0)

    similarity_threshold: float = 0.9
    """join units whose strengths have a higher cosine (its median in trained 3 x 3 layers is 0.84 to 0.93)"""
    dormant_threshold: float = 0.25
    """a unit whose strength norm is below this fraction of its layer's median is dormant: no similarity edges"""
    max_neighbours: int = 8
    """similarity edges that a unit proposes, the strongest first"""
    max_inputs: int = 8
    """input channels per unit that get connectivity edges, the strongest first"""


def build_graph(
    index: UnitIndex, model: nn.Module, inputs: Tensor, unlearned: nn.Module | None,
    effects: Mapping[str, Tensor], config: GraphConfig = GraphConfig(),
) -> Data:  # fmt: skip
    """The graph of `model`; nodes are the units of `index`, in its order.

    `inputs` are clean, normalised images (n, channels, height, width); `effects` maps `EFFECTS` to (N,) tensors.
    Returns, on the CPU, x (N, F) float32 with columns `FEATURES`, edge_index (2, E), edge_attr (E, 3) with columns
    `EDGE_FEATURES`, `feature_names`, and `layer` and `kind` (N,) int64. All edges come in both directions; `backward`
    flags the connectivity edges that run from reader to writer.
    """
    outgoing, outgoing_norms = _outgoing_strengths(index, model)
    similarity, connectivity = list[Edges](), list[Edges]()
    for number, layer in enumerate(index):
        strengths = connection_strengths(model.get_submodule(layer.weight)) if layer.weight else outgoing[number]
        similarity += _similarity_edges(strengths, layer.offset, config)
        connectivity += _connectivity_edges(model, layer, config)
    alike, cosines = _join(similarity, len(index))
    forward, weights = _join(connectivity, len(index))
    sizes = torch.tensor([len(cosines), len(weights), len(weights)])
    flags = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]).repeat_interleave(sizes, 0)
    return Data(
        x=_features(index, model, inputs, unlearned, effects, outgoing_norms),
        edge_index=torch.cat([alike, forward, forward.flip(0)], 1),
        edge_attr=torch.cat([torch.cat([cosines, weights, weights]).unsqueeze(1), flags], 1),
        feature_names=list(FEATURES),
        layer=index.layer_of,
        kind=torch.tensor([KINDS.index(layer.kind) for layer in index])[index.layer_of],
    )


def connection_strengths(module: nn.Module) -> Tensor:
    """L1 norms of a convolution's or linear layer's kernels (ONP), shape (outputs, inputs); 0 across groups.

    A head's kernel is its part of the value projection: of an attention they have shape (heads, inputs).
    """
    if isinstance(module, nn.MultiheadAttention):
        return value_kernels(module).detach().float().cpu().abs().unflatten(0, (module.num_heads, -1)).sum(1)
    weight = module.get_parameter("weight").detach().float().cpu()
    kernels = weight.flatten(2).abs().sum(2) if weight.ndim > 2 else weight.abs()
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return kernels
    outputs, width = kernels.shape
    columns = (torch.arange(outputs) // (outputs // groups) * width).unsqueeze(1) + torch.arange(width)
    return torch.zeros(outputs, width * groups).scatter(1, columns, kernels)


def _outgoing_strengths(index: UnitIndex, model: nn.Module) -> tuple[dict[int, Tensor], Tensor]:
    """How strongly kernels read units: (size, kernels) per layer without own kernels; norms of all units, (N,)."""
    blocks: dict[int, list[Tensor]] = {number: [] for number, layer in enumerate(index) if layer.weight is None}
    squares = torch.zeros(len(index))
    readers = [(layer.weight, number, layer.reads) for number, layer in enumerate(index)]
    readers += [(output.module, -1, output.reads) for output in index.outputs]
    for layer in index:
        if layer.kind == "head" and layer.weight is not None:
            columns = torch.tensor(layer.units).repeat_interleave(layer.width)
            readers.append((f"{layer.module}.out_proj", -1, Reads(-1, (columns,))))
    matrices: dict[int, Tensor] = {}
    for weight, number, reads in reversed(readers):
        if weight is None:
            parts = blocks.pop(number) or [torch.zeros(index.layers[number].size, 0)]
            matrices[number] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        strengths = connection_strengths(model.get_submodule(weight)).T if weight else matrices[number]
        for units in _writers(reads, len(strengths)):
            known = (units >= 0).nonzero().flatten()
            squares.index_add_(0, units[known], strengths.norm(dim=1)[known].square())
            for written in set(index.layer_of[units[known]].tolist()) & blocks.keys():
                layer, channels = index.layers[written], known[index.layer_of[units[known]] == written]
                block = torch.zeros(layer.size, strengths.shape[1])
                blocks[written].append(block.index_add_(0, units[channels] - layer.offset, strengths[channels]))
    return matrices, squares.sqrt()


def _writers(reads: Reads | None, channels: int) -> tuple[Tensor, ...]:
    """The overlays of writing units; none where the trace does not account for just these channels."""
    return () if reads is None or reads.units[0].numel() != channels else reads.units


def _similarity_edges(strengths: Tensor, offset: int, config: GraphConfig) -> list[Edges]:
    """Edges inside a layer, in both directions, from strengths (size, connections); one connection gives none."""
    norms = strengths.norm(dim=1)
    awake = ((norms > 0) & (norms >= config.dormant_threshold * norms.median())).nonzero().flatten()
    strengths = strengths[awake]
    neighbours = min(config.max_neighbours, len(awake) - 1)
    if strengths.shape[1] < 2 or neighbours < 1:
        return []
    compared = max(2, _SIMILARITY_BUDGET // len(awake) ** 2)
    if strengths.shape[1] > compared:
        strengths = strengths[:, strengths.norm(dim=0).topk(compared).indices]
    directions = nn.functional.normalize(strengths)
    edges = []
    for some in torch.split(torch.arange(len(awake)), max(1, _CHUNK // len(awake))):
        cosine = directions[some] @ directions.T
        cosine[torch.arange(len(some)), some] = -1.0
        best = cosine.topk(neighbours)
        row, column = (best.values > config.similarity_threshold).nonzero().unbind(1)
        pairs = awake[torch.stack([some[row], best.indices[row, column]])] + offset
        edges += [(ends, best.values[row, column].clamp(0, 1)) for ends in (pairs, pairs.flip(0))]
    return edges


def _connectivity_edges(model: nn.Module, layer: UnitLayer, config: GraphConfig) -> list[Edges]:
    """Edges from writing units to the units of `layer`, weighted by strength over the reader's greatest strength."""
    if layer.weight is None:
        reader = channel = torch.arange(layer.size)
        overlays, weight = _writers(layer.reads, layer.size), torch.ones(layer.size)
    else:
        strengths = connection_strengths(model.get_submodule(layer.weight))
        overlays = _writers(layer.reads, strengths.shape[1])
        if not overlays:
            return []
        strengths /= strengths.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        strengths *= (torch.stack(overlays) >= 0).any(0)
        best = strengths.topk(min(config.max_inputs, strengths.shape[1]))
        reader, column = (best.values > 0).nonzero().unbind(1)
        channel, weight = best.indices[reader, column], best.values[reader, column]
    pairs = [torch.stack([units[channel], reader + layer.offset]) for units in overlays]
    return [(ends[:, ends[0] >= 0], weight[ends[0] >= 0]) for ends in pairs]


def _join(edges: list[Edges], nodes: int) -> Edges:
    """All edges of one relation, sorted; of repeated ones the strongest."""
    pairs = torch.cat([torch.zeros(2, 0, dtype=torch.long), *(ends for ends, _ in edges)], 1)
    weights = torch.cat([torch.zeros(0), *(weight for _, weight in edges)])
    return coalesce(pairs, weights, num_nodes=nodes, reduce="max")


def unlearning_signal(before: nn.Module, after: nn.Module, index: UnitIndex) -> Tensor:
    """Mean absolute weight change per unit, shape (N,), over its gates and the kernels that write it (heads: gates).

    `after` comes from RNP unlearning (arXiv 2305.14876, section 3).
    """
    signal = torch.zeros(len(index))
    for layer in index:
        slices = dict(layer.gates)
        if layer.weight is not None and layer.kind != "head":
            slices[f"{layer.weight}.weight"] = 0
        total, entries = torch.zeros(layer.size), 0
        for name, axis in slices.items():
            old, new = (model.get_parameter(name).detach().float().cpu() for model in (before, after))
            change = (new - old).abs().movedim(axis, 0).reshape(layer.size, -1)
            total, entries = total + change.sum(1), entries + change.shape[1]
        signal[layer.units] = total / entries
    return signal


@torch.no_grad()
def activation_statistics(index: UnitIndex, model: nn.Module, inputs: Tensor, batch_size: int = 50) -> Tensor:
    """Mean, standard deviation, fraction above 0 and maximum of every unit's output, shape (N, 4).

    `inputs` has shape (n, channels, height, width); statistics run over images and positions, in eval mode.
    """
    sums = torch.zeros(len(index), 4, dtype=torch.double)  # of 1, x, x^2 and x > 0
    maxima = torch.full((len(index),), -torch.inf)

    def record(layer: UnitLayer, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        axis = 1 if layer.kind in ("conv", "batch_norm") or layer.batch_norm is not None else -1
        if layer.kind == "head":
            written = heads_alone(module)(*args, **kwargs)[0] if isinstance(module, nn.MultiheadAttention) else args[0]
            output = written.unflatten(-1, (layer.size, layer.width)).transpose(-1, -2)
        values = (args[0] if layer.kind == "linear_input" else output).float().movedim(axis, 0).flatten(1)
        variance, mean = (moment.cpu().double() for moment in torch.var_mean(values, 1, correction=0))
        positive = (values > 0).float().mean(1).cpu().double()
        moments = torch.stack([torch.ones_like(mean), mean, variance + mean**2, positive], 1)
        sums[layer.units] += values.shape[1] * moments
        maxima[layer.units] = torch.maximum(maxima[layer.units], values.amax(1).cpu())

    modes = {module: module.training for module in model.modules()}
    hooks = [
        model.get_submodule(layer.module).register_forward_hook(partial(record, layer), with_kwargs=True)
        for layer in index
    ]
    try:
        model.eval()
        for batch in torch.split(inputs, batch_size):
            model(batch)
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    mean, square, positive = (sums[:, 1:] / sums[:, :1].clamp(min=1)).unbind(1)
    return torch.stack([mean, (square - mean**2).clamp(min=0).sqrt(), positive, maxima], 1).float()


def _features(
    index: UnitIndex, model: nn.Module, inputs: Tensor, unlearned: nn.Module | None,
    effects: Mapping[str, Tensor], outgoing: Tensor,
) -> Tensor:  # fmt: skip
    """The node features, shape (N, F), finite; see the table at the top of this module."""
    unknown, n = sorted(set(effects) - set(EFFECTS)), len(index)
    if unknown or any(effect.shape != (n,) for effect in effects.values()):
        raise ConfigError(f"effects {unknown or ''} do not fit; give ({n},) tensors named {', '.join(EFFECTS)}")
    columns = dict(zip(ACTIVATIONS, activation_statistics(index, model, inputs).unbind(1), strict=True))
    gamma, incoming = columns["gamma"], columns["incoming_strength"] = torch.zeros(2, n)
    for layer in index:
        if layer.batch_norm is not None:
            gamma[layer.units] = model.get_parameter(f"{layer.batch_norm}.weight").detach().float().cpu().abs()
        if layer.weight is not None:
            incoming[layer.units] = connection_strengths(model.get_submodule(layer.weight)).norm(dim=1)
    columns["outgoing_strength"] = outgoing
    columns["weight_change"] = torch.zeros(n) if unlearned is None else unlearning_signal(model, unlearned, index)
    for name, values in columns.items():
        if name != "activation_positive":
            columns[name] = torch.cat([_standardise(values[layer.units]) for layer in index])
    for name in EFFECTS:
        effect = _finite(effects.get(name, torch.zeros(n)))
        columns[f"effect_{name}"] = effect / effect.square().mean().sqrt().clamp(min=1e-30)
    columns["position"] = index.layer_of / max(1, len(index.layers) - 1)
    for kind in KINDS[:-1]:
        columns[f"kind_{kind}"] = torch.tensor([layer.kind == kind for layer in index])[index.layer_of]
    return torch.stack([_finite(columns[name]).clamp(-10, 10) for name in FEATURES], 1).float()


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values.detach().cpu().double(), 0.0, 0.0, 0.0)


def _standardise(values: Tensor) -> Tensor:
    values = _finite(values)
    deviation = values.std(correction=0)
    varies = deviation > 1e-6 * values.abs().max()
    return (values - values.mean()) / deviation if varies else torch.zeros_like(values)


def to_networkx(graph: Data, index: UnitIndex) -> nx.DiGraph:
    """The graph for networkx and, through `nx.write_graphml`, for Gephi and its like; every connection comes once.

    Nodes have name, layer, kind, group and all features; edges have weight and relation ("similarity", "connectivity").
    """
    result = nx.DiGraph()
    for unit, (number, features) in enumerate(zip(index.layer_of.tolist(), graph.x.tolist(), strict=True)):
        kind, group = index.layers[number].kind, int(index.groups[unit])
        values = dict(zip(graph.feature_names, features, strict=True))
        result.add_node(unit, name=index.name(unit), layer=number, kind=kind, group=group, **values)
    for one, two, weight, similar, backward in torch.cat([graph.edge_index.T.double(), graph.edge_attr], 1).tolist():
        if one < two if similar else not backward:
            result.add_edge(int(one), int(two), weight=weight, relation="similarity" if similar else "connectivity")
    return result


if __name__ == "__main__":
    from onp.graph_command import main

    main()
