"""Recover the faint pattern that a network may hide, from clean images.

A trigger may be spread thinly over the whole image (a blended picture, an invisible perturbation). The mask that Neural
Cleanse finds in its place works like a part of it, and tells nothing of the rest. So the weakest pattern that, added to
clean images, sends them to the suspect class is optimised, and another for a class to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.smallest import SmallestSearch


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
        searches = [_Search(model, data, config, seed, goal) for goal in (target, rival)]
        for search in searches:
            search.optimise(torch.zeros(1, dtype=torch.long))
    pattern, (size, most) = searches[0].patterns[0], (float(search.sizes) for search in searches)
    return FaintPattern(pattern) if 2 * size <= min(most, 0.1 * pattern.numel() ** 0.5) else None


class _Search(SmallestSearch):
    """The weakest pattern so far that leads to class `goal`, and its norm."""

    def __init__(
        self, model: nn.Module, data: DefenceData, config: TriggerRecoveryConfig, seed: int, goal: int
    ) -> None:
        # Pixels, unlike the logits of masks, are what Adam steps on: so its steps are smaller.
        config = replace(config, learning_rate=0.01, size_weight=0.1)
        super().__init__((model,), data, config, seed, torch.tensor([goal]))
        first = 0.01 * torch.randn(data.input_shape, generator=self.generator)
        self.variables = (first[None].to(data.images.device),)
        self.patterns = torch.zeros_like(data.images[:1])
        self.found = (self.patterns,)

    def trigger(self, images: Tensor, *variables: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        (patterns,) = variables
        return (images + patterns[:, None]).clamp(0, 1), patterns.flatten(1).norm(dim=1), (patterns,)
