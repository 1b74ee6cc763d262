"""Judging: what a mask does to test accuracy and, where a trigger is known, to the backdoor.

This module sees test data and triggers; the defending path never imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from onp.data import Normalisation
from onp.datasets import ImageDataset, batches

ApplyTrigger = Callable[[Tensor], Tensor]
Target = int | Literal["all-to-all"]
"""what triggered images are meant to get: one class, or everyone's next one"""
ALL_TO_ALL: Literal["all-to-all"] = "all-to-all"


def meant(labels: Tensor, target: Target, num_classes: int) -> Tensor:
    """The classes that triggered images of classes `labels` are meant to get, in the shape of `labels`."""
    return (labels + 1) % num_classes if target == ALL_TO_ALL else torch.full_like(labels, target)


@dataclass(frozen=True)
class Measurement:
    """Fractions over the test images; `asr` and `ra` are None without a trigger."""

    ca: float
    """clean accuracy"""
    asr: float | None = None
    """attack success rate: triggered images that are classified as meant, of those that are of another class"""
    ra: float | None = None
    """robust accuracy: the same images, where they are still classified as their true class"""

    def der(self, before: Measurement) -> float | None:
        """Defence effectiveness rating, (max(0, ASR drop) - max(0, CA drop) + 1) / 2, as in BackdoorBench."""
        if self.asr is None or before.asr is None:
            return None
        return (max(0.0, before.asr - self.asr) - max(0.0, before.ca - self.ca) + 1) / 2


def measure(
    model: nn.Module,
    dataset: ImageDataset,
    normalise: Normalisation,
    device: torch.device,
    trigger: ApplyTrigger | None = None,
    target: Target | None = None,
) -> Measurement:
    """Measure `model` on test images, with a trigger to `target`."""
    model.eval()
    seen = correct = other = fooled = robust = 0
    with torch.no_grad():
        for images, labels in batches(dataset):
            logits = model(normalise(images.to(device)))
            predicted = logits.argmax(1).cpu()
            seen, correct = seen + len(labels), correct + int((predicted == labels).sum())
            if trigger is None or target is None:
                continue
            goals = meant(labels, target, logits.shape[1])
            chosen = goals != labels
            if bool(chosen.any()):
                predicted = model(normalise(trigger(images[chosen]).to(device))).argmax(1).cpu()
                other += int(chosen.sum())
                fooled += int((predicted == goals[chosen]).sum())
                robust += int((predicted == labels[chosen]).sum())
    return Measurement(correct / seen, fooled / other if other else None, robust / other if other else None)
