"""RNP's second step: recover the unlearned network through masks alone (section 3.2, equation 3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from onp.config import require
from onp.data import DefenceData, augmented_batches
from onp.errors import ModelError
from onp.seeding import seeded
from onp.units import UnitIndex


@dataclass(frozen=True)
class RecoverConfig:
    """RNP's recovery; the defaults are those of the reference implementation."""

    def __post_init__(self) -> None:  # single images are left out of training
        require(self, learning_rate=0, momentum=0, epochs=1, batch_size=2)

    learning_rate: float = 0.2
    """step size of SGD over the masks"""
    momentum: float = 0.9
    """momentum of SGD"""
    loss_weight: float = 0.2
    """factor of the cross-entropy"""
    epochs: int = 20
    """passes over the defence data"""
    batch_size: int = 128
    """images per step"""


def recover(unlearned: nn.Module, index: UnitIndex, data: DefenceData, config: RecoverConfig, seed: int) -> Tensor:
    """Mask values in [0, 1], shape (N,), float32 on the CPU: what falls was kept up by the backdoor.

    In a copy of `unlearned` in train mode, one mask per batch-norm channel multiplies gamma (not beta), starts
    at 1 and descends the cross-entropy on clean data, clamped to [0, 1] after each step. Weights are frozen;
    the copy's running statistics move. Units that no batch-norm gates keep the value 1.
    Raises `ModelError` where no unit has a batch-norm, or where the masks become NaN.
    """
    require_batch_norm(index)
    model = copy.deepcopy(unlearned).train().requires_grad_(False)
    values = torch.ones(len(index), device=data.images.device, requires_grad=True)
    optimizer = torch.optim.SGD([values], config.learning_rate, momentum=config.momentum)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed), torch.enable_grad():
        for _ in range(config.epochs):
            for inputs, labels in augmented_batches(data, config.batch_size, generator):
                logits = functional_call(model, _masked_gammas(model, index, values), inputs)
                optimizer.zero_grad()
                (config.loss_weight * F.cross_entropy(logits, labels)).backward()
                optimizer.step()
                with torch.no_grad():
                    values.clamp_(0, 1)
    if not bool(torch.isfinite(values).all()):
        raise ModelError("RNP's recovery gave NaN masks: unlearning broke the network; lower its learning rate")
    return values.detach().cpu()


def require_batch_norm(index: UnitIndex) -> None:
    """Raise `ModelError` for a network without batch-norm, on which RNP is not defined."""
    if not bool(index.batch_norm_units.any()):
        raise ModelError("RNP masks batch-norm channels and this network has none: it cannot be applied")


def _masked_gammas(model: nn.Module, index: UnitIndex, values: Tensor) -> dict[str, Tensor]:
    """gamma * mask of every batch-norm that gates units, by parameter name."""
    names = {f"{layer.batch_norm}.weight": layer for layer in index if layer.batch_norm is not None}
    return {
        name: model.get_parameter(name) * values[layer.offset : layer.offset + layer.size]
        for name, layer in names.items()
    }
