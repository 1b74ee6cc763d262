"""Recover the trigger that a network may hide, from clean images (Neural Cleanse, Wang et al. 2019, section 4).

For every class, the smallest mask and a pattern that send clean images to that class are optimised. A backdoor's
target class needs a far smaller mask than any other. A recovered trigger is evidence, not the trigger itself, and no
model of a warp: `trust` says how far the smallest mask stands out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """The recovered trigger of the suspect class, and the evidence against every class."""

    target: int
    """class with the smallest mask"""
    mask: Tensor
    """(1, height, width) in [0, 1]"""
    pattern: Tensor
    """(channels, height, width) in [0, 1]"""
    sizes: tuple[float, ...]
    """per class, the sum of its mask, in pixels; infinite where no mask worked"""

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to images of shape (n, channels, height, width) in [0, 1]."""
        return (1 - self.mask) * images + self.mask * self.pattern

    @property
    def trust(self) -> float:
        """How far the smallest mask stands out: 0 if the runner-up's is as small, 1 from twice its size on."""
        first, second = sorted(self.sizes)[:2]
        return min(max(second / first - 1, 0.0), 1.0) if first < float("inf") else 0.0


def recover_trigger(
    model: nn.Module,
    data: DefenceData,
    config: TriggerRecoveryConfig,
    seed: int,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> RecoveredTrigger:
    """Optimise mask and pattern of all classes side by side; the weight of a mask's size adapts to its success."""
    model.eval()
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return _optimise(model, data, config, seed, progress)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _optimise(
    model: nn.Module, data: DefenceData, config: TriggerRecoveryConfig, seed: int, progress: Callable[[int, int], None]
) -> RecoveredTrigger:
    classes, (channels, height, width) = data.num_classes, data.input_shape
    device = data.images.device
    generator = torch.Generator().manual_seed(seed)
    # Adam moves a logit by about its step size, so masks start nearly empty and grow where they help.
    mask_logits = 0.1 * torch.randn((classes, 1, height, width), generator=generator) - 3
    pattern_logits = 0.1 * torch.randn((classes, channels, height, width), generator=generator)
    mask_logits, pattern_logits = (tensor.to(device).requires_grad_() for tensor in (mask_logits, pattern_logits))
    optimizer = torch.optim.Adam([mask_logits, pattern_logits], config.learning_rate, betas=(0.5, 0.9))
    weight = torch.full((classes,), config.size_weight, device=device)
    success = torch.zeros(classes, device=device)
    best_size = torch.full((classes,), float("inf"), device=device)
    best_mask, best_pattern = mask_logits.detach().sigmoid(), pattern_logits.detach().sigmoid()
    targets = torch.arange(classes, device=device).repeat_interleave(min(config.batch_size, len(data)))
    for step in range(config.steps):
        progress(step, config.steps)
        chosen = torch.randint(len(data), (len(targets) // classes,), generator=generator).to(device)
        masks, patterns = mask_logits.sigmoid(), pattern_logits.sigmoid()
        triggered = (1 - masks)[:, None] * data.images[chosen] + (masks * patterns)[:, None]
        logits = model(data.normalise(triggered.flatten(0, 1)))
        losses = F.cross_entropy(logits, targets, reduction="none").view(classes, -1).mean(1)
        sizes = masks.sum((1, 2, 3))
        optimizer.zero_grad()
        (losses + weight * sizes).sum().backward()
        optimizer.step()
        hits = (logits.argmax(1) == targets).float().view(classes, -1).mean(1)
        success = hits if step == 0 else 0.8 * success + 0.2 * hits
        with torch.no_grad():
            better = (torch.minimum(success, hits) >= 0.95) & (sizes < best_size)
            best_size = torch.where(better, sizes, best_size)
            best_mask[better], best_pattern[better] = masks[better], patterns[better]
            if step % 5 == 4:
                weight = torch.where(success > 0.98, weight * 1.5, torch.where(success < 0.95, weight / 1.5, weight))
    target = int(best_size.argmin())
    return RecoveredTrigger(
        target, best_mask[target].detach(), best_pattern[target].detach(), tuple(best_size.tolist())
    )
