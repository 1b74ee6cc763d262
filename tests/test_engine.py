"""The engine gives what plain forward passes of a pruned network give, whatever was asked before, and computes less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import effects_by_weights
from torch import Tensor, nn

from onp.engine import ActivationCache, Engine
from onp.errors import ModelError
from onp.masks import KeepMask, apply_mask
from onp.models import build_model
from onp.units import UnitIndex, index_units

Randomise = Callable[..., nn.Module]


class EveryWay(nn.Module):
    """Units that reach convolutions through sums, products, concatenations, pools, in-place operations and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 64, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(64)
        self.left = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.left_norm = nn.BatchNorm2d(64)
        self.right = nn.Conv2d(64, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(64, 64, 3, padding="same")
        self.squeeze = nn.Conv2d(64, 64, 1)
        self.mixed = nn.Conv2d(128, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 16, 12)
        self.hidden_norm = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        y = self.left_norm(self.left(torch.relu(self.norm(x))))
        y += self.right(x)
        y = y.add_(x).relu_()
        z = self.twice(nn.functional.leaky_relu(self.grouped(y)))
        z = self.twice(nn.functional.max_pool2d(z, 3, 1, 1))
        z = z * self.squeeze(z.mean((2, 3), keepdim=True)).sigmoid()
        z = nn.functional.relu(self.mixed(torch.cat([z, y], 1)), inplace=True)
        return self.out(torch.relu(self.hidden_norm(self.hidden(z.flatten(1)))))


class Hidden(nn.Module):
    """Changes a tensor in place and goes on with it under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.out = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.relu(x)
        return self.out(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network(randomised: Randomise) -> nn.Module:
    torch.manual_seed(0)
    return randomised(EveryWay())


@pytest.fixture(scope="module")
def index(network: nn.Module) -> UnitIndex:
    return index_units(network, (2, 8, 8))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.rand(10, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def random_masks(index: UnitIndex, seed: int = 0) -> list[KeepMask]:
    """Few units and many, by both rules."""
    generator, masks = (
        torch.Generator().manual_seed(seed),
        [KeepMask.all_kept(index), KeepMask.all_kept(index, "gamma")],
    )
    for count in (1, 1, 1, 2, 3, 5, 9, 40, len(index) // 2):
        units = torch.randperm(len(index), generator=generator)[:count]
        masks.append(masks[0].without(units))
        masks.append(masks[1].without(units[index.batch_norm_units[units]]))
    return masks


def pruned_logits(model: nn.Module, mask: KeepMask, inputs: Tensor) -> Tensor:
    """By a permanently pruned copy in double precision."""
    pruned = copy.deepcopy(model).eval()
    apply_mask(pruned, mask)
    with torch.no_grad():
        return pruned.double()(inputs.double())


def whole_convolutions(engine: Engine) -> list[str]:
    """Fills up with the convolutions that are computed from all their input channels."""
    seen: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if args[0].shape[1] == module.in_channels:
                seen.append(name)

        return hook

    for name, module in engine.network.modules.items():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(watch(name))
    return seen


def test_logits_are_those_of_a_pruned_network(network: nn.Module, index: UnitIndex, inputs: Tensor) -> None:
    engine = Engine(network, index, inputs, chunk=4)
    for mask in random_masks(index):
        expected = pruned_logits(network, mask, inputs)
        got = engine.logits(mask)
        assert got.dtype == torch.float32 and not got.requires_grad
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("small_cnn", 12), ("small_vgg", 32), ("wide_resnet16_1", 16), ("cifar_resnet18", 8)),
        *(("preact_resnet18-w16", 16), ("cifar_vgg16_bn-w16", 32), ("cifar_mobilenet_v2-w0.5", 16)),
        *(("mobilenet_v2", 32), ("densenet121", 32), ("squeezenet1_1", 32), ("efficientnet_b0", 32)),
        *(("shufflenet_v2_x0_5", 32), ("regnet_y_400mf", 32), ("googlenet", 32), ("convnext_tiny", 32)),
    ],
)
def test_registered_networks(name: str, size: int, randomised: Randomise) -> None:
    torch.manual_seed(0)
    channels = 1 if name == "small_cnn" else 3
    model = randomised(build_model(name, channels, 10))
    index = index_units(model, (channels, size, size))
    inputs = torch.rand(2, channels, size, size)
    engine = Engine(model, index, inputs)
    for mask in random_masks(index, seed=3)[::3]:
        expected = pruned_logits(model, mask, inputs)
        assert (engine.logits(mask) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("max_bytes", [0, 3_000_000, 1 << 30])
def test_logits_depend_on_the_mask_alone(network: nn.Module, index: UnitIndex, inputs: Tensor, max_bytes: int) -> None:
    """Bit for bit: not on what was asked before, nor on what the cache still holds, nor on the other images."""
    masks = random_masks(index)
    expected = [Engine(network, index, inputs, chunk=4).logits(mask) for mask in masks]
    cache = ActivationCache(max_bytes)
    engine = Engine(network, index, inputs, cache, chunk=4)
    fewer = Engine(network, index, inputs[4:8], cache, chunk=4)
    for i in (*range(len(masks)), *reversed(range(len(masks))), 3, 3, 0):
        assert torch.equal(engine.logits(masks[i]), expected[i])
        assert torch.equal(fewer.logits(masks[i]), expected[i][4:8])
        if i % 4 == 0:
            engine.effects(masks[i], lambda logits: logits.square().mean(), 5)
        assert cache.bytes <= cache.peak_bytes <= max_bytes


def test_engines_that_share_a_cache_keep_their_values_apart(
    index: UnitIndex, inputs: Tensor, randomised: Randomise
) -> None:
    cache, networks = ActivationCache(), [randomised(EveryWay(), seed) for seed in (1, 2)]
    engines = [Engine(network, index, inputs, cache) for network in networks]
    for mask in random_masks(index)[:8]:
        for engine, network in zip(engines, networks, strict=True):
            torch.testing.assert_close(engine.logits(mask), pruned_logits(network, mask, inputs).float())


def test_only_what_a_mask_changes_is_computed(network: nn.Module, index: UnitIndex, inputs: Tensor) -> None:
    engine = Engine(network, index, inputs)
    seen, layers = whole_convolutions(engine), {layer.name: layer.offset for layer in index}
    start = KeepMask.all_kept(index)
    for name, expected in (
        ("hidden_norm", []),
        ("mixed", []),
        ("grouped", ["twice", "twice", "squeeze", "mixed"]),  # "same" padding is always computed whole
        ("left_norm", ["grouped", "twice", "twice", "squeeze", "mixed"]),
        ("norm", ["grouped", "twice", "twice", "squeeze", "mixed"]),  # `left` is updated by its channel
    ):
        seen.clear()
        engine.logits(start.without([layers[name] + 1]))
        assert sorted(seen) == sorted(expected), name
        seen.clear()
        engine.logits(start.without([layers[name] + 1]))
        engine.logits(start)
        assert seen == [], name
    engine.logits(start.without([layers["norm"], layers["mixed"]]))
    seen.clear()
    engine.logits(start.without([layers["norm"], layers["mixed"] + 1]))
    assert seen == []


def test_the_cache_gives_up_what_was_used_longest_ago() -> None:
    cache = ActivationCache(13)  # a fifth is left free
    cache.register("", one_mask=10, workspace=0)
    for key, size in (("a", 4), ("b", 3), ("c", 3)):
        assert cache.make_room(size, set())
        cache.put(key, size, [key])
    cache.touch(["a", "missing"])
    assert not cache.make_room(8, {"a"}) and cache.bytes == 10
    assert cache.make_room(2, set()) and cache.bytes == 7
    assert cache.get("b") is None and cache.get("a") == ["a"] and cache.get("c") == ["c"]
    assert cache.make_room(6, {"c"}) and cache.get("a") is None and cache.bytes == 3
    assert cache.peak_bytes == 10


def test_the_cache_keeps_what_a_few_masks_need_at_the_most() -> None:
    cache = ActivationCache(1000)
    cache.register("a", one_mask=10, workspace=100)
    assert cache.make_room(80, set()) and not cache.make_room(81, set())  # of eight masks
    cache.register("b", one_mask=20, workspace=50)
    assert cache.make_room(240, set()) and not cache.make_room(241, set())
    cache.register("c", one_mask=1000, workspace=0)
    assert cache.make_room(700, set()) and not cache.make_room(701, set())  # 1000, less a fifth and the workspace
    cache.drop("c")
    cache.drop("b")
    assert not cache.make_room(81, set())


def test_a_mask_that_was_touched_outlives_one_that_was_not(
    network: nn.Module, index: UnitIndex, inputs: Tensor
) -> None:
    first, second = (KeepMask.all_kept(index).without([unit]) for unit in (0, 1))

    def recomputed(touched: KeepMask) -> int:
        """Whole convolutions that `first` takes, after the cache has given up the older half of what it held."""
        engine = Engine(network, index, inputs)
        engine.logits(first)
        engine.logits(second)
        engine.touch(touched)
        engine.cache.max_bytes = int((engine.cache.workspace + engine.cache.bytes / 2) / 0.8)
        assert engine.cache.make_room(0, set())
        seen = whole_convolutions(engine)
        engine.logits(first)
        return len(seen)

    assert recomputed(touched=first) == 0 < recomputed(touched=second)


def test_the_network_is_left_as_it_was(index: UnitIndex, inputs: Tensor, randomised: Randomise) -> None:
    network = randomised(EveryWay())
    before = copy.deepcopy(network.state_dict())
    engine = Engine(network, index, inputs)
    mask = random_masks(index)[-2]
    expected = engine.logits(mask)
    engine.effects(mask, lambda logits: logits.sum())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.relu.inplace and all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(engine.logits(mask), expected)  # the engine has a copy


class Odd(nn.Module):
    """One oddity each; `forward` is given, over two convolutions, a batch-norm and two linear layers."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.norm, self.row = nn.BatchNorm2d(64), nn.Conv1d(64, 8, 1)
        self.h, self.k, self.out = nn.Linear(64, 6), nn.Linear(64, 6), nn.Linear(6, 3)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def leaky_in_place(net: Any, x: Tensor) -> Tensor:
    return net.out(net.h(torch.sigmoid_(net.b(nn.functional.leaky_relu_(net.a(x)))).mean((2, 3))))


def two_readers_of_a_flatten(net: Any, x: Tensor) -> Tensor:
    flat = nn.functional.adaptive_avg_pool2d(net.a(x)[:, :16], 2).flatten(1)
    return net.out(net.h(flat) * net.k(flat))


def norm_behind_a_convolution_read_twice(net: Any, x: Tensor) -> Tensor:
    y = net.b(net.a(x))
    return net.out(net.h((net.norm(y) + y).relu().mean((2, 3))))


def pool_over_channels(net: Any, x: Tensor) -> Tensor:
    y = nn.functional.max_pool2d(net.b(net.a(x)).flatten(2), 3, 1, 1)
    return net.out(net.h(torch.cat([net.row(y).mean(2)] * 8, 1)))


def positions_among_the_images(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).permute(0, 2, 3, 1).reshape(-1, 64)
    return net.out(net.h(y).relu().view(-1, 64, 6).mean(1))


def subtracts_from_its_input(net: Any, x: Tensor) -> Tensor:
    x -= 0.5
    return net.out(net.h(net.b(net.a(x)).mean((2, 3))))


def weight_read_elsewhere(net: Any, x: Tensor) -> Tensor:
    return net.out(net.h(nn.functional.conv2d(net.b(net.a(x)), net.b.weight).mean((2, 3))))


def writes_out(net: Any, x: Tensor) -> Tensor:
    return net.out(net.h(net.b(net.a(x)).fill_(1).mean((2, 3))))


def two_outputs(net: Any, x: Tensor) -> Any:
    return net.h(net.a(x).mean((2, 3))), x


@pytest.mark.parametrize(
    "forward",
    [
        *(leaky_in_place, two_readers_of_a_flatten, norm_behind_a_convolution_read_twice),
        *(pool_over_channels, positions_among_the_images, subtracts_from_its_input),
    ],
)
def test_odd_networks(forward: Any, inputs: Tensor, randomised: Randomise) -> None:
    torch.manual_seed(0)
    network = randomised(Odd(forward)).train()
    index, given = index_units(network, (2, 8, 8)), inputs.clone()
    engine = Engine(network, index, given, chunk=3)  # 10 images: the last chunk has one
    assert torch.equal(given, inputs) and network.training and network.norm.training
    for mask in random_masks(index):
        expected = pruned_logits(network, mask, inputs)
        assert (engine.logits(mask) - expected).abs().max() <= 1e-5 * expected.abs().max()
        if mask.rule == "zero":
            got = engine.effects(mask, lambda logits: logits.square().mean())
            assert got.dtype == torch.float32 and not got.requires_grad
            torch.testing.assert_close(got.double(), effects_by_weights(network, mask, inputs), rtol=1e-3, atol=1e-6)


def test_effects_are_by_image_whatever_the_chunks(network: nn.Module, index: UnitIndex, inputs: Tensor) -> None:
    mask = random_masks(index)[8]
    expected = effects_by_weights(network, mask, inputs)
    assert mask.units_pruned > 1 and float(expected.std(0).max()) > 1e-4  # images differ
    for chunk, images in ((10, None), (4, None), (3, 7), (1, 2), (4, 4), (100, 10)):
        got = Engine(network, index, inputs, chunk=chunk).effects(
            mask, lambda logits: logits.square().sum() / 50, images
        )  # the mean of the squares of ten images, five classes each
        assert got.shape == (images or 10, len(index))
        torch.testing.assert_close(got.double(), expected[:images], rtol=1e-3, atol=1e-6)
        assert float(got[:, ~mask.keep].abs().max()) > 1e-5  # what is pruned can be restored


def scale_from_a_table(net: Any, x: Tensor) -> Tensor:
    scale = net.k(net.norm.running_mean.expand(5, 64)).relu()  # no image is in it
    return net.out(net.h(net.b(net.a(x)).mean((2, 3))) * scale.mean(0))


def test_images_share_the_effect_of_what_none_of_them_is_in(inputs: Tensor, randomised: Randomise) -> None:
    torch.manual_seed(0)
    network = randomised(Odd(scale_from_a_table))
    index = index_units(network, (2, 8, 8))
    (units,) = (layer.units for layer in index if layer.name == "k")
    mask = KeepMask.all_kept(index)
    expected = effects_by_weights(network, mask, inputs)
    got = Engine(network, index, inputs, chunk=10).effects(mask, lambda logits: logits.square().mean()).double()
    assert float(expected[:, units].std(0).max()) > 0
    torch.testing.assert_close(got.sum(0), expected.sum(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got[:, units], expected[:, units].mean(0).expand(10, -1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (weight_read_elsewhere, "b.weight is also used as b.weight, outside its layer"),
        (writes_out, "fill_.. works in place and has no twin"),
        (two_outputs, "gives something else than one tensor"),
    ],
)
def test_networks_that_gates_cannot_stand_for_are_refused(forward: Any, words: str, inputs: Tensor) -> None:
    network = Odd(forward)
    with pytest.raises(ModelError, match=words):
        Engine(network, index_units(network, (2, 8, 8)), inputs)


def test_what_dead_engines_kept_is_given_up(network: nn.Module, index: UnitIndex, inputs: Tensor) -> None:
    cache = ActivationCache()
    engine, other = Engine(network, index, inputs, cache), Engine(network, index, inputs, cache)
    both = cache.bytes
    del engine
    assert 0 < cache.bytes == both // 2
    assert torch.equal(
        other.logits(KeepMask.all_kept(index)), Engine(network, index, inputs).logits(KeepMask.all_kept(index))
    )


def test_a_network_that_its_trace_does_not_reproduce_is_refused() -> None:
    torch.manual_seed(0)
    network = Hidden()
    index = index_units(network, (2, 8, 8))
    with pytest.raises(ModelError, match="traced copy of Hidden gives other logits"):
        Engine(network, index, torch.rand(3, 2, 8, 8))
