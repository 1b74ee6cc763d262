"""Which units are found, how they are tied, and that pruning one makes just the documented tensor zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.errors import ModelError
from onp.masks import KeepMask, masked
from onp.models import build_model
from onp.units import UnitIndex, UnitLayer, index_units

# --- hand-checkable networks ------------------------------------------------------------------------------


class PlainNet(nn.Module):
    """conv-bn, conv without bn, flatten to 3 x 4 x 4, hidden linear with bn, hidden linear without, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.fc1 = nn.Linear(3 * 4 * 4, 7)
        self.bn2 = nn.BatchNorm1d(7)
        self.fc2 = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return self.head(F.relu(self.fc2(F.relu(self.bn2(self.fc1(x))))))


class PostActivation(nn.Module):
    """stem - block(conv-bn-relu-conv-bn, + identity, relu) - block with a 1x1 shortcut - pooling - logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv3, self.bn3 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.short, self.bn4 = nn.Conv2d(3, 6, 1, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        x = F.relu(out)
        x = F.relu(self.bn3(self.conv3(x)) + self.bn4(self.short(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """stem without bn; bn-relu-conv-bn-relu-conv added to the stream; last bn reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.bn3(x)), 1).flatten(1))


class Dense(nn.Module):
    """DenseNet-like: bn reads the concatenation of stem (3 channels) and growth convolution (2 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.norm1, self.grow = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(F.relu(self.norm1(x)))], 1)
        return self.head(F.relu(self.norm2(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * scale.view(scale.size(0), 6, 1, 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.depth, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depth(F.relu(self.stem(x)))))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


class Twice(nn.Module):
    """The same conv-bn applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.shared, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.shared(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patch embedding, one Linear-GELU-Linear block on tensors of shape (n, 4 tokens, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.norm = nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def conv_net(*head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), *head)


IMAGE = (1, 8, 8)
TOYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (PlainNet, IMAGE),
    "post_activation": (PostActivation, IMAGE),
    "pre_activation": (PreActivation, IMAGE),
    "dense": (Dense, IMAGE),
    "squeeze_excite": (SqueezeExcite, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "twice": (Twice, IMAGE),
    "transformer": (Transformer, IMAGE),
    "small_cnn": (lambda: build_model("small_cnn", 1, 10), IMAGE),
    "small_vgg": (lambda: build_model("small_vgg", 3, 10), (3, 32, 32)),
    "wide_resnet16_1": (lambda: build_model("wide_resnet16_1", 3, 10), (3, 16, 16)),
    "preact_resnet18": (lambda: build_model("preact_resnet18-w8", 3, 10), (3, 16, 16)),
    "cifar_vgg16_bn": (lambda: build_model("cifar_vgg16_bn-w8", 3, 10), (3, 32, 32)),
    "cifar_mobilenet_v2": (lambda: build_model("cifar_mobilenet_v2-w0.25", 3, 10), (3, 32, 32)),
}


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
        (build_model("small_vgg", 3, 10), (3, 28, 28), r"SmallVGG does not accept images of shape \(3, 28, 28\)"),
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


# --- what pruning does ------------------------------------------------------------------------------------


def _record(model: nn.Module, path: str, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of every call of one module."""
    taken: list[Tensor] = []
    given: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        taken.append(args[0].clone())
        given.append(output.clone())

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return taken, given


def _check_output_unit(model: nn.Module, index: UnitIndex, layer: UnitLayer, unit: int, inputs: Tensor) -> None:
    axis = -1 if isinstance(model.get_submodule(layer.module), nn.Linear) else 1
    _, before = _record(model, layer.module, inputs)
    with masked(model, KeepMask.all_kept(index).without([layer.offset + unit])):
        _, after = _record(model, layer.module, inputs)
    others = torch.arange(layer.size) != unit
    for one, two in zip(before, after, strict=True):
        assert one.select(axis, unit).abs().max() > 0, "a unit that is silent anyway shows nothing"
        assert torch.equal(two.select(axis, unit), torch.zeros_like(two.select(axis, unit)))
    alive = others.nonzero().flatten()  # nothing before the first call has changed
    assert torch.allclose(before[0].index_select(axis, alive), after[0].index_select(axis, alive), rtol=0, atol=1e-6)


def _check_input_position(model: nn.Module, index: UnitIndex, layer: UnitLayer, unit: int, inputs: Tensor) -> None:
    taken, _ = _record(model, layer.module, inputs)
    linear = model.get_submodule(layer.module)
    assert isinstance(linear, nn.Linear)
    silenced = taken[0].double()
    silenced[:, unit] = 0
    expected = silenced @ linear.weight.double().T + linear.bias.double()
    loud = taken[0].clone()
    loud[:, unit] += 1000
    with torch.no_grad(), masked(model, KeepMask.all_kept(index).without([layer.offset + unit])):
        _, after = _record(model, layer.module, inputs)
        assert torch.equal(linear(loud), linear(taken[0]))
    torch.testing.assert_close(after[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TOYS)
def test_pruning_a_unit_makes_its_output_zero_and_nothing_else(name: str, randomised: Callable[..., nn.Module]) -> None:
    build, shape = TOYS[name]
    torch.manual_seed(0)
    model = randomised(build())
    index = index_units(model, shape)
    inputs = torch.randn(4, *shape)
    for layer in index:
        for unit in torch.randperm(layer.size)[:2].tolist():
            check = _check_input_position if layer.kind == "linear_input" else _check_output_unit
            check(model, index, layer, unit, inputs)


@pytest.mark.parametrize("name", TOYS)
def test_an_input_channel_is_silent_once_its_writers_are_pruned(
    name: str, randomised: Callable[..., nn.Module]
) -> None:
    """`reads` names every writer: of each input channel of each layer, and of the logits' inputs."""
    build, shape = TOYS[name]
    torch.manual_seed(1)
    model = randomised(build())
    index = index_units(model, shape)
    inputs = torch.randn(8, *shape)
    readers = [(layer.weight or layer.module, layer.reads) for layer in index] + [
        (o.module, o.reads) for o in index.outputs
    ]
    checked = 0
    for path, reads in readers:
        if reads is None:
            continue
        if (name, path) == ("transformer", "fc1"):
            continue  # layer-norm leaves no channel at zero
        before = _record(model, path, inputs)[0][0]
        channels = reads.units[0].numel()
        assert before.shape[reads.axis] == channels
        for channel in torch.randperm(channels)[:2].tolist():
            writers = {int(units[channel]) for units in reads.units}
            if -1 in writers or index.layers[int(index.layer_of[min(writers)])].kind == "linear_input":
                continue  # input positions silence the weight behind them, not what arrives
            if not before.select(reads.axis, channel).any():
                continue  # silent anyway: shows nothing
            with masked(model, KeepMask.all_kept(index).without(writers)):
                after = _record(model, path, inputs)[0][0]
            assert torch.equal(after.select(reads.axis, channel), torch.zeros_like(after.select(reads.axis, channel)))
            checked += 1
    assert checked >= len(readers) // 2


class Between(nn.Module):
    """Two convolutions with an operation between them."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.operation(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (nn.ReLU(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (nn.ChannelShuffle(2), [0, 4, 1, 5, 2, 6, 3, 7]),
        (lambda x: x.view(len_of(x), 2, 4, 8, 8).transpose(1, 2).reshape(x.shape), [0, 4, 1, 5, 2, 6, 3, 7]),
        (lambda x: x.flip(1), [7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda x: x.roll(1, 1), [7, 0, 1, 2, 3, 4, 5, 6]),
        (lambda x: torch.cat([x.chunk(2, 1)[1], x[:, :4]], 1), [4, 5, 6, 7, 0, 1, 2, 3]),
        (lambda x: F.pad(x[:, 2:6], (0, 0, 0, 0, 2, 2), "constant", 1.0), [-1, -1, 2, 3, 4, 5, -1, -1]),
        (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8)), [0, 1, 2, 3, 4, 5, 6, 7]),
        (lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)), None),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.ones(8, 8)), None),
        (lambda x: x.reshape(-1, 4, 8, 8, 2).permute(0, 4, 1, 2, 3).reshape(x.shape), None),  # rows among the channels
    ],
)
def test_channels_are_followed_wherever_they_are_moved(
    operation: Callable[[Tensor], Tensor], expected: list[int] | None
) -> None:
    torch.manual_seed(0)
    model = Between(operation).eval()
    index = index_units(model, (3, 8, 8))
    assert [layer.name for layer in index] == ["conv", "second"]
    reads = index.layers[1].reads
    assert (reads and [units.tolist() for units in reads.units]) == (expected and [expected])
    for channel, unit in enumerate(expected or []):
        if unit >= 0:
            with masked(model, KeepMask.all_kept(index).without([unit])):
                (taken,), _ = _record(model, "second", torch.randn(2, 3, 8, 8))
            assert not taken[:, channel].any() and all(taken[:, other].any() for other in range(8) if other != channel)


def len_of(x: Tensor) -> int:
    return x.size(0)


def test_a_computed_weight_is_refused() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 6))
    with pytest.raises(ModelError, match=r"0\.weight is no plain parameter; remove the parametrization"):
        index_units(net.eval(), (3, 8, 8))
