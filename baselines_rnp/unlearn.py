"""RNP's first step: unlearn the network on clean data, which lays the backdoor bare (section 3.2, equation 2)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from onp.config import UnlearnConfig
from onp.data import DefenceData, augmented_batches
from onp.errors import ModelError
from onp.seeding import seeded


@dataclass(frozen=True, eq=False)
class Unlearned:
    """The unlearned copy and how its unlearning ended."""

    model: nn.Module
    epochs: int
    steps: int
    """batches that it took"""
    accuracy: float
    """running train-mode accuracy over the last epoch or batch"""
    reached: bool
    """whether the accuracy fell to the configured stop before the epochs ran out"""


def unlearn(model: nn.Module, data: DefenceData, config: UnlearnConfig, seed: int) -> Unlearned:
    """Maximise the cross-entropy of a copy of `model` on clean data until its accuracy falls.

    SGD over all parameters in train mode, on batches with random crop and flip. It stops where the running accuracy of
    the epoch (RNP's way) or of a batch (`config.stop_on`) is not above `config.stop_accuracy`. Where that comes in
    fewer than `config.min_steps` steps, all is done again at a third of the learning rate, five times at the most and
    while it still comes (ours: a network that falls at once loses its backdoor too). Raises `ModelError` where it
    diverges.
    """
    result = _ascend(model, data, config, seed)
    for _ in range(5):
        if not result.reached or result.steps >= config.min_steps:
            break
        config = replace(config, learning_rate=config.learning_rate / 3)
        slower = _ascend(model, data, config, seed)
        if not slower.reached:  # a copy that fell at once tells more than one that never fell
            break
        result = slower
    return result


def _ascend(model: nn.Module, data: DefenceData, config: UnlearnConfig, seed: int) -> Unlearned:
    model = copy.deepcopy(model).train().requires_grad_(True)  # a frozen network has nothing to unlearn with
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    accuracy, reached, epoch, steps = 1.0, False, 0, 0
    with seeded(seed), torch.enable_grad():
        while epoch < config.max_epochs and not reached:
            epoch += 1
            correct = seen = 0
            for inputs, labels in augmented_batches(data, config.batch_size, generator):
                logits = model(inputs)
                if not bool(torch.isfinite(logits).all()):
                    raise ModelError(
                        f"unlearning diverged in epoch {epoch}: the outputs are not finite; lower its learning rate "
                        f"({config.learning_rate})"
                    )
                optimizer.zero_grad()
                (-F.cross_entropy(logits, labels)).backward()
                optimizer.step()
                steps += 1
                hits = int((logits.argmax(1) == labels).sum())
                correct, seen = correct + hits, seen + len(labels)
                if config.stop_on == "batch" and hits / len(labels) <= config.stop_accuracy:
                    accuracy, reached = hits / len(labels), True
                    break
            else:
                accuracy = correct / seen
                reached = config.stop_on == "epoch" and accuracy <= config.stop_accuracy
                schedule.step()
    return Unlearned(model.eval(), epoch, steps, accuracy, reached)
