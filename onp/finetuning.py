"""Fine-tuning after pruning: the network learns on from the clean defence images, and what was pruned stays pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from onp.data import DefenceData, augmented_batches
from onp.errors import ConfigError, ModelError
from onp.masks import KeepMask, apply_mask
from onp.seeding import seeded


@dataclass(frozen=True)
class FinetuneConfig:
    """SGD on clean images; the same for every network."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} {value}: expected at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate {self.learning_rate}: expected above 0")

    learning_rate: float = 0.003
    """step size of SGD"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD"""
    batch_size: int = 50
    """images per step"""
    epochs: int = 10
    """passes over the images"""
    flip: bool = False
    """mirror half of the images, where that leaves their classes as they are (it changes a digit, or a traffic sign)"""
    frozen: bool = True
    """keep batch-norm statistics and leave dropout out: adapting to what was pruned, the statistics can bring the
    backdoor back"""


def finetune(
    model: nn.Module,
    mask: KeepMask,
    data: DefenceData,
    config: FinetuneConfig | None = None,
    seed: int = 0,
    watch: Callable[[int, nn.Module], None] = lambda steps, network: None,
) -> nn.Module:
    """A copy of `model`, pruned by `mask` and trained on by SGD on clean images, randomly cropped.

    The mask is applied again after every step, so that pruned units stay exactly zero, whatever batch-norm statistics
    do: masking the result once more changes nothing. `watch` is called with the steps taken and the network, in any
    mode. Raises `ModelError` where training diverges.
    """
    config = config or FinetuneConfig()
    model = copy.deepcopy(model)
    apply_mask(model, mask)
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    generator, steps = torch.Generator().manual_seed(seed), 0
    with seeded(seed):
        for _ in range(config.epochs):
            for inputs, labels in augmented_batches(data, config.batch_size, generator, config.flip):
                loss = F.cross_entropy(model.train(not config.frozen)(inputs), labels)
                if not bool(torch.isfinite(loss)):
                    raise ModelError(
                        f"fine-tuning diverged at step {steps + 1}: the outputs are not finite; lower its learning "
                        f"rate ({config.learning_rate})"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                apply_mask(model, mask)
                steps += 1
                watch(steps, model)
    return model.eval()
