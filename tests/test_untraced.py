"""A submodule that cannot be traced is one piece without units; everything around it is as usable as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onp.engine import Engine
from onp.errors import ModelError
from onp.masks import KeepMask, apply_mask, masked
from onp.units import index_units

IMAGE = (2, 8, 8)


def finite(x: Tensor) -> Tensor:
    """Its input, at which it looks."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("not finite")
    return x


class Branching(nn.Module):
    """Asks for a value, and works in place on what it is given; gives the same for an image whatever its company."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.inner, self.relu, self.give = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True), give

    def forward(self, x: Tensor) -> Any:
        x = finite(x)
        x += 1
        self.relu(x)
        return self.give(self.inner(x))


class Around(nn.Module):
    """A convolution with batch-norm, a block around `piece`, another convolution, the logits."""

    def __init__(self, piece: nn.Module, way: Callable[[Any, Tensor], Tensor] = lambda net, x: net.piece(x)) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.block, self.head = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Sequential(piece)), nn.Linear(5, 3)
        self.way = way

    @property
    def piece(self) -> nn.Module:
        return self.block[1][0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block[0](self.norm(self.conv(x)).relu())
        return self.head(self.last(self.way(self, x)).relu().mean((2, 3)))


def check(model: nn.Module, inputs: Tensor) -> None:
    """Engine, `masked` and `apply_mask` agree under masks of one unit and of many; effects are those of parameters."""
    index = index_units(model, tuple(inputs.shape[1:]))
    engine = Engine(model, index, inputs, chunk=3)
    for units in [[unit] for unit in range(0, len(index), 2)] + [list(range(1, len(index), 3)), []]:
        mask = KeepMask.all_kept(index).without(units)
        pruned = copy.deepcopy(model)
        apply_mask(pruned, mask)
        with torch.no_grad(), masked(model, mask):
            expected = pruned(inputs.clone())
            assert torch.equal(model(inputs.clone()), expected)
        torch.testing.assert_close(engine.logits(mask), expected, rtol=1e-5, atol=1e-5)
    effects = engine.effects(mask, lambda logits: logits.square().sum()).sum(0)
    model.zero_grad()
    model(inputs.clone()).square().sum().backward()
    for layer in index:
        change = torch.zeros(layer.size)
        for name, axis in layer.gates:
            parameter = model.get_parameter(name)
            change -= (parameter * parameter.grad).detach().movedim(axis, 0).reshape(layer.size, -1).sum(1)
        torch.testing.assert_close(effects[layer.units], change, rtol=1e-3, atol=1e-4)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(7, *IMAGE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("give", "way"),
    [
        (lambda x: x, lambda net, x: net.piece(x) + 1),
        (lambda x: (x, x.mean()), lambda net, x: net.piece(x)[0] * 2),
        (lambda x: {"x": x, "y": [x]}, lambda net, x: net.piece(x)["y"][0]),
        (lambda x: x, lambda net, x: net.piece(net.piece(x))),
    ],
    ids=["tensor", "tuple", "dictionary", "twice"],
)
def test_the_smallest_module_that_cannot_be_traced_is_one_piece(
    give: Any, way: Any, inputs: Tensor, randomised: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    model = randomised(Around(Branching(give), way))
    index = index_units(model, IMAGE)
    assert [path for path, _ in index.untraced] == ["block.1.0"]
    assert "symbolically traced variables cannot be used as inputs to control flow" in index.untraced[0][1]
    assert [layer.name for layer in index] == ["norm", "block.0", "last"]
    assert index.layers[2].reads is None
    check(model, inputs)


class ReLU(nn.Module):
    """Not what it is called."""

    def forward(self, x: Tensor) -> Tensor:
        return finite(x).flip(1)


class Halving(nn.Conv2d):
    """Not what it is derived from: a channel with weights of 0 is not 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(finite(x)) + 1


@pytest.mark.parametrize("piece", [ReLU(), nn.Sequential(ReLU(), nn.BatchNorm2d(6)), Halving(6, 6, 1)])
def test_a_piece_is_not_what_its_name_or_base_class_suggests(
    piece: nn.Module, inputs: Tensor, randomised: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    model = randomised(Around(piece))
    index = index_units(model, IMAGE)
    assert len(index.untraced) == 1 and not any(layer.name.startswith("block.1.0") for layer in index.layers[:2])
    assert index.layers[2].reads is None
    check(model, inputs)


def test_every_piece_is_reported_in_the_order_of_the_network(randomised: Callable[..., nn.Module]) -> None:
    class Nested(nn.Module):
        """Cannot be traced either, since it asks for a value of what its piece gives."""

        def __init__(self) -> None:
            super().__init__()
            self.piece = Branching()

        def forward(self, x: Tensor) -> Tensor:
            x = self.piece(x)
            return x if x.sum() > -1e9 else -x

    model = randomised(Around(nn.Sequential(Branching(), nn.ReLU(), Nested(), Branching())))
    assert [path for path, _ in index_units(model, IMAGE).untraced] == ["block.1.0.0", "block.1.0.2", "block.1.0.3"]


def test_modules_of_pytorch_with_unknown_weights_are_reported(inputs: Tensor) -> None:
    piece = nn.ConvTranspose2d(6, 6, 3, padding=1)
    model = Around(piece).eval()
    assert index_units(model, IMAGE).untraced == (("block.1.0", "ConvTranspose2d is one piece"),)
    assert index_units(Around(nn.Identity()).eval(), IMAGE).untraced == ()
    check(model, inputs)


def test_weights_that_a_piece_shares_with_a_layer_are_refused(inputs: Tensor) -> None:
    model = Around(Branching())
    model.piece.inner = model.last = nn.Conv2d(6, 6, 3, padding=1)
    model.head = nn.Linear(6, 3)
    with pytest.raises(ModelError, match=r"last\.(weight|bias) is also used as block\.1\.0\.inner\.(weight|bias)"):
        Engine(model.eval(), index_units(model, IMAGE), inputs)
    model = Around(Branching(), lambda net, x: net.piece.inner(net.piece(x))).eval()
    with pytest.raises(ModelError, match=r"block\.1\.0\.inner\.(weight|bias) is also used"):
        Engine(model, index_units(model, IMAGE), inputs)


def test_a_network_whose_own_forward_branches_is_refused_with_advice() -> None:
    model = Around(nn.Identity(), lambda net, x: x if x.sum() > 0 else -x)
    with pytest.raises(ModelError, match=r"cannot trace Around: .*control flow; take what branches .* a submodule"):
        index_units(model, IMAGE)
