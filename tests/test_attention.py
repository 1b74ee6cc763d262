"""Heads of attention are units: pruning one takes what it writes, and only that, out of the attention's output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from by_hand import effects_by_weights
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from onp.attention import heads_alone
from onp.engine import Engine
from onp.errors import ModelError
from onp.graph import FEATURES, activation_statistics, build_graph, connection_strengths, unlearning_signal
from onp.masks import KeepMask, apply_mask, masked
from onp.units import UnitIndex, UnitLayer, index_units

HEADS, DIM = 4, 3


class Attends(nn.Module):
    """Patches attend to each other; `attend(net, tokens)` gives the attention's output, both (n, 4 tokens, 12)."""

    def __init__(self, attend: Callable[[Any, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(1, HEADS * DIM, 4, 4), nn.LayerNorm(HEADS * DIM), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, **options)
        self.qkv, self.project = nn.Linear(12, 36), nn.Linear(12, 12)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([nn.init.xavier_uniform_(torch.empty(12, 12)) for _ in range(3)]))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attend(self, self.norm(x))
        return self.head(x.mean(1))


def itself(net: Any, x: Tensor) -> Tensor:
    return net.attention(x, x, x, need_weights=False)[0]


def tokens_first(net: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    y, _ = net.attention(x, x, value=x)
    return y.transpose(0, 1)


def across(net: Any, x: Tensor) -> Tensor:
    return net.attention(x, x[:, :2], torch.cat([x, x], 2)[:, :2])[0]


def twice(net: Any, x: Tensor) -> Tensor:
    return itself(net, itself(net, x))


def written_out(net: Any, x: Tensor) -> Tensor:
    """The same by matrix products, with the attention's weights in two linear layers."""
    n, tokens, width = x.shape
    query, key, value = net.qkv(x).reshape(n, tokens, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.transpose(-2, -1) / sqrt(DIM)).softmax(-1)
    return net.project((weights @ value).transpose(1, 2).reshape(n, tokens, width))


def fused(net: Any, x: Tensor) -> Tensor:
    query, key, value = net.qkv(x).unflatten(2, (3, HEADS, DIM)).transpose(1, 3).unbind(2)
    y = nn.functional.scaled_dot_product_attention(query, key, value)
    return net.project(nn.functional.dropout(y.permute(0, 2, 1, 3).flatten(2), 0.5, net.training))


def by_einsum(net: Any, x: Tensor) -> Tensor:
    query, key, value = net.qkv(x).view(len_of(x), -1, 3, HEADS, DIM).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", query / sqrt(DIM), key).softmax(-1)
    return net.project(torch.einsum("nhqk,nkhd->nqhd", weights, value).flatten(2))


def len_of(x: Tensor) -> int:
    return x.size(0)


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "itself": (itself, {"batch_first": True}),
    "no_bias": (itself, {"batch_first": True, "bias": False}),
    "extra_tokens": (itself, {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}),
    "tokens_first": (tokens_first, {}),
    "across": (across, {"batch_first": True, "vdim": 24}),
    "twice": (twice, {"batch_first": True}),
    "written_out": (written_out, {}),
    "fused": (fused, {}),
    "by_einsum": (by_einsum, {}),
}


def build(name: str) -> nn.Module:
    """One of `WAYS` with no bias at 0, in eval mode."""
    torch.manual_seed(0)
    attend, options = WAYS[name]
    model = Attends(attend, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # zeros at first
    return model.eval()


def heads_of(index: UnitIndex) -> list[UnitLayer]:
    return [layer for layer in index if layer.kind == "head"]


def attention_by_hand(attention: nn.MultiheadAttention, x: Tensor, silent: set[int]) -> Tensor:
    """softmax(q k' / sqrt(d)) v, head by head (Vaswani et al. 2017, section 3.2), where silent heads' values are 0."""
    weight, bias = attention.in_proj_weight.double(), attention.in_proj_bias.double()
    query, key, value = (x.double() @ weight.T + bias).split(x.shape[-1], -1)
    written = []
    for head in range(attention.num_heads):
        own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        scores = query[..., own] @ key[..., own].transpose(1, 2) / sqrt(attention.head_dim)
        written.append(scores.softmax(-1) @ (value[..., own] * (head not in silent)))
    return torch.cat(written, -1) @ attention.out_proj.weight.double().T + attention.out_proj.bias.double()


def test_heads_are_units_with_their_columns_of_the_output_projection() -> None:
    index = index_units(build("itself"), (1, 8, 8))
    assert [(layer.name, layer.kind, layer.size) for layer in index] == [
        ("embed", "conv", 12),
        ("attention.heads", "head", 4),
    ]
    heads = index.layers[1]
    assert heads.gates == (("attention.out_proj.weight", 1),)
    assert heads.entries(torch.tensor([0, 2])).tolist() == [0, 1, 2, 6, 7, 8]
    assert heads.reads is not None and heads.reads.units[0].tolist() == list(range(12))
    assert index.name(14) == "attention.heads[2]" and not index.batch_norm_units.any()


@pytest.mark.parametrize("name", ["written_out", "fused", "by_einsum"])
def test_heads_of_an_attention_that_is_written_out(name: str) -> None:
    model, x = build(name), torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(1))
    index = index_units(model, (1, 8, 8))
    assert [(layer.name, layer.kind, layer.size, layer.width) for layer in index] == [
        *(("embed", "conv", 12, 1), ("qkv", "linear", 36, 1)),
        *(("project.heads", "head", 4, 3), ("project", "linear", 12, 1)),
    ]
    with torch.no_grad():  # the same weights as an attention of PyTorch's own
        model.attention.in_proj_weight.copy_(model.qkv.weight)
        model.attention.in_proj_bias.copy_(model.qkv.bias)
        model.attention.out_proj.load_state_dict(model.project.state_dict())
    for silent in ({0}, {1, 2}, {0, 1, 2, 3}):
        expected = attention_by_hand(model.attention, x, silent)
        with torch.no_grad(), masked(model, KeepMask.all_kept(index).without(48 + head for head in silent)):
            torch.testing.assert_close(model.attend(model, x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("silent", [{0}, {3}, {1, 2}, {0, 1, 2, 3}])
def test_a_pruned_head_writes_exactly_nothing(silent: set[int]) -> None:
    model = build("itself")
    x = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(1))
    index = index_units(model, (1, 8, 8))
    mask = KeepMask.all_kept(index).without(12 + head for head in silent)
    with torch.no_grad(), masked(model, mask):
        pruned = itself(model, x)
        if len(silent) == HEADS:
            assert torch.equal(pruned, model.attention.out_proj.bias.expand_as(pruned))
    torch.testing.assert_close(pruned.double(), attention_by_hand(model.attention, x, silent), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WAYS)
def test_the_engine_gives_what_a_pruned_network_gives(name: str) -> None:
    model, inputs = build(name), torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    index = index_units(model, (1, 8, 8))
    assert [layer.size for layer in heads_of(index)] == [HEADS]
    engine = Engine(model, index, inputs, chunk=3)
    for units in ([], [12], [15], [13, 14], [0, 5, 12, 13, 14, 15]):
        mask, pruned = KeepMask.all_kept(index).without(units), copy.deepcopy(model)
        apply_mask(pruned, mask)
        with torch.no_grad():
            torch.testing.assert_close(engine.logits(mask), pruned(inputs), rtol=1e-5, atol=1e-5)
        effects = engine.effects(mask, lambda logits: logits.square().mean()).double()
        torch.testing.assert_close(effects, effects_by_weights(model, mask, inputs), rtol=1e-3, atol=1e-5)


def test_attention_whose_output_is_read_in_another_way_has_no_units() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = build("itself"), nn.Linear(3, 2)
            self.net.attend = lambda net, x: net.attention(x, x, x, need_weights=False)[:1][0]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.net(x).relu())

    index = index_units(Whole().eval(), (1, 8, 8))
    assert [layer.name for layer in index] == ["net.embed", "net.head"]


def test_projections_that_two_attentions_share_are_refused() -> None:
    model = build("itself")
    model.other = copy.deepcopy(model.attention)
    model.other.out_proj = model.attention.out_proj
    model.attend = lambda net, x: itself(net, x) + net.other(x, x, x)[0]
    with pytest.raises(ModelError, match=r"attention\.out_proj\.weight is also used as other\.out_proj\.weight"):
        Engine(model, index_units(model, (1, 8, 8)), torch.rand(2, 1, 8, 8))


def test_vision_transformer_has_heads_neurons_and_a_tied_stream() -> None:
    index = index_units(vision_transformer(), (3, 32, 32))
    block = "encoder.layers.encoder_layer_"
    assert [(layer.name, layer.kind, layer.size) for layer in index] == [
        ("conv_proj", "conv", 32),
        *((f"{block}0.{name}", kind, size) for name, kind, size in (
            ("self_attention.heads", "head", 4), ("mlp.0", "linear", 64), ("mlp.3", "linear", 32))),
        *((f"{block}1.{name}", kind, size) for name, kind, size in (
            ("self_attention.heads", "head", 4), ("mlp.0", "linear", 64), ("mlp.3", "linear", 32))),
    ]  # fmt: skip
    assert [index.name(int(unit)) for unit in index.group_of(5)] == [
        *("conv_proj[5]", f"{block}0.mlp.3[5]", f"{block}1.mlp.3[5]")
    ]
    assert all(layer.reads is not None for layer in index.layers[1:]) and index.outputs[0].reads is not None
    assert index.untraced == ()


def test_pytorchs_own_encoder_is_looked_into() -> None:
    class Encodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
            self.embed, self.encoder = nn.Conv2d(1, 12, 4, 4), nn.TransformerEncoder(layer, 2, nn.LayerNorm(12))
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2))[:, 0])

    torch.manual_seed(0)
    model, inputs = Encodes().eval(), torch.randn(3, 1, 8, 8)
    index = index_units(model, (1, 8, 8))
    names = [("self_attn.heads", 4), ("linear1", 20), ("linear2", 12)]
    layers = [(f"encoder.layers.{i}.{name}", size) for i in (0, 1) for name, size in names]
    assert [(layer.name, layer.size) for layer in index] == [("embed", 12), *layers]
    assert index.untraced == () and torch.backends.mha.get_fastpath_enabled()
    engine = Engine(model, index, inputs)
    for units in ([], [12], [17, 60]):
        mask = KeepMask.all_kept(index).without(units)
        with torch.no_grad(), masked(model, mask):
            torch.testing.assert_close(engine.logits(mask), model(inputs), rtol=1e-5, atol=1e-5)


# --- the graph --------------------------------------------------------------------------------------------


def test_heads_alone_are_what_the_projection_reads() -> None:
    model, x = build("itself"), torch.randn(2, 4, 12)
    attention = model.attention
    before = copy.deepcopy(attention.state_dict())
    with torch.no_grad():
        written = heads_alone(attention)(x, x, x)[0]
        torch.testing.assert_close(attention.out_proj(written), itself(model, x))
    assert all(torch.equal(value, before[name]) for name, value in attention.state_dict().items())


def test_features_of_heads() -> None:
    model, inputs = build("itself"), torch.randn(6, 1, 8, 8)
    index, attention = index_units(model, (1, 8, 8)), model.attention
    with torch.no_grad():
        x = model.norm(model.embed(inputs).flatten(2).transpose(1, 2))
        projected = copy.deepcopy(attention)
        projected.out_proj.weight.copy_(torch.eye(12))
        projected.out_proj.bias.zero_()
        written = attention_by_hand(projected, x, set()).unflatten(-1, (HEADS, DIM))
    expected = torch.stack([written.mean((0, 1, 3)), written.permute(2, 0, 1, 3).flatten(1).std(1, correction=0)], 1)
    statistics = activation_statistics(index, model, inputs)[12:].double()
    torch.testing.assert_close(statistics[:, :2], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics[:, 3], written.amax((0, 1, 3)), rtol=1e-4, atol=1e-5)
    value = attention.in_proj_weight[24:].abs()
    torch.testing.assert_close(connection_strengths(attention)[2], value[6:9].sum(0))
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.attention.out_proj.weight[:, 3:6] += 0.5
    torch.testing.assert_close(unlearning_signal(model, after, index)[12:], torch.tensor([0, 0.5, 0, 0]))


def test_the_graph_of_a_vision_transformer() -> None:
    model = vision_transformer()
    index = index_units(model, (3, 32, 32))
    graph = build_graph(index, model, torch.rand(4, 3, 32, 32), None, {})
    assert graph.x.shape == (len(index), len(FEATURES)) and bool(graph.x.isfinite().all())
    heads = heads_of(index)[1]
    kinds = graph.x[heads.offset, [i for i, name in enumerate(FEATURES) if name.startswith("kind_")]]
    assert not kinds.any() and graph.kind[heads.offset] == 4
    written = graph.edge_index[:, (graph.edge_attr[:, 1:] == 0).all(1)]
    sources = written[0, written[1] == heads.offset]
    assert len(sources) and {index.layers[int(index.layer_of[unit])].name for unit in sources} == {
        *("conv_proj", "encoder.layers.encoder_layer_0.mlp.3")
    }
    assert graph.x[heads.units, FEATURES.index("outgoing_strength")].abs().max() > 0
