"""Recover the trigger of a backdoor that has no single target, from clean images.

An all-to-all attack sends every class to another one, so no class has a small mask. But the smallest mask with a
pattern that makes images leave whatever class the network gives them is then far smaller than any targeted one, and
moves every class to one of its own. In a clean network a mask that all images leave their class for is as large as a
targeted one, and sends them to few classes.

Where there are many classes, the search for it seldom gets there. The usual all-to-all attack, which sends every class
to the next one (Gu et al. 2017), is therefore searched for by itself, and found from any start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.logits import logits_of
from onp.smallest import towards
from onp.trigger_recovery import MaskSearch, Patch


@dataclass(frozen=True, eq=False)
class UntargetedTrigger(Patch):
    """The smallest mask with a pattern that makes clean images leave the class that the network gives them."""

    size: float
    """sum of the mask, in pixels; infinite where none worked"""
    moves: Tensor
    """(classes, classes), clean images by the class that the network gives them without and with the trigger"""

    def goals(self, labels: Tensor) -> Tensor:
        """The classes that it leads images of classes `labels` to, (n,): where most of each class go, or their own."""
        most, goals = self._moved.max(1)
        own = torch.arange(len(goals))
        return torch.where(most > 0, goals, own).to(labels.device)[labels]

    @property
    def _moved(self) -> Tensor:
        return self.moves.double() * (1 - torch.eye(len(self.moves), dtype=torch.float64))

    @property
    def spread(self) -> float:
        """How far each class goes to one of its own, in [0, 1]: 1 for a permutation, 0 where all go to the same.

        Mutual information of the classes that images leave and those they go to, over the log of the number of classes;
        so a permutation comes short of 1 where classes have no images, or few of all.
        """
        moved = self._moved
        joint = moved / moved.sum().clamp(min=1)
        apart = joint.sum(1, keepdim=True) * joint.sum(0)
        information = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)
        return float(information.sum()) / math.log(len(moved))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, for keeping."""
        size = torch.tensor(self.size, dtype=torch.float64)
        return {"mask": self.mask.cpu(), "pattern": self.pattern.cpu(), "size": size, "moves": self.moves.cpu()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> UntargetedTrigger:
        """The inverse of `tensors`."""
        mask, pattern = tensors["mask"].to(device), tensors["pattern"].to(device)
        return cls(mask, pattern, float(tensors["size"]), tensors["moves"])


def recover_untargeted_trigger(
    model: nn.Module,
    data: DefenceData,
    config: TriggerRecoveryConfig,
    seed: int,
) -> UntargetedTrigger:
    """Optimise masks and patterns from several random starts side by side, and the smallest twice for as long again.

    From one start alone the search often ends at a trigger of one class, which nearly all images leave theirs for. One
    more search leads every class to the next; the smallest mask of all is the result.
    """
    logits = logits_of(model.eval(), data.inputs)
    given, classes = logits.argmax(1), logits.shape[1]  # the network may know more classes than the images have

    def away(logits: Tensor, _: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the log of the probability of all classes but the given one."""
        others = logits.scatter(1, given[numbers, None], -torch.inf)
        return logits.logsumexp(1) - others.logsumexp(1), logits.argmax(1) != given[numbers]

    def onwards(logits: Tensor, _: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the class behind the given one."""
        return towards(logits, (given[numbers] + 1) % classes)

    with frozen(model):
        anywhere, starts = torch.zeros(config.starts, dtype=torch.long), torch.arange(config.starts)
        search = MaskSearch(model, data, config, seed, anywhere, away)
        search.optimise(starts)
        finalists = search.promising(starts, config.finalists)
        usual = MaskSearch(model, data, config, seed, anywhere[:1], onwards)
        for _ in range(2):
            search.optimise(finalists)
        for _ in range(3):
            usual.optimise(torch.zeros(1, dtype=torch.long))
    found = search if search.sizes.min() <= usual.sizes.min() else usual
    best = int(found.sizes.argmin())
    patch = Patch(found.masks[best], found.patterns[best])
    after = logits_of(model, data.normalise(patch(data.images))).argmax(1)
    moves = (given * classes + after).bincount(minlength=classes**2).view(classes, classes).cpu()
    return UntargetedTrigger(patch.mask, patch.pattern, float(found.sizes[best]), moves)
