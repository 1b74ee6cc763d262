"""The graph: edges and features against values worked out by hand on tiny networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from onp import graph as graph_module
from onp.drawing import draw_graph
from onp.errors import ConfigError
from onp.graph import (
    EFFECTS,
    FEATURES,
    GraphConfig,
    activation_statistics,
    build_graph,
    connection_strengths,
    to_networkx,
    unlearning_signal,
)
from onp.models import build_model
from onp.units import index_units


def chain(first: list[list[float]], second: list[list[float]]) -> Any:
    """Two hidden linear layers with given weights on two pixels, then logits."""
    one, two = nn.Linear(2, len(first), bias=False), nn.Linear(len(first), len(second), bias=False)
    one.weight.data, two.weight.data = torch.tensor(first), torch.tensor(second)
    return nn.Sequential(nn.Flatten(), one, two, nn.Linear(len(second), 2, bias=False))


FIRST = [[1.0, 0.0], [-2.0, 0.1], [0.0, 1.0], [0.01, 0.0]]
SECOND = [[4.0, -2.0, 0.0, 1.0], [0.0, 0.0, -3.0, 0.0]]


class Residual(nn.Module):
    """A sum of stem and branch, read by a batch-norm and by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.behind = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        self.direct, self.out = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
        self.direct.weight.data = torch.tensor([[1.0, -2.0, 4.0], [3.0, 1.5, 0.3]]).view(2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        return self.out(self.behind(self.norm(x)) + self.direct(x)).mean((2, 3))


def graph_of(model: nn.Module, shape: tuple[int, ...], **settings: float) -> Data:
    inputs = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    config = GraphConfig(**settings)  # type: ignore[arg-type]
    return build_graph(index_units(model, shape), model, inputs, None, {}, config)


def edges(graph: Data, similar: bool, backward: bool = False) -> dict[tuple[int, int], float]:
    rows = zip(graph.edge_index.T.tolist(), graph.edge_attr.tolist(), strict=True)
    return {(a, b): weight for (a, b), (weight, *flags) in rows if flags == [float(similar), float(backward)]}


def column(graph: Data, feature: str) -> Tensor:
    return graph.x[:, FEATURES.index(feature)]


# --- edges ------------------------------------------------------------------------------------------------


def test_connection_strengths_are_l1_norms_of_kernels() -> None:
    conv = nn.Conv2d(2, 1, (1, 2))
    conv.weight.data = torch.tensor([[[[1.0, -2.0]], [[0.5, 0.25]]]])
    assert connection_strengths(conv).tolist() == [[3.0, 0.75]]
    assert connection_strengths(chain(FIRST, SECOND)[1])[1].tolist() == pytest.approx([2.0, 0.1])


def test_connection_strengths_of_groups_and_depthwise_convolutions_stand_at_their_inputs() -> None:
    grouped = nn.Conv1d(4, 2, 1, groups=2)
    grouped.weight.data = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert connection_strengths(grouped).tolist() == [[1, 2, 0, 0], [0, 0, 3, 4]]
    depthwise = nn.Conv2d(2, 4, 1, groups=2)
    depthwise.weight.data = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    assert connection_strengths(depthwise).tolist() == [[1, 0], [2, 0], [0, 3], [0, 4]]


def test_similar_units_are_joined_and_dormant_ones_are_not() -> None:
    found = edges(graph_of(chain(FIRST, SECOND), (1, 1, 2), similarity_threshold=0.9), similar=True)
    cosine = 2 / math.hypot(2, 0.1)
    assert found == pytest.approx({(0, 1): cosine, (1, 0): cosine})  # unit 3 points as unit 0, but is dormant
    awake = graph_of(chain(FIRST, SECOND), (1, 1, 2), similarity_threshold=0.9, dormant_threshold=0.0)
    assert set(edges(awake, similar=True)) == {(0, 1), (1, 0), (0, 3), (3, 0), (1, 3), (3, 1)}
    assert not edges(graph_of(chain(FIRST, SECOND), (1, 1, 2), similarity_threshold=0.999), similar=True)


def test_units_of_zero_strength_have_no_similarity_edge() -> None:
    model = chain([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]], SECOND)
    assert not edges(graph_of(model, (1, 1, 2), similarity_threshold=-1.0), similar=True).keys() & {(0, 1), (0, 3)}


def test_max_neighbours_keeps_the_most_similar() -> None:
    model = chain([[1.0, 0.0], [1.0, 0.1], [1.0, 0.5]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    found = edges(graph_of(model, (1, 1, 2), similarity_threshold=0.8, max_neighbours=1), similar=True)
    assert set(found) == {(0, 1), (1, 0), (1, 2), (2, 1)}  # unit 2 proposes unit 1; nobody proposes 0 and 2


def test_one_input_channel_gives_no_similarity_edges() -> None:
    model = build_model("small_cnn", 1, 10)
    found = edges(graph_of(model, (1, 8, 8), similarity_threshold=0.0), similar=True)
    assert found and min(min(pair) for pair in found) >= 64


def test_connectivity_runs_both_ways_with_strengths_over_the_greatest() -> None:
    graph = graph_of(chain(FIRST, SECOND), (1, 1, 2))
    forward = {(0, 4): 1.0, (1, 4): 0.5, (3, 4): 0.25, (2, 5): 1.0}
    assert edges(graph, similar=False) == forward
    assert edges(graph, similar=False, backward=True) == {(b, a): weight for (a, b), weight in forward.items()}
    limited = edges(graph_of(chain(FIRST, SECOND), (1, 1, 2), max_inputs=2), similar=False)
    assert limited == {(0, 4): 1.0, (1, 4): 0.5, (2, 5): 1.0}


def test_readers_of_a_residual_sum_connect_to_every_writer() -> None:
    model = Residual()
    index = index_units(model, (1, 2, 2))
    start = {layer.name: layer.offset for layer in index}
    found = edges(graph_of(model, (1, 2, 2)), similar=False)
    into = {reader: {a: w for (a, b), w in found.items() if b == reader} for reader in range(len(index))}
    for channel in range(3):
        writers = {start["stem"] + channel: 1.0, start["branch"] + channel: 1.0}
        assert into[start["norm"] + channel] == writers
    for unit, weights in enumerate(([0.25, 0.5, 1.0], [1.0, 0.5, 0.1])):
        expected = {start[name] + channel: w for name in ("stem", "branch") for channel, w in enumerate(weights)}
        assert into[start["direct"] + unit] == pytest.approx(expected)


def test_flattened_positions_connect_to_their_channel_and_compare_outgoing_strengths() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    weight = torch.tensor([[1.0, 2, 1, 1, 0, 0, 0, 0], [0.0, 0, 1, 0, 1, 1, 1, 1]])
    model[2].weight.data = weight
    graph = graph_of(model, (1, 2, 2), similarity_threshold=0.99)
    assert edges(graph, similar=False) == {(position // 4, 2 + position): 1.0 for position in range(8)}
    alike = [{0, 1, 3}, {4, 5, 6, 7}]
    assert set(edges(graph, similar=True)) == {(2 + a, 2 + b) for part in alike for a in part for b in part if a != b}
    outgoing = column(graph, "outgoing_strength")[:2]  # channel norms: through the positions, sqrt(8) and sqrt(4)
    assert outgoing.tolist() == pytest.approx([1.0, -1.0])


def test_chunks_do_not_change_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # no similarity within rounding of the threshold
    model = build_model("small_cnn", 3, 10)
    whole = graph_of(model, (3, 8, 8))
    monkeypatch.setattr(graph_module, "_CHUNK", 100)
    assert edges(whole, True).keys() == edges(graph_of(model, (3, 8, 8)), True).keys()


def test_wide_layers_compare_only_the_strongest_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("small_cnn", 3, 10)
    monkeypatch.setattr(graph_module, "_SIMILARITY_BUDGET", 1)
    found = edges(graph_of(model, (3, 8, 8), similarity_threshold=0.0), True)
    strengths = connection_strengths(model.get_submodule("features.4"))
    strengths = strengths[:, strengths.square().sum(0).argsort(descending=True)[:2]]
    assert len(found) > 128
    for (a, b), weight in found.items():
        if 64 <= a < 192:
            cosine = torch.cosine_similarity(strengths[a - 64], strengths[b - 64], 0)
            assert weight == pytest.approx(float(cosine), abs=1e-5)


# --- node features ----------------------------------------------------------------------------------------


def test_activation_statistics_of_a_linear_layer() -> None:
    model = chain(FIRST, SECOND).train()
    index = index_units(model, (1, 1, 2))
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).view(2, 1, 1, 2)
    statistics = activation_statistics(index, model, inputs, batch_size=1)
    assert statistics[0].tolist() == pytest.approx([2.0, 1.0, 1.0, 3.0])
    assert statistics[2].tolist() == pytest.approx([0.5, 1.5, 0.5, 2.0])
    assert model.training and not model[1]._forward_hooks


def test_activation_statistics_run_over_positions_and_see_inputs_of_flattened_positions() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    model[0].weight.data.fill_(2.0)
    inputs = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, -1]]).view(2, 1, 2, 2)
    statistics = activation_statistics(index_units(model, (1, 2, 2)), model, inputs)
    assert statistics[0].tolist() == pytest.approx([0.5, math.sqrt(1.75), 3 / 8, 2.0])
    assert statistics[1].tolist() == pytest.approx([2.0, 0.0, 1.0, 2.0])
    assert statistics[4].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_features_by_hand() -> None:
    model = chain(FIRST, SECOND)
    index = index_units(model, (1, 1, 2))
    score = torch.tensor([0.0, 3.0, 1.0, 3.0, -1.0, 0.0])
    graph = build_graph(index, model, torch.ones(2, 1, 1, 2), None, {"score": score})
    assert graph.x.shape == (6, len(FEATURES)) and graph.x.dtype == torch.float32
    assert graph.layer.tolist() == [0, 0, 0, 0, 1, 1] and graph.feature_names == list(FEATURES)
    assert column(graph, "outgoing_strength")[:4].tolist() == pytest.approx(
        [(strength - 2.5) / math.sqrt(1.25) for strength in (4, 2, 3, 1)]
    )
    assert column(graph, "incoming_strength")[4:].tolist() == pytest.approx([1.0, -1.0])
    root_mean_square = math.sqrt(20 / 6)
    assert column(graph, "effect_score").tolist() == pytest.approx((score / root_mean_square).tolist())
    assert column(graph, "position").tolist() == [0, 0, 0, 0, 1, 1]
    assert column(graph, "kind_linear").eq(1).all() and column(graph, "kind_conv").eq(0).all()
    for feature in ("gamma", "weight_change", "activation_std", *(f"effect_{name}" for name in EFFECTS[1:])):
        assert column(graph, feature).eq(0).all(), feature


def test_weight_change_is_averaged_over_gates_and_kernels() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    after = copy.deepcopy(model)
    after[0].weight.data[1] += torch.tensor([[[0.5, -0.7]]])
    after[1].weight.data[1] -= 0.8
    after[0].bias.data += 9.0  # behind a batch-norm it does nothing
    assert unlearning_signal(model, after, index_units(model, (1, 1, 2))).tolist() == pytest.approx([0.0, 0.5])


def test_weight_change_of_flattened_positions_is_that_of_their_column() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2))
    after = copy.deepcopy(model)
    after[2].weight.data[:, 2] += torch.tensor([1.0, -3.0])
    after[0].bias.data += 0.5
    signal = unlearning_signal(model, after, index_units(model, (1, 2, 2)))
    assert signal.tolist() == pytest.approx([0.25, 0.0, 0.0, 2.0, 0.0])


def test_features_stay_finite_where_weights_and_effects_are_not() -> None:
    model = build_model("small_cnn", 1, 10)
    broken = copy.deepcopy(model)
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    index = index_units(model, (1, 8, 8))
    effects = {"score": torch.full((len(index),), torch.inf)}
    assert torch.isfinite(build_graph(index, model, torch.zeros(2, 1, 8, 8), broken, effects).x).all()


@pytest.mark.parametrize("effects", [{"scor": torch.zeros(6)}, {"score": torch.zeros(3)}])
def test_effects_that_do_not_fit_are_refused(effects: dict[str, Tensor]) -> None:
    model = chain(FIRST, SECOND)
    with pytest.raises(ConfigError, match=r"give \(6,\) tensors named score, clean_fidelity"):
        build_graph(index_units(model, (1, 1, 2)), model, torch.zeros(2, 1, 1, 2), None, effects)


def test_permuted_units_permute_the_graph(randomised: Callable[..., nn.Module]) -> None:
    def permuted(model: Any) -> Any:
        model = copy.deepcopy(model)
        for tensor in (model[0].weight, model[0].bias, *model[1].parameters(), *model[1].buffers()):
            if tensor.ndim:
                tensor.data = tensor.data[order]
        model[3].weight.data = model[3].weight.data[:, order]
        return model

    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.Flatten(), nn.Linear(20, 4)
    )
    model, unlearned = randomised(model), randomised(copy.deepcopy(model), seed=1)
    order = torch.randperm(12)
    units = torch.cat([order, torch.arange(12, 37)])  # new number -> old number
    index, inputs, config = index_units(model, (3, 6, 6)), torch.rand(7, 3, 6, 6), GraphConfig(0.9, 0.25, 3, 3)
    score = torch.randn(37)
    plain = build_graph(index, model, inputs, unlearned, {"score": score}, config)
    other = build_graph(index, permuted(model), inputs, permuted(unlearned), {"score": score[units]}, config)
    torch.testing.assert_close(other.x, plain.x[units])
    for similar, backward in ((True, False), (False, False), (False, True)):
        renamed = {(int(units[a]), int(units[b])): w for (a, b), w in edges(other, similar, backward).items()}
        assert renamed == pytest.approx(edges(plain, similar, backward))


# --- export -----------------------------------------------------------------------------------------------


def test_networkx_graph_survives_graphml(tmp_path: Path) -> None:
    model = Residual()
    index = index_units(model, (1, 2, 2))
    graph = graph_of(model, (1, 2, 2), similarity_threshold=0.5)
    exported = to_networkx(graph, index)
    assert len(exported) == len(index)
    assert exported.number_of_edges() * 2 == graph.num_edges
    assert exported.nodes[1]["name"] == "stem[1]" and exported.nodes[1]["kind"] == "conv"
    assert exported.nodes[1]["group"] == exported.nodes[4]["group"] != exported.nodes[0]["group"]
    assert exported.nodes[3]["layer"] == 1 and exported.nodes[3]["gamma"] == float(column(graph, "gamma")[3])
    forward = {(a, b): w for a, b, w in exported.edges(data="weight") if exported[a][b]["relation"] == "connectivity"}
    assert forward == edges(graph, similar=False)
    nx.write_graphml(exported, tmp_path / "graph.graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml", node_type=int)
    assert dict(read.nodes(data=True)) == dict(exported.nodes(data=True))
    assert {(a, b): facts for a, b, facts in read.edges(data=True)} == {
        (a, b): facts for a, b, facts in exported.edges(data=True)
    }


@pytest.mark.parametrize("pruned", [set(), {0, 70, 319}, set(range(60))])
def test_drawing_writes_a_picture(tmp_path: Path, pruned: set[int]) -> None:
    model = build_model("small_cnn", 1, 10)
    exported = to_networkx(graph_of(model, (1, 8, 8)), index_units(model, (1, 8, 8)))
    draw_graph(exported, tmp_path / "graph.png", pruned)
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_make_no_graph() -> None:
    with pytest.raises(ConfigError, match=r"GraphConfig\.max_inputs -1: expected at least 0"):
        GraphConfig(max_inputs=-1)
