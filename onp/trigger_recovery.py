"""Recover the trigger that a network may hide, from clean images (Neural Cleanse, Wang et al. 2019, section 4).

For every class, the smallest mask and a pattern that send clean images to that class are optimised. A backdoor's
target class needs a far smaller mask than any other. A recovered trigger is evidence, not the trigger itself, and no
model of a warp: how far the smallest mask stands out says how far the reward goes by it (`onp.clues.Clues.trust`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.pattern_recovery import FaintPattern, recover_faint
from onp.smallest import SmallestSearch, SmallestTrigger, towards

Goal = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""loss and success, (n,) each, of logits (n, classes), given what is searched for and the images' numbers, (n,) each"""


@dataclass(frozen=True, eq=False)
class Patch:
    """A recovered mask with a pattern."""

    mask: Tensor
    """(1, height, width) in [0, 1]"""
    pattern: Tensor
    """(channels, height, width) in [0, 1]"""

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to images of shape (n, channels, height, width) in [0, 1], with the mask doubled.

        A recovered mask is the least that works, and fails as soon as the network changes; an attacker's does not.
        """
        mask = (2 * self.mask).clamp(max=1)
        return (1 - mask) * images + mask * self.pattern


@dataclass(frozen=True, eq=False)
class RecoveredTrigger(SmallestTrigger):
    """The recovered trigger of the suspect class in one or more variants, and the evidence against every class."""

    target: int
    """class with the smallest mask"""
    masks: Tensor
    """(variants, 1, height, width) in [0, 1], the smallest first; no two variants use the same pixels"""
    patterns: Tensor
    """(variants, channels, height, width) in [0, 1]"""
    sizes: tuple[float, ...]
    """per class, the sum of its smallest mask, in pixels; infinite where no mask worked"""
    faint: FaintPattern | None = None
    """one more variant: a pattern over the whole image, where far less of it leads to the class than to another"""

    def __call__(self, images: Tensor) -> Tensor:
        """Apply the variants, evenly shared out, to images of shape (n, channels, h, w) in [0, 1], as a `Patch` is.

        Shuffled, since classes take turns among defence images, and each should meet every variant.
        """
        variants = len(self.masks) + (self.faint is not None)
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        turn = (shuffled % variants).view(-1, 1, 1, 1).to(images.device)
        place = turn.flatten().clamp(max=len(self.masks) - 1)
        masks = (2 * self.masks[place]).clamp(max=1)
        triggered = (1 - masks) * images + masks * self.patterns[place]
        return triggered if self.faint is None else torch.where(turn == variants - 1, self.faint(images), triggered)

    @property
    def patch(self) -> Patch:
        """The smallest variant."""
        return Patch(self.masks[0], self.patterns[0])

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest size that a mask counts as, in pixels.

        It can cover the whole image; where less than a pixel leads to a class, images are sent there without it.
        """
        return 1.0, float(self.masks[0].numel())

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, for keeping."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        faint = {"faint": self.faint.pattern.cpu()} if self.faint is not None else {}
        return {"masks": self.masks.cpu(), "patterns": self.patterns.cpu(), "sizes": sizes, **faint}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> RecoveredTrigger:
        """The inverse of `tensors`."""
        sizes = tensors["sizes"]
        masks, patterns = tensors["masks"].to(device), tensors["patterns"].to(device)
        faint = FaintPattern(tensors["faint"].to(device)) if "faint" in tensors else None
        return cls(int(sizes.argmin()), masks, patterns, tuple(sizes.tolist()), faint)


def recover_trigger(
    model: nn.Module,
    data: DefenceData,
    config: TriggerRecoveryConfig,
    seed: int,
) -> RecoveredTrigger:
    """Optimise mask and pattern of all classes side by side, and those of the smallest masks for as long again.

    A backdoor may answer to several parts of its trigger, and the smallest mask holds only one. So the suspect class is
    optimised again on pixels not used yet, as long as its mask stays below the runner-up's. And a trigger may be spread
    thinly over the whole image: where a pattern leads to the suspect class that is at most half as strong as the
    runner-up's, it is a variant too. Neither is looked for where `config.variants` is 1.
    """
    with frozen(model):
        search = MaskSearch(model, data, config, seed, classes := torch.arange(data.num_classes))
        search.optimise(classes)
        search.optimise(search.promising(classes, config.finalists))
        sizes = tuple(search.sizes.tolist())
        target, rival = search.sizes.argsort(stable=True)[:2].tolist()
        masks, patterns = [search.masks[target].clone()], [search.patterns[target].clone()]
        while len(masks) < config.variants and sizes[target] < float("inf"):
            search.restart(target, taken=torch.stack(masks).amax(0) > 0.1)
            search.optimise(torch.tensor([target]))
            if not search.sizes[target] < sizes[rival]:
                break
            masks.append(search.masks[target].clone())
            patterns.append(search.patterns[target].clone())
    worked = config.variants > 1 and sizes[target] < float("inf")
    faint = recover_faint(model, data, target, rival, config, seed) if worked else None
    return RecoveredTrigger(target, torch.stack(masks), torch.stack(patterns), sizes, faint)


def recover_patch(model: nn.Module, data: DefenceData, target: int, config: TriggerRecoveryConfig, seed: int) -> Patch:
    """Optimise mask and pattern of one class alone, for as long as a finalist's; a mask of 0 where none worked."""
    with frozen(model):
        search = MaskSearch(model, data, config, seed, torch.tensor([target]))
        for _ in range(2):
            search.optimise(torch.zeros(1, dtype=torch.long))
    return Patch(search.masks[0], search.patterns[0])


def towards_target(logits: Tensor, targets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """To the class that is searched for, whichever the images."""
    return towards(logits, targets)


class MaskSearch(SmallestSearch):
    """Smallest working masks so far, and where their optimisation stands. `goal` says what a mask works for."""

    def __init__(
        self,
        model: nn.Module,
        data: DefenceData,
        config: TriggerRecoveryConfig,
        seed: int,
        targets: Tensor,
        goal: Goal = towards_target,
    ) -> None:
        super().__init__((model,), data, config, seed, targets)
        self.goal = goal
        (channels, height, width), count, device = data.input_shape, len(targets), data.images.device
        self.mask_logits = torch.zeros(count, 1, height, width, device=device)
        self.pattern_logits = torch.zeros(count, channels, height, width, device=device)
        self.masks, self.patterns = self.mask_logits.sigmoid(), self.pattern_logits.sigmoid()
        self.variables, self.found = (self.mask_logits, self.pattern_logits), (self.masks, self.patterns)
        for number in range(count):
            self.restart(number)

    def restart(self, number: int, taken: Tensor | None = None) -> None:
        """Forget what is known of search `number`; from now on it keeps off the pixels `taken`, (1, height, width)."""
        self.forget(number)
        # Half of every pixel is covered at first: shrinking keeps scattered pixels that growing would not find.
        for logits in self.variables:
            logits[number] = 0.1 * torch.randn(logits[number].shape, generator=self.generator).to(logits.device)
        if taken is not None:
            self.mask_logits[number].masked_fill_(taken, -100.0)
        self.masks[number], self.patterns[number] = 0.0, 0.0

    def trigger(self, images: Tensor, *variables: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        masks, patterns = (logits.sigmoid() for logits in variables)
        triggered = (1 - masks)[:, None] * images + (masks * patterns)[:, None]
        return triggered, masks.sum((1, 2, 3)), (masks, patterns)

    def aim(self, inputs: Tensor, targets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.goal(self.networks[0](inputs), targets, numbers)
