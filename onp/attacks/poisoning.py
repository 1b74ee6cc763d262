"""Poisoning: which training images get a trigger, and how a test model gets its backdoor from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from onp.attacks.adversarial import perturb
from onp.attacks.fitting import FitConfig, fit
from onp.attacks.patterns import badnets, blended, corners, dynamic, l0, l2, sig, trojan, wanet
from onp.attacks.triggers import Trigger
from onp.data import Normalisation, random_crop_and_flip
from onp.datasets import ImageDataset, batches
from onp.errors import ConfigError
from onp.judge import ALL_TO_ALL, Target, meant
from onp.seeding import seeded

AttackName = Literal[
    "badnets", "blended", "sig", "trojan", "l0", "l2", "wanet", "dynamic", "label_consistent", "all_to_all"
]


@dataclass(frozen=True)
class Attack:
    """How training data is poisoned."""

    make_trigger: Callable[[tuple[int, ...], Target], Trigger]
    clean_label: bool = False
    """poison images of the target class alone and change no label"""
    adversarial: bool = False
    """perturb the poisoned images against a clean network first, so that the trigger is what is left to learn"""
    cross_ratio: float = 0.0
    """images that get a disturbed trigger and keep their label, for every poisoned one"""
    all_to_all: bool = False
    """the target is every class's next one"""

    def trigger(self, image_shape: tuple[int, ...], target: int) -> Trigger:
        """The trigger to its target, which is `target` unless it is all to all."""
        return self.make_trigger(image_shape, ALL_TO_ALL if self.all_to_all else target)


ATTACKS: dict[AttackName, Attack] = {
    "badnets": Attack(badnets),
    "blended": Attack(blended),
    "sig": Attack(sig, clean_label=True),
    "trojan": Attack(trojan),
    "l0": Attack(l0),
    "l2": Attack(l2),
    "wanet": Attack(wanet, cross_ratio=2.0),
    "dynamic": Attack(dynamic),
    "label_consistent": Attack(corners, clean_label=True, adversarial=True),
    "all_to_all": Attack(badnets, all_to_all=True),
}


@dataclass(frozen=True)
class TrainingConfig(FitConfig):
    """How a backdoored test model is made."""

    attack: AttackName = "badnets"
    """trigger and poisoning"""
    target: int = 0
    """class that triggered images are meant to get (all_to_all: everyone's next class)"""
    poison_rate: float = 0.1
    """fraction of the poisonable images that get the trigger (clean-label attacks poison the target class alone)"""
    augment: bool = False
    """random crop and flip"""


@dataclass(frozen=True, eq=False)
class Poisoning:
    """Which of n training images get the trigger, which a disturbed one, and the labels to train with."""

    trigger: Trigger
    poisoned: Tensor
    """(n,) bool"""
    disturbed: Tensor
    """(n,) bool; these keep their labels"""
    labels: Tensor
    """(n,) int64"""

    def of(self, chosen: Tensor) -> Poisoning:
        """The part for the images with the numbers `chosen`, shape (k,)."""
        return Poisoning(self.trigger, self.poisoned[chosen], self.disturbed[chosen], self.labels[chosen])

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A copy of the images, shape (n, channels, height, width), with their triggers."""
        images = images.clone()
        if bool(self.poisoned.any()):
            images[self.poisoned] = self.trigger(images[self.poisoned])
        if bool(self.disturbed.any()):
            images[self.disturbed] = self.trigger.disturbed(images[self.disturbed], generator)
        return images


def draw_poisoning(
    attack: Attack, trigger: Trigger, rate: float, labels: Tensor, num_classes: int, generator: torch.Generator
) -> Poisoning:
    """Draw a fraction `rate` of the poisonable images, and as many as the attack asks for to disturb from the others.

    Poisonable are all images that are not yet of the class they are meant to get, which they get as their label
    too, or, with clean labels, the images that are. `labels` has shape (n,).
    Raises `ConfigError` for an impossible rate or class.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"poison rate {rate}: expected above 0 and up to 1")
    if trigger.target != ALL_TO_ALL and not 0 <= trigger.target < num_classes:
        raise ConfigError(f"target {trigger.target}: expected a class from 0 to {num_classes - 1}")
    goals = meant(labels, trigger.target, num_classes)
    poisonable = ((goals == labels) == attack.clean_label).nonzero().flatten()
    if not len(poisonable):
        raise ConfigError(f"target {trigger.target}: no training image could be poisoned; choose another class")
    count = max(1, round(rate * len(poisonable)))
    poisoned, disturbed = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(2))
    poisoned[poisonable[torch.randperm(len(poisonable), generator=generator)[:count]]] = True
    others = (~poisoned).nonzero().flatten()
    disturbed[others[torch.randperm(len(others), generator=generator)[: round(attack.cross_ratio * count)]]] = True
    return Poisoning(trigger, poisoned, disturbed, torch.where(poisoned, goals, labels))


def train_backdoored(
    build: Callable[[], nn.Module],
    dataset: ImageDataset,
    num_classes: int,
    config: TrainingConfig,
    normalise: Normalisation,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda epoch, epochs: None,
) -> tuple[nn.Module, Trigger]:
    """Poison `dataset` and train a fresh network of `num_classes` outputs on it, with SGD and a one-cycle schedule."""
    parts = list(batches(dataset))
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    attack = ATTACKS[config.attack]
    trigger = attack.trigger(tuple(images.shape[1:]), config.target)

    def train(images: Tensor, labels: Tensor) -> nn.Module:
        def draw(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch = images[chosen]
            if config.augment:
                batch = random_crop_and_flip(batch, int(torch.randint(2**31, (1,), generator=generator)))
            return normalise(batch.to(device)), labels[chosen].to(device)

        with seeded(seed):
            return fit(build().to(device), draw, len(images), config, seed, progress).model

    generator = torch.Generator().manual_seed(seed)
    drawn = draw_poisoning(attack, trigger, config.poison_rate, labels, num_classes, generator)
    if attack.adversarial:
        twin, clean = train(images, labels), images[drawn.poisoned]
        images[drawn.poisoned] = perturb(twin, clean, labels[drawn.poisoned], normalise, device)
    return train(drawn.apply(images, generator), drawn.labels), trigger
