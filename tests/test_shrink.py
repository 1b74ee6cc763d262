"""Cutting out what a mask silences: what goes, what stays and why, and that the logits are the same for any image."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import Dense, Depthwise, PlainNet

import onp
from onp.errors import CheckpointError, ModelError
from onp.logits import logits_of
from onp.masks import KeepMask, apply_mask
from onp.models import build_model
from onp.shrinking import Shrunk, deviation, load_shrunk, multiply_adds, parameter_count, same, save_shrunk, shrink
from onp.units import index_units

Randomise = Callable[..., nn.Module]
FACTORS = torch.linspace(0.5, 1.5, 6).view(6, 1, 1)


class Residual(nn.Module):
    """stem-bn-relu, then conv-bn-relu-conv-bn added to it, in place; a view and a linear layer behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        out = F.adaptive_avg_pool2d(F.relu(out), 1)
        return self.head(out.view(out.size(0), -1))


class Between(nn.Module):
    """conv-bn, then `function`, then a convolution and the logits."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.function = function
        self.last, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.function(self.bn(self.conv(x))))).mean((2, 3)))


class CalledTwice(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation, whose sigmoid multiplies channels that a pruned unit leaves zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.last, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def weights() -> None:
    """The same weights in every network of a test."""
    torch.manual_seed(0)


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(5, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(seed))


def shrunk_without(network: nn.Module, *units: str, rule: str = "zero") -> Shrunk:
    """`network` without the named units; its logits are the masked network's on images not seen before."""
    index = index_units(network, (1, 8, 8))
    numbers = {index.name(unit): unit for unit in range(len(index))}
    mask = KeepMask.all_kept(index, rule).without([numbers[name] for name in units])  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shrunk = shrink(network, mask, images(1))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    masked = copy.deepcopy(network)
    apply_mask(masked, mask)
    for scale in (1, -30):
        with torch.no_grad():
            torch.testing.assert_close(shrunk.model(scale * images(2)), masked(scale * images(2)), rtol=1e-4, atol=1e-5)
    assert sorted([*shrunk.removed, *shrunk.kept_as_zeros]) == sorted(mask.pruned)
    return shrunk


def sizes(shrunk: Shrunk) -> dict[str, tuple[int, ...]]:
    return {name: tuple(size.values()) for name, size in shrunk.channels.items()}


# --- by hand ----------------------------------------------------------------------------------------------


def test_layers_lose_what_is_pruned_and_what_reads_it(randomised: Randomise) -> None:
    network = randomised(PlainNet())
    shrunk = shrunk_without(network, "bn1[1]", "conv2[0]", "bn2[3]", "fc2[4]")
    assert sizes(shrunk) == {
        "conv1": (3, 1), "bn1": (3,), "conv2": (2, 3), "fc1": (6, 32), "bn2": (6,), "fc2": (4, 6), "head": (2, 4),
    }  # fmt: skip
    assert not shrunk.kept_as_zeros
    # conv1 27 + 3, bn1 6, conv2 54 + 2, fc1 192 + 6, bn2 12, fc2 24 + 4, head 8 + 2
    assert parameter_count(shrunk.model) == 340
    # conv1 64 positions x 27, conv2 64 x 54, fc1 192, fc2 24, head 8
    assert multiply_adds(shrunk.model, (1, 8, 8)) == 64 * 27 + 64 * 54 + 192 + 24 + 8


def test_input_positions_go_with_their_whole_channel(randomised: Randomise) -> None:
    network = randomised(PlainNet())
    last = [f"fc1.input[{position}]" for position in range(32, 48)]
    whole = shrunk_without(network, *last)
    assert sizes(whole) == {"conv2": (2, 4), "fc1": (7, 32)} and not whole.kept_as_zeros
    part = shrunk_without(network, *last[1:], "bn1[0]")
    assert sizes(part) == {"conv1": (3, 1), "bn1": (3,), "conv2": (3, 3)}
    assert len(part.kept_as_zeros) == 15 and all("fc1 still reads it" in why for why in part.kept_as_zeros.values())


def test_a_residual_channel_goes_when_all_that_write_it_are_pruned(randomised: Randomise) -> None:
    network = randomised(Residual())
    for alone, reader in (("bn0[1]", "head"), ("bn2[1]", "conv1")):
        shrunk = shrunk_without(network, alone)
        assert not shrunk.channels
        assert list(shrunk.kept_as_zeros.values()) == [f"{reader} still reads it"]
    assert sizes(shrunk_without(network, "bn0[1]", "bn2[1]")) == {
        "stem": (2, 1), "bn0": (2,), "conv1": (5, 2), "conv2": (2, 5), "bn2": (2,), "head": (2, 2),
    }  # fmt: skip


def test_a_channel_goes_when_all_its_readers_are_shut(randomised: Randomise) -> None:
    """In a DenseNet the writer need not be pruned; where only it is, the batch-norms make constants of zero."""
    network = randomised(Dense())
    assert sizes(shrunk_without(network, "norm1[1]", "norm2[1]")) == {
        "stem": (2, 1), "norm1": (2,), "grow": (2, 2), "norm2": (4,), "head": (2, 4),
    }  # fmt: skip
    constant = shrunk_without(network, "stem[1]")
    assert not constant.channels and "grow reads a constant" in constant.kept_as_zeros[1]
    assert sizes(shrunk_without(network, "grow[0]", "norm2[3]")) == {"grow": (1, 3), "norm2": (4,), "head": (2, 4)}


def test_a_depthwise_channel_goes_with_all_that_is_made_of_it(randomised: Randomise) -> None:
    network = randomised(Depthwise())
    shrunk = shrunk_without(network, "bn1[2]", "bn1[3]", "bn1[6]")
    assert sizes(shrunk) == {"stem": (3, 1), "depth": (6,), "bn1": (6,), "point": (5, 6)}
    depth = shrunk.model.get_submodule("depth")
    assert isinstance(depth, nn.Conv2d) and (depth.groups, depth.in_channels) == (3, 3)
    assert list(shrunk.kept_as_zeros.values()) == ["point still reads it"]
    assert "constant" in shrunk_without(network, "stem[0]").kept_as_zeros[0]


def test_rnps_rule_leaves_a_constant_that_only_a_relu_can_shut(randomised: Randomise) -> None:
    network = Between(F.relu)
    randomised(network)
    with torch.no_grad():
        network.bn.bias[:2] = torch.tensor([0.5, -0.5])
    shrunk = shrunk_without(network, "bn[0]", "bn[1]", rule="gamma")
    assert sizes(shrunk) == {"conv": (5, 1), "bn": (5,), "last": (4, 5)}
    assert shrunk.kept_as_zeros == {0: "last reads a constant other than zero there"}


@pytest.mark.parametrize("name", ["relu", "elu", "gelu", "silu", "hardswish", "tanh", "leaky_relu"])
def test_what_maps_zero_to_zero_lets_a_channel_go(name: str, randomised: Randomise) -> None:
    network = randomised(Between(getattr(F, name)))
    assert sizes(shrunk_without(network, "bn[2]")) == {"conv": (5, 1), "bn": (5,), "last": (4, 5)}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.sigmoid, "last reads a constant"),
        (F.hardsigmoid, "last reads a constant"),
        (lambda x: F.relu(x) + 1, "last reads a constant"),
        (nn.LocalResponseNorm(3), "LocalResponseNorm reads it"),
        (nn.GroupNorm(2, 6), "GroupNorm reads it"),
        (lambda x: x.flip(1), "flip reads it"),
        (lambda x: x.view(-1, 6, 8, 8), "view reads it"),
        (lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1), "chunk reads it"),
        (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), "getitem reads it"),
        (lambda x: x * FACTORS, "mul reads it"),
        (nn.Conv2d(6, 6, 1, groups=2), "works in groups"),
    ],
)  # fmt: skip
def test_everything_else_keeps_it(function: Callable[[Tensor], Tensor], reason: str, randomised: Randomise) -> None:
    shrunk = shrunk_without(randomised(Between(function)), "bn[2]")
    assert not shrunk.channels and not shrunk.removed
    assert reason in shrunk.kept_as_zeros[2]


def test_a_gate_keeps_zero_at_zero_but_is_read_itself(randomised: Randomise) -> None:
    network = randomised(Excited())
    assert sizes(shrunk_without(network, "bn[2]")) == {
        "conv": (5, 1), "bn": (5,), "squeeze": (3, 5), "excite": (5, 3), "last": (4, 5),
    }  # fmt: skip


def test_a_layer_that_is_called_twice_stays(randomised: Randomise) -> None:
    shrunk = shrunk_without(randomised(CalledTwice()), "bn1[2]")
    assert not shrunk.channels and "called several times" in next(iter(shrunk.kept_as_zeros.values()))


def test_a_layer_keeps_a_channel(randomised: Randomise) -> None:
    shrunk = shrunk_without(randomised(PlainNet()), *(f"fc2[{unit}]" for unit in range(5)))
    # No weight of fc2 is left, so nothing reads fc1 either.
    assert sizes(shrunk) == {"fc1": (1, 48), "bn2": (1,), "fc2": (1, 1), "head": (2, 1)}
    assert list(shrunk.kept_as_zeros.values()) == ["fc2 has to keep one channel"]


def test_silence_on_the_images_at_hand_is_no_proof(randomised: Randomise) -> None:
    """A channel that happens to be zero on them, kept, or tied to a pruned one, does not go."""
    network = Residual()
    randomised(network)
    with torch.no_grad():
        network.stem.weight[1], network.stem.bias[1] = -1.0, 0.0  # silent where pixels are in [0, 1]
        for statistic, value in ((network.bn0.bias, 0.0), (network.bn0.running_mean, 0.0)):
            assert statistic is not None
            statistic[1] = value
        assert not F.relu(network.bn0(network.stem(images(1))))[:, 1].any()
    for pruned in ([], ["bn2[1]"]):
        assert not shrunk_without(network, *pruned).channels


def test_a_network_that_counts_its_channels_stays_as_it_is(randomised: Randomise) -> None:
    def counted(x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 6, "six, please")
        return F.relu(x)

    shrunk = shrunk_without(randomised(Between(counted)), "bn[2]")
    assert not shrunk.channels and not shrunk.removed and shrunk.deviation == 0
    assert "cannot be made smaller: six, please" in shrunk.kept_as_zeros[2]


def test_a_deviation_or_a_nan_is_refused() -> None:
    expected = torch.tensor([[4.0, -8.0]])
    assert deviation(torch.tensor([[4.0, -7.0]]), expected) == 0.125
    for wrong in ([[4.0, -7.99]], [[4.0, float("nan")]]):
        with pytest.raises(ModelError, match="deviate"):
            same("this", torch.tensor(wrong), expected)


# --- known architectures ------------------------------------------------------------------------------------


def small_vgg11() -> nn.Module:
    network = build_model("vgg11_bn", 3, 10)
    network.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10))
    return network


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("resnet18", r"layer\d.\d.bn1"),
        ("vgg11_bn", r"features.\d+"),
        ("mobilenet_v2", r"features.\d+.conv.1.1"),
        ("densenet121", r"features.denseblock\d.denselayer\d+.norm2"),
        ("preact_resnet18-w16", r"layer\d.\d.bn2"),
        ("wide_resnet16_1", r"block\d.layer.\d.bn2"),
    ],
)
def test_known_networks(name: str, inner: str, randomised: Randomise, tmp_path: Path) -> None:
    """Under random masks: the same logits, every unit inside a block is gone, and the files bring it back."""
    network = randomised(small_vgg11() if name == "vgg11_bn" else build_model(name, 3, 10))
    index = index_units(network, (3, 32, 32))
    drawn = torch.rand(len(index), generator=torch.Generator().manual_seed(1)) < 0.3
    mask = KeepMask.all_kept(index).without(drawn.nonzero().flatten())
    shrunk = shrink(network, mask, images(1, 3, 32, 32))
    assert parameter_count(shrunk.model) < 0.9 * parameter_count(network)
    inside = {unit for layer in index if re.fullmatch(inner, layer.name) for unit in layer.units}
    assert inside & mask.pruned and inside & mask.pruned <= set(shrunk.removed)
    save_shrunk(shrunk, tmp_path / "small.safetensors")
    loaded = load_shrunk(network, tmp_path / "small.safetensors")
    apply_mask(network, mask)
    with torch.no_grad():
        got, fresh = shrunk.model(images(2, 3, 32, 32)), network(images(2, 3, 32, 32))
        assert torch.equal(loaded(images(2, 3, 32, 32)), got)
    assert deviation(got, fresh) < 1e-5 and fresh.std() > 1e-3


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(randomised: Randomise, tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_shrunk(shrunk_without(randomised(Depthwise()), "bn1[2]", "bn1[3]", "point[1]"), path)
    return path


def test_what_is_written_is_small_and_comes_back(saved: Path, randomised: Randomise) -> None:
    assert json.loads(saved.with_suffix(".json").read_text()) == {
        "input_shape": [1, 8, 8],
        "channels": {
            "stem": {"outputs": 3, "inputs": 1},
            "depth": {"outputs": 6},
            "bn1": {"outputs": 6},
            "point": {"outputs": 4, "inputs": 6},
            "head": {"outputs": 2, "inputs": 4},
        },
    }
    original = Depthwise()
    loaded = onp.load_shrunk(original, str(saved))
    assert onp.shrink is shrink is onp.shrink, "a module of that name would hide the function"
    torch.manual_seed(0)
    expected = shrunk_without(randomised(Depthwise()), "bn1[2]", "bn1[3]", "point[1]").model
    assert not loaded.training and original.point.out_channels == 5
    with torch.no_grad():
        assert torch.equal(loaded(images(2)), expected(images(2)))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"stem": {"outputs": 10**12, "inputs": 1}}, "from 1 up to"),
        ({"stem": {"outputs": 0, "inputs": 1}}, "from 1 up to"),
        ({"stem": {"outputs": -3, "inputs": 1}}, "from 1 up to"),
        ({"stem": {"outputs": True, "inputs": 1}}, "from 1 up to"),
        ({"stem": {"outputs": 3.0, "inputs": 1}}, "from 1 up to"),
        ({"stem": {"outputs": 3}}, "from 1 up to"),
        ({"depth": {"outputs": 6, "inputs": 3}}, "from 1 up to"),
        ({"stem": [3, 1]}, "from 1 up to"),
        ({"elsewhere": {"outputs": 3, "inputs": 1}}, "no such layer"),
        ([], "no such layer"),
        ({}, "does not fit Depthwise"),
    ],
)
def test_hostile_sizes_are_refused(saved: Path, channels: object, message: str) -> None:
    record = {"input_shape": [1, 8, 8], "channels": channels}
    saved.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message):
        load_shrunk(Depthwise(), saved)


@pytest.mark.parametrize("shape", [[1, 10**30, 8], "ab", None, [1, -8, 8], [8, 8]])
def test_shapes_that_no_images_have_are_refused(saved: Path, shape: object) -> None:
    record = json.loads(saved.with_suffix(".json").read_text())
    saved.with_suffix(".json").write_text(json.dumps({**record, "input_shape": shape}))
    with pytest.raises(CheckpointError, match="does not fit any"):
        load_shrunk(Depthwise(), saved)


def test_networks_that_cannot_run_without_data_come_back(tmp_path: Path, randomised: Randomise) -> None:
    """A branch on values, and a tensor that is no buffer."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.mean = Depthwise(), torch.tensor(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.depthwise(x - self.mean) if x.sum() > -1e9 else x

    network = randomised(Odd())
    inputs = images(0, 1, 8, 8)
    kept = Shrunk(network, (1, 8, 8), {}, (), {}, 0.0)
    save_shrunk(kept, tmp_path / "odd.safetensors")
    again = load_shrunk(Odd(), tmp_path / "odd.safetensors")
    assert torch.equal(logits_of(again, inputs), logits_of(network, inputs))


def test_networks_that_say_nothing_do_not_deviate() -> None:
    assert deviation(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_layers_that_do_not_fit_each_other_are_refused(saved: Path) -> None:
    record, weights = json.loads(saved.with_suffix(".json").read_text()), safetensors.torch.load_file(saved)
    record["channels"]["point"]["outputs"] = 3
    cut = {name: value[:3].clone() for name, value in weights.items() if name.startswith("point")}
    safetensors.torch.save_file({**weights, **cut}, saved)
    saved.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_shrunk(Depthwise(), saved)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[" * 100_000, "\xff"])
def test_sizes_that_cannot_be_read_are_refused(saved: Path, text: str | None) -> None:
    sizes = saved.with_suffix(".json")
    sizes.unlink() if text is None else sizes.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"small\.json does not hold"):
        load_shrunk(Depthwise(), saved)
