"""First-order effects of pruning each unit, from gradients: one pass instead of one evaluation per unit.

Pruning multiplies the parameters behind a unit's gates by 0, so to first order a loss changes by minus the sum of
parameter times gradient over those gates (Molchanov et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.data import DefenceData
from onp.units import UnitIndex


def first_order_effects(model: nn.Module, index: UnitIndex, loss: Callable[[], Tensor]) -> Tensor:
    """Estimated change of `loss()`, a differentiable scalar of `model`, when each unit is pruned alone, shape (N,)."""
    names = sorted({name for layer in index for name, _ in layer.gates})
    parameters = [model.get_parameter(name) for name in names]
    frozen = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        gradients = dict(zip(names, torch.autograd.grad(loss(), parameters, allow_unused=True), strict=True))
    finally:
        for parameter, flag in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(flag)
    effects = torch.zeros(len(index))
    for layer in index:
        for name, axis in layer.gates:
            gradient = gradients[name]
            if gradient is not None:
                change = (model.get_parameter(name).detach() * gradient).movedim(axis, 0).reshape(layer.size, -1)
                effects[layer.offset : layer.offset + layer.size] -= change.sum(1).cpu()
    return effects


def loss_effects(model: nn.Module, index: UnitIndex, data: DefenceData) -> Tensor:
    """First-order change of the clean cross-entropy, shape (N,), nats."""
    model.eval()
    return first_order_effects(model, index, partial(_cross_entropy, model, data.inputs, data.labels))


def _cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def divergence_effects(model: nn.Module, index: UnitIndex, data: DefenceData, images: int = 64) -> Tensor:
    """Estimated KL divergence of the outputs when each unit is pruned alone, shape (N,), nats, at least 0.

    Half the empirical Fisher information (Theis et al. 2018): the divergence has no first-order part.
    Uses up to `images` of the data, each with a class drawn from the network's own outputs.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    inputs = data.inputs[:images]
    with torch.no_grad():
        classes = torch.multinomial(model(inputs).softmax(1).cpu(), 1, generator=generator).flatten().to(inputs.device)
    total = torch.zeros(len(index))
    for image, label in zip(inputs.split(1), classes.split(1), strict=True):
        total += first_order_effects(model, index, partial(_cross_entropy, model, image, label)) ** 2
    return total / (2 * len(inputs))
