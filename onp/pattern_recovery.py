"""Recover the faint pattern that a network may hide, from clean images.

A trigger may be spread thinly over the whole image (a blended picture, an invisible perturbation). The mask that Neural
Cleanse finds in its place works like a part of it, and tells nothing of the rest. So the weakest pattern that, added to
clean images, sends them to the suspect class is optimised, and another for a class to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.smallest import Smallest


@dataclass(frozen=True, eq=False)
class FaintPattern:
    """A recovered pattern that is added to images."""

    pattern: Tensor
    """(channels, height, width), in units of images in [0, 1]"""

    def __call__(self, images: Tensor) -> Tensor:
        """Add it to images of shape (n, channels, height, width) in [0, 1], doubled as a `Patch` is."""
        return (images + 2 * self.pattern).clamp(0, 1)


def recover_faint(
    model: nn.Module, data: DefenceData, target: int, rival: int, config: TriggerRecoveryConfig, seed: int
) -> FaintPattern | None:
    """The weakest pattern that leads to class `target`; None where class `rival` needs less than twice its norm.

    Nor is a pattern faint that changes pixels by more than a twentieth of their range, in the root mean square.
    """
    with frozen(model):
        pattern, size = _shrink(model, data, target, config, seed)
        _, most = _shrink(model, data, rival, config, seed)
    return FaintPattern(pattern) if 2 * size <= min(most, 0.1 * pattern.numel() ** 0.5) else None


def _shrink(
    model: nn.Module, data: DefenceData, goal: int, config: TriggerRecoveryConfig, seed: int
) -> tuple[Tensor, float]:
    """The weakest pattern that leads to class `goal`, and its norm: infinite where none does.

    Pixels, unlike the logits of masks, are what Adam steps on: so its steps are smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    images, batch = data.images, min(config.batch_size, len(data))
    pattern = (0.01 * torch.randn(data.input_shape, generator=generator)).to(images.device).requires_grad_()
    best, goals = torch.zeros_like(images[0]), torch.full((batch,), goal, device=images.device)
    search, only = Smallest(1, weight=0.1, enough=0.95, ample=0.98, device=images.device), goals.new_zeros(1)
    optimizer = torch.optim.Adam([pattern], 0.01, betas=(0.5, 0.9))
    for step in range(config.steps):
        chosen = torch.randint(len(data), (batch,), generator=generator).to(images.device)
        triggered = (images[chosen] + pattern).clamp(0, 1)
        logits = model(data.normalise(triggered).contiguous(memory_format=torch.channels_last))
        size = pattern.norm()
        optimizer.zero_grad()
        (F.cross_entropy(logits, goals) + search.weights[0] * size).backward()
        hits = (logits.argmax(1) == goals).float().mean()
        if search.record(only, size.detach()[None], hits[None], step):
            best = pattern.detach().clone()
        optimizer.step()
    return best, float(search.sizes)
