"""Fine-tuning after pruning: the network learns on from the clean defence images, and what was pruned stays pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from onp.config import require
from onp.data import DefenceData, augmented_batches
from onp.errors import ConfigError, ModelError
from onp.logits import logits_of
from onp.masks import KeepMask, apply_mask
from onp.seeding import seeded

Watch = Callable[[int, nn.Module], None]
Worth = Callable[[nn.Module, DefenceData], float]
"""what a network is worth on clean images"""


@dataclass(frozen=True)
class FinetuneConfig:
    """SGD on clean images; the same for every network."""

    def __post_init__(self) -> None:
        require(self, epochs=1, batch_size=2, momentum=0, weight_decay=0)  # single images are left out of training
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
    """passes over the images, at the most"""
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
    worth: Worth | None = None,
) -> nn.Module:
    """A copy of `model`, pruned by `mask` and trained on with one half of the clean images.

    It is taken behind the epoch that is worth most on the other half, or as it was: the trigger-free stop. By default
    that is the one with the least cross-entropy, which does not know of a backdoor that wakes.
    Pruned units stay exactly zero; under RNP's rule, "gamma", their beta learns on. Raises `ModelError` where training
    diverges.
    """
    config = config or FinetuneConfig()
    taught, held_out = data.halves(seed)
    best = copy.deepcopy(model).eval()
    apply_mask(best, mask)
    worth = worth or _fit
    most = worth(best, held_out)

    def watch(epochs: int, network: nn.Module) -> None:
        nonlocal most
        if (now := worth(network.eval(), held_out)) > most:
            most = now
            best.load_state_dict(network.state_dict())

    learn_on(model, mask, taught, config, seed, after_epoch=watch)
    return best


def _fit(network: nn.Module, data: DefenceData) -> float:
    return -float(data.cross_entropy(logits_of(network, data.inputs)))


def learn_on(
    model: nn.Module,
    mask: KeepMask,
    data: DefenceData,
    config: FinetuneConfig,
    seed: int,
    after_step: Watch = lambda steps, network: None,
    after_epoch: Watch = lambda epochs, network: None,
) -> nn.Module:
    """A copy of `model`, pruned by `mask` and trained on by SGD on randomly cropped images.

    The mask is applied again after every step, so that pruned units stay exactly zero, whatever batch-norm statistics
    do: masking the result once more changes nothing. What watches is called with the steps or epochs taken and the
    network, and may change its mode. Raises `ModelError` where training diverges.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    apply_mask(model, mask)
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    generator, steps = torch.Generator().manual_seed(seed), 0
    with seeded(seed), torch.enable_grad():
        for epoch in range(config.epochs):
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
                after_step(steps, model)
            after_epoch(epoch + 1, model)
    return model.eval()
