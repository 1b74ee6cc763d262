"""Independent computations that several test files compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.data import DefenceData, random_crop_and_flip
from onp.engine import Engine
from onp.masks import KeepMask, apply_mask
from onp.units import UnitIndex, UnitLayer


def known_views(model: nn.Module, data: DefenceData) -> Tensor:
    """Cropped and flipped images in [0, 1], one by one; where the network misses the label, the image itself."""
    shown = []
    for image, view, label in zip(
        data.images, random_crop_and_flip(data.images, seed=0, part=16), data.labels, strict=True
    ):
        with torch.no_grad():
            guess = int(model(data.normalise(view.unsqueeze(0))).argmax())
        shown.append(view if guess == int(label) else image)
    return torch.stack(shown)


def shrunk(model: nn.Module, layer: UnitLayer, unit: int, by: float) -> nn.Module:
    """A double-precision copy whose gates of one unit are multiplied by 1 - by."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, axis in layer.gates:
            model.get_parameter(name).select(axis, unit).mul_(1 - by)
    return model


def slopes(model: nn.Module, index: UnitIndex, loss: Callable[[nn.Module], Tensor], eps: float = 1e-4) -> Tensor:
    """Central differences of `loss` by shrinking each unit's gates, one entry of the loss per row: (N, entries)."""
    rows = []
    with torch.no_grad():
        for layer in index:
            for unit in range(layer.size):
                down, up = (loss(shrunk(model, layer, unit, by)) for by in (eps, -eps))
                rows.append((down - up).reshape(-1) / (2 * eps))
    return torch.stack(rows)


def toggled(model: nn.Module, mask: KeepMask, unit: int, by: float) -> nn.Module:
    """A double-precision copy under `mask`, so far on the way to where `unit` is pruned, or else restored."""
    here, there = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    apply_mask(here, mask)
    apply_mask(there, mask.without([unit]) if mask.keep[unit] else mask.restoring([unit]))
    with torch.no_grad():
        for start, end in zip(here.parameters(), there.parameters(), strict=True):
            start += by * (end - start)
    return here


def toggling_slopes(
    model: nn.Module, mask: KeepMask, loss: Callable[[nn.Module], Tensor | float], eps: float = 1e-4
) -> Tensor:
    """Slope of `loss` on the way to where a unit is toggled, by three points from its start on: (N,)."""
    rows = []
    with torch.no_grad():
        for unit in range(len(mask.index)):
            start, near, far = (float(loss(toggled(model, mask, unit, by))) for by in (0, eps, 2 * eps))
            rows.append((4 * near - far - 3 * start) / (2 * eps))
    return torch.tensor(rows, dtype=torch.float64)


def cross_entropies(data: DefenceData, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    inputs = data.inputs.double()
    return lambda model: nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def loss_effects(network: nn.Module, index: UnitIndex, data: DefenceData) -> Tensor:
    return Engine(network, index, data.inputs).effects(KeepMask.all_kept(index), data.cross_entropy).sum(0)


def effects_by_weights(model: nn.Module, mask: KeepMask, inputs: Tensor) -> Tensor:
    """What closing or opening a gate does to the mean square of the logits, to first order: (n, N), in double.

    Image by image, parameter times gradient over the gates of a pruned copy, negative where the unit is kept. Closed
    gates are ajar, and the parameters are those with the layer's own gates open: what restoring brings.
    """
    whole = copy.deepcopy(model).eval().double()
    opened = []
    for layer in mask.index:
        opened.append(copy.deepcopy(whole))
        apply_mask(opened[-1], mask.restoring(layer.units))
    pruned = copy.deepcopy(whole)
    apply_mask(pruned, mask)
    with torch.no_grad():
        for small, full in zip(pruned.parameters(), whole.parameters(), strict=True):
            small += 1e-9 * (full - small)
    squares = pruned(inputs.double()).square()
    effects = torch.zeros(len(inputs), len(mask.index), dtype=torch.float64)
    signs = 1 - 2 * mask.keep.double()
    for image in range(len(inputs)):
        pruned.zero_grad()
        (squares[image].sum() / squares.numel()).backward(retain_graph=True)
        for layer, network in zip(mask.index, opened, strict=True):
            for name, axis in layer.gates:
                if (gradient := pruned.get_parameter(name).grad) is not None:
                    change = (network.get_parameter(name).detach() * gradient).movedim(axis, 0)
                    effects[image, layer.units] += signs[layer.units] * change.reshape(layer.size, -1).sum(1)
    return effects
