"""Which units are found, and how they are tied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import (
    IMAGE,
    Dense,
    Depthwise,
    PlainNet,
    PostActivation,
    PreActivation,
    SqueezeExcite,
    Transformer,
    Twice,
    conv_net,
)

from onp.errors import ModelError
from onp.models import build_model
from onp.units import UnitIndex, index_units


def found(model: nn.Module, shape: tuple[int, ...] = IMAGE) -> list[tuple[str, str, int]]:
    return [(layer.name, layer.kind, layer.size) for layer in index_units(model, shape)]


def ties(index: UnitIndex) -> set[frozenset[str]]:
    """The groups of more than one unit, by name."""
    groups = {frozenset(index.name(int(u)) for u in index.group_of(unit)) for unit in range(len(index))}
    return {group for group in groups if len(group) > 1}


# --- which units are found --------------------------------------------------------------------------------


def test_plain_net_has_every_kind_with_the_right_gates() -> None:
    index = index_units(PlainNet(), IMAGE)
    assert [(layer.name, layer.kind, layer.size, layer.gates, layer.batch_norm) for layer in index] == [
        ("bn1", "conv", 4, (("bn1.weight", 0), ("bn1.bias", 0)), "bn1"),
        ("conv2", "conv", 3, (("conv2.weight", 0), ("conv2.bias", 0)), None),
        ("fc1.input", "linear_input", 48, (("fc1.weight", 1),), None),
        ("bn2", "linear", 7, (("bn2.weight", 0), ("bn2.bias", 0)), "bn2"),
        ("fc2", "linear", 5, (("fc2.weight", 0), ("fc2.bias", 0)), None),
    ]
    assert [output.module for output in index.outputs] == ["head"]
    assert len(index) == 4 + 3 + 48 + 7 + 5
    assert [layer.offset for layer in index] == [0, 4, 7, 55, 62]
    assert [layer.weight for layer in index] == ["conv1", "conv2", None, "fc1", "fc2"]
    assert ties(index) == set()
    assert index.batch_norm_units.nonzero().flatten().tolist() == [0, 1, 2, 3, *range(55, 62)]
    assert [index.name(u) for u in (0, 6, 7, 54, 66)] == [
        "bn1[0]",
        "conv2[2]",
        "fc1.input[0]",
        "fc1.input[47]",
        "fc2[4]",
    ]


def test_wide_resnet_has_the_published_464_batch_norm_units_and_the_stream_writers() -> None:
    index = index_units(build_model("wide_resnet16_1", 3, 10), (3, 32, 32))
    assert int(index.batch_norm_units.sum()) == 464
    assert len(index) == 800
    without_gate = {layer.name: layer.size for layer in index if layer.batch_norm is None}
    assert without_gate == {
        "conv1": 16,
        "block1.layer.0.conv2": 16,
        "block1.layer.1.conv2": 16,
        "block2.layer.0.convShortcut": 32,
        "block2.layer.0.conv2": 32,
        "block2.layer.1.conv2": 32,
        "block3.layer.0.convShortcut": 64,
        "block3.layer.0.conv2": 64,
        "block3.layer.1.conv2": 64,
    }
    reading_the_sum = {layer.name for layer in index if layer.kind == "batch_norm"}
    assert reading_the_sum == {"bn1"} | {f"block{b}.layer.{i}.bn1" for b in (1, 2, 3) for i in (0, 1)}
    stage = {1: ["conv1"], 2: ["block2.layer.0.convShortcut"], 3: ["block3.layer.0.convShortcut"]}
    assert ties(index) == {
        frozenset(f"{name}[{i}]" for name in [*stage[b], f"block{b}.layer.0.conv2", f"block{b}.layer.1.conv2"])
        for b, width in ((1, 16), (2, 32), (3, 64))
        for i in range(width)
    }


def test_cifar_resnet18_has_4800_batch_norm_channels_tied_along_the_stream() -> None:
    index = index_units(build_model("cifar_resnet18", 3, 10), (3, 16, 16))
    assert int(index.batch_norm_units.sum()) == 4800
    assert [(layer.name, layer.size) for layer in index if layer.batch_norm is None] == [("linear.input", 512)]
    expected = {frozenset(f"{name}[{i}]" for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2")) for i in range(64)}
    for stage, width in ((2, 128), (3, 256), (4, 512)):
        names = [f"layer{stage}.0.bn2", f"layer{stage}.0.shortcut.1", f"layer{stage}.1.bn2"]
        expected |= {frozenset(f"{name}[{i}]" for name in names) for i in range(width)}
    assert ties(index) == expected


def test_preact_resnet18_has_gates_before_every_convolution() -> None:
    index = index_units(build_model("preact_resnet18-w16", 3, 10), (3, 32, 32))
    blocks = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert {layer.name: layer.size for layer in index if layer.kind == "batch_norm"} == {
        f"layer{stage}.{block}.bn1": 16 * 2 ** max(0, stage - (1 if block else 2)) for stage, block in blocks
    }
    assert {layer.name: layer.size for layer in index if layer.kind == "conv"} == (
        {"conv1": 16}
        | {f"layer{s}.{b}.{name}": 16 * 2 ** (s - 1) for s, b in blocks for name in ("bn2", "conv2")}
        | {f"layer{s}.0.shortcut.0": 16 * 2 ** (s - 1) for s in (2, 3, 4)}
    )
    assert {layer.name for layer in index} >= {"linear.input"} and len(index) == 1696
    streams = [["conv1", "layer1.0.conv2", "layer1.1.conv2"]]
    streams += [[f"layer{s}.0.shortcut.0", f"layer{s}.0.conv2", f"layer{s}.1.conv2"] for s in (2, 3, 4)]
    assert ties(index) == {
        frozenset(f"{name}[{i}]" for name in names) for s, names in enumerate(streams) for i in range(16 * 2**s)
    }


def test_vgg16_has_thirteen_layers_and_pools_to_one_position() -> None:
    index = index_units(build_model("cifar_vgg16_bn-w16", 3, 10), (3, 32, 32))
    sizes = [16, 16, 32, 32, 64, 64, 64, *[128] * 6]
    assert [layer.size for layer in index if layer.kind == "conv"] == sizes
    assert all(layer.batch_norm is not None for layer in index if layer.kind == "conv")


def test_mobilenet_v2_has_units_in_every_convolution() -> None:
    model = build_model("cifar_mobilenet_v2-w0.5", 3, 43)
    index = index_units(model, (3, 32, 32))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert [layer.batch_norm is not None for layer in index if layer.kind == "conv"] == [True] * convolutions
    assert convolutions == 52


def test_small_vgg_has_2048_flattened_positions() -> None:
    index = index_units(build_model("small_vgg", 3, 10), (3, 32, 32))
    assert [layer.size for layer in index] == [32, 32, 64, 64, 128, 128, 2048]
    assert [layer.kind for layer in index] == ["conv"] * 6 + ["linear_input"]
    last = index.layers[-1]
    assert last.reads is not None and last.reads.positions == 16
    channel_units = index.layers[-2].units
    assert last.reads.units[0].tolist() == [channel_units[position // 16] for position in range(2048)]


def test_toy_layers() -> None:
    assert found(PostActivation()) == [
        ("bn0", "conv", 3), ("bn1", "conv", 5), ("bn2", "conv", 3), ("bn3", "conv", 6), ("bn4", "conv", 6),
        ("head.input", "linear_input", 6),
    ]  # fmt: skip
    assert found(PreActivation()) == [
        ("stem", "conv", 4), ("bn1", "batch_norm", 4), ("bn2", "conv", 6), ("conv2", "conv", 4),
        ("bn3", "batch_norm", 4),
    ]  # fmt: skip
    assert found(Dense()) == [
        ("stem", "conv", 3),
        ("norm1", "batch_norm", 3),
        ("grow", "conv", 2),
        ("norm2", "batch_norm", 5),
    ]
    assert found(SqueezeExcite()) == [
        ("bn", "conv", 6),
        ("squeeze", "linear", 3),
        ("excite", "linear", 6),
        ("last", "conv", 4),
    ]
    assert found(Depthwise()) == [("stem", "conv", 4), ("bn1", "conv", 8), ("point", "conv", 5)]
    assert found(Twice()) == [("stem", "conv", 4), ("bn", "conv", 4)]
    assert found(Transformer()) == [("embed", "conv", 6), ("fc1", "linear", 12), ("fc2", "linear", 6)]


def test_every_toy_ends_in_its_head() -> None:
    toys = (PlainNet, PostActivation, PreActivation, Dense, SqueezeExcite, Depthwise, Twice, Transformer)
    assert [[output.module for output in index_units(toy(), IMAGE).outputs] for toy in toys] == [["head"]] * len(toys)


def test_non_affine_batch_norm_is_no_gate_and_takes_its_convolution_along() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    assert found(model) == [("3", "conv", 5)]


def test_pooling_needs_no_positions_and_a_flatten_does() -> None:
    pooled = conv_net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert found(pooled) == [("1", "conv", 3)]
    flat = conv_net(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    assert found(flat) == [("1", "conv", 3), ("5.input", "linear_input", 12)]


class FlattenBy(nn.Module):
    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2 * 6 * 6, 2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], 72),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, start_dim=1),
    ],
)
def test_every_way_to_flatten(flatten: Callable[[Tensor], Tensor]) -> None:
    assert found(FlattenBy(flatten)) == [("conv", "conv", 2), ("head.input", "linear_input", 72)]


class FlattenThenConcatenate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, 2), nn.Conv2d(1, 3, 3, 2)
        self.head = nn.Linear(5 * 3 * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1))


def test_positions_behind_concatenated_flattens_are_units() -> None:
    assert found(FlattenThenConcatenate()) == [("a", "conv", 2), ("b", "conv", 3), ("head.input", "linear_input", 45)]


# --- outputs hold no units --------------------------------------------------------------------------------


class SummedLogits(nn.Module):
    """Two 1x1 convolutions added give the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return (self.a(x) + self.b(x)).mean((2, 3))


class SharedLogits(nn.Module):
    """One linear layer is hidden in its first call and gives the logits in its second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(F.relu(self.shared(F.relu(self.stem(x)).mean((2, 3)))))


def test_a_convolution_with_batch_norm_before_the_logits_holds_no_units() -> None:
    model = conv_net(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    index = index_units(model, IMAGE)
    assert [layer.name for layer in index] == ["1"]
    assert [output.module for output in index.outputs] == ["3"]


def test_a_batch_norm_behind_an_activation_before_the_logits_holds_no_units() -> None:
    model = conv_net(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [layer.name for layer in index_units(model, IMAGE)] == ["1"]


def test_summed_logits_hold_no_units() -> None:
    index = index_units(SummedLogits(), IMAGE)
    assert [layer.name for layer in index] == ["stem"]
    assert sorted(output.module for output in index.outputs) == ["a", "b"]


def test_a_module_that_also_gives_the_logits_holds_no_units() -> None:
    assert [layer.name for layer in index_units(SharedLogits(), IMAGE)] == ["stem"]


# --- groups -----------------------------------------------------------------------------------------------


class HalfKnownSum(nn.Module):
    """cat(image (2 channels), a (3 channels)) + b + c: the image's channels have no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, width, 3, padding=1) for width in (3, 5, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x)], dim=1) + self.b(x)
        return self.head((y + self.c(x)).mean((2, 3)))


def _tied(*names: str, width: int) -> set[frozenset[str]]:
    return {frozenset(f"{name}[{i}]" for name in names) for i in range(width)}


def test_residual_groups_by_hand() -> None:
    post = index_units(PostActivation(), IMAGE)
    assert ties(post) == _tied("bn0", "bn2", width=3) | _tied("bn3", "bn4", width=6)
    assert ties(index_units(PreActivation(), IMAGE)) == _tied("stem", "conv2", width=4)
    assert ties(index_units(Dense(), IMAGE)) == set()
    assert ties(index_units(SqueezeExcite(), IMAGE)) == _tied("bn", "excite", width=6)


def test_groups_where_one_summand_is_partly_without_units() -> None:
    expected = {frozenset({f"b[{i}]", f"c[{i}]"} | ({f"a[{i - 2}]"} if i >= 2 else set())) for i in range(5)}
    assert ties(index_units(HalfKnownSum(), (2, 8, 8))) == expected


def test_group_of_contains_the_unit_and_layer_of_its_layer() -> None:
    index = index_units(PreActivation(), IMAGE)  # stem 0-3, bn1 4-7, bn2 8-13, conv2 14-17, bn3 18-21
    assert index.group_of(15).tolist() == [1, 15]
    assert index.group_of(9).tolist() == [9]
    assert index.layer_of.tolist() == [0] * 4 + [1] * 4 + [2] * 6 + [3] * 4 + [4] * 4
    assert list(index.layers[3].units) == [14, 15, 16, 17]


# --- errors -----------------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (DataDependent(), IMAGE, "cannot trace DataDependent"),
        (nn.DataParallel(DataDependent()), IMAGE, r"DataParallel runs .* give the network itself, \.module"),
        (
            build_model("small_vgg", 3, 10),
            (3, 28, 28),
            r"SmallVGG does not accept batches of 2 and 3 float images of shape \(3, 28, 28\)",
        ),
        (build_model("wide_resnet16_1", 3, 10), (1, 32, 32), "expected input.*to have 3 channels, but got 1 channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), IMAGE, "no prunable unit"),
    ],
)
def test_model_errors_are_one_line(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        index_units(model, shape)
    assert "\n" not in str(caught.value)


def test_indexing_leaves_the_model_alone() -> None:
    model = PostActivation().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    index_units(model, IMAGE)
    assert model.training and model.bn1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_computed_weight_is_refused() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 6))
    with pytest.raises(ModelError, match=r"0\.weight is no plain parameter; remove the parametrization"):
        index_units(net.eval(), (3, 8, 8))
