"""Independent computations that several test files compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.data import DefenceData, random_crop_and_flip
from onp.engine import Engine
from onp.masks import KeepMask
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


def cross_entropies(data: DefenceData, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    inputs = data.inputs.double()
    return lambda model: nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def loss_effects(network: nn.Module, index: UnitIndex, data: DefenceData) -> Tensor:
    return Engine(network, index, data.inputs).effects(KeepMask.all_kept(index), data.cross_entropy).sum(0)
