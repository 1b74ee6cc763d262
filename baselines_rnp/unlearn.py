"""RNP's first step: unlearn the network on clean data, which lays the backdoor bare (section 3.2, equation 2)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from onp.config import UnlearnConfig
from onp.data import DefenceData, random_crop_and_flip
from onp.seeding import seeded


@dataclass(frozen=True, eq=False)
class Unlearned:
    """The unlearned copy and how its unlearning ended."""

    model: nn.Module
    epochs: int
    accuracy: float
    """running train-mode accuracy over the last epoch or batch"""
    reached: bool
    """whether the accuracy fell to the configured stop before the epochs ran out"""


def unlearn(model: nn.Module, data: DefenceData, config: UnlearnConfig, seed: int) -> Unlearned:
    """Maximise the cross-entropy of a copy of `model` on clean data until its accuracy falls to chance.

    SGD over all parameters in train mode, on batches with random crop and flip. The stop looks at the running
    accuracy of the epoch (RNP's way) or of each batch (`config.stop_on`).
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    accuracy, reached, epoch = 1.0, False, 0
    with seeded(seed):
        while epoch < config.max_epochs and not reached:
            epoch += 1
            correct = seen = 0
            for indices in torch.randperm(len(data), generator=generator).split(config.batch_size):
                batch = data.subset(indices.to(data.images.device))
                images = random_crop_and_flip(batch.images, int(torch.randint(2**31, (1,), generator=generator)))
                logits = model(data.normalise(images))
                optimizer.zero_grad()
                (-F.cross_entropy(logits, batch.labels)).backward()
                optimizer.step()
                hits = int((logits.argmax(1) == batch.labels).sum())
                correct, seen = correct + hits, seen + len(batch)
                if config.stop_on == "batch" and hits / len(batch) <= config.stop_accuracy:
                    accuracy, reached = hits / len(batch), True
                    break
            else:
                accuracy = correct / seen
                reached = config.stop_on == "epoch" and accuracy <= config.stop_accuracy
                schedule.step()
    return Unlearned(model.eval(), epoch, accuracy, reached)
