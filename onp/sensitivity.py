"""First-order effects of pruning each unit, from gradients: one pass instead of one evaluation per unit.

Pruning multiplies the parameters behind a unit's gates by 0, so to first order a function of the outputs changes by
minus the sum of parameter times gradient over those gates (Molchanov et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.data import DefenceData
from onp.units import UnitIndex


def first_order_effects(
    model: nn.Module,
    index: UnitIndex,
    inputs: Tensor,
    function: Callable[[Tensor], Tensor],
    logits: Tensor | None = None,
    batch_size: int = 125,
) -> Tensor:
    """Estimated change of `function(model(inputs))`, when each unit is pruned alone, shape (N,).

    `logits` are `model(inputs)` where they are known already. The backward pass goes batch by batch, so memory does
    not grow with the number of images.
    """
    model.eval()
    if logits is None:
        with torch.no_grad():
            logits = torch.cat([model(batch) for batch in inputs.split(batch_size)])
    logits = logits.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(function(logits), logits)
    names = sorted({name for layer in index for name, _ in layer.gates})
    parameters = [model.get_parameter(name) for name in names]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    frozen = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch, slope in zip(inputs.split(batch_size), slopes.split(batch_size), strict=True):
            parts = torch.autograd.grad((model(batch) * slope).sum(), parameters, allow_unused=True)
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient += part
    finally:
        for parameter, flag in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(flag)
    changes = {n: -p.detach() * g for n, p, g in zip(names, parameters, gradients, strict=True)}
    effects = torch.zeros(len(index))
    for layer in index:
        for name, axis in layer.gates:
            change = changes[name].movedim(axis, 0).reshape(layer.size, -1).sum(1)
            effects[layer.offset : layer.offset + layer.size] += change.cpu()
    return effects


def loss_effects(model: nn.Module, index: UnitIndex, data: DefenceData) -> Tensor:
    """First-order change of the clean cross-entropy, shape (N,), nats."""
    return first_order_effects(model, index, data.inputs, lambda logits: F.cross_entropy(logits, data.labels))
