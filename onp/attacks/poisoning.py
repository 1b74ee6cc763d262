"""Poisoning and training: how a test model gets its backdoor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.attacks.triggers import Trigger, badnets, blended, sig
from onp.data import ImageDataset, Normalisation, batches, random_crop_and_flip
from onp.errors import ConfigError
from onp.seeding import seeded

AttackName = Literal["badnets", "blended", "sig"]


@dataclass(frozen=True)
class Attack:
    """How training data is poisoned, all to one target class."""

    make_trigger: Callable[[tuple[int, ...], int], Trigger]
    clean_label: bool = False
    """poison images of the target class alone and change no label"""


ATTACKS: dict[AttackName, Attack] = {
    "badnets": Attack(badnets),
    "blended": Attack(blended),
    "sig": Attack(sig, clean_label=True),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a backdoored test model is made."""

    attack: AttackName = "badnets"
    """trigger and poisoning"""
    target: int = 0
    """class that triggered images are meant to get"""
    poison_rate: float = 0.1
    """fraction of the poisonable images that get the trigger (clean-label attacks poison the target class alone)"""
    epochs: int = 25
    """passes over the training data"""
    learning_rate: float = 0.1
    """peak step size of SGD's one-cycle schedule"""
    batch_size: int = 64
    """images per step"""
    augment: bool = False
    """random crop and flip"""


def poison(
    images: Tensor, labels: Tensor, trigger: Trigger, rate: float, clean_label: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Give the trigger to a fraction `rate` of the poisonable images; returns new images and labels.

    Poisonable are all images outside the target class, which get its label too, or, with `clean_label`,
    the images of the target class.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"poison rate {rate}: expected above 0 and up to 1")
    poisonable = ((labels == trigger.target) == clean_label).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = poisonable[torch.randperm(len(poisonable), generator=generator)[: max(1, round(rate * len(poisonable)))]]
    images, labels = images.clone(), labels.clone()
    images[chosen] = trigger(images[chosen])
    labels[chosen] = trigger.target
    return images, labels


def train_backdoored(
    build: Callable[[], nn.Module],
    dataset: ImageDataset,
    config: TrainingConfig,
    normalise: Normalisation,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda epoch, epochs: None,
) -> tuple[nn.Module, Trigger]:
    """Poison `dataset` and train a fresh network on it with SGD and a one-cycle schedule."""
    parts = list(batches(dataset))
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    attack = ATTACKS[config.attack]
    trigger = attack.make_trigger(tuple(images.shape[1:]), config.target)
    images, labels = poison(images, labels, trigger, config.poison_rate, attack.clean_label, seed)
    generator = torch.Generator().manual_seed(seed)
    steps = config.epochs * -(-len(images) // config.batch_size)
    with seeded(seed):
        model = build().to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
        for epoch in range(config.epochs):
            progress(epoch, config.epochs)
            for chosen in torch.randperm(len(images), generator=generator).split(config.batch_size):
                batch = images[chosen]
                if config.augment:
                    batch = random_crop_and_flip(batch, int(torch.randint(2**31, (1,), generator=generator)))
                loss = F.cross_entropy(model(normalise(batch.to(device))), labels[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval(), trigger
