"""Pruning a unit makes just the documented tensor zero, and a channel is silent once all that write it are pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import TOYS

from onp.masks import KeepMask, masked
from onp.units import UnitIndex, UnitLayer, index_units


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
