"""What clean images tell about a network: an unlearned copy, and the triggers that it may hide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from baselines_rnp.calibration import conclusive, limits, mask_outlier, outlier, runner_up
from baselines_rnp.unlearn import unlearn
from onp.checkpoints import plain_weights
from onp.config import DetectionConfig
from onp.data import DefenceData
from onp.journal import Journal
from onp.trigger_recovery import RecoveredTrigger, recover_trigger
from onp.untargeted_recovery import UntargetedTrigger, recover_untargeted_trigger
from onp.warp_recovery import RecoveredWarp, recover_warp

Recovered = RecoveredTrigger | UntargetedTrigger | RecoveredWarp
"""a trigger recovered from clean images"""
Family = Literal["mask", "warp", "all-to-all"]


@dataclass(frozen=True, eq=False)
class Clues:
    """What is found out about a network from clean data, for the verdict and for the reward."""

    unlearned: nn.Module
    """the unlearned copy, its backdoor alive"""
    mask: RecoveredTrigger
    """the recovered trigger of the suspect class"""
    untargeted: UntargetedTrigger | None = None
    """the one that makes images leave their class, whichever it is"""
    warp: RecoveredWarp | None = None
    """the smallest warp that leads to a class"""

    @property
    def triggers(self) -> dict[Family, Recovered]:
        """By family, the smallest trigger; those alone that were looked for."""
        found: dict[Family, Recovered | None] = {"mask": self.mask, "warp": self.warp, "all-to-all": self.untargeted}
        return {family: trigger for family, trigger in found.items() if trigger is not None}

    @property
    def outliers(self) -> dict[Family, float]:
        """By family, how far its smallest trigger stands out (`outlier`): the untargeted mask from those of classes."""
        outliers: dict[Family, float] = {"mask": mask_outlier(self.mask)}
        if self.warp is not None:
            outliers["warp"] = outlier(min(self.warp.sizes), runner_up(self.warp.sizes), *self.warp.limits)
        if self.untargeted is not None:
            outliers["all-to-all"] = outlier(self.untargeted.size, min(self.mask.sizes), *limits(self.mask))
        return outliers

    @property
    def strengths(self) -> dict[Family, float]:
        """By family, the outlier; that of warps as far as the unlearned copy follows, too.

        Clean networks too have a class that a far smaller warp leads to, but the copy seldom goes there. The untargeted
        mask counts as far as it sends every class to one of its own.
        """
        strengths = self.outliers
        if self.warp is not None:
            strengths["warp"] *= self.warp.agreement
        if self.untargeted is not None:
            strengths["all-to-all"] *= self.untargeted.spread
        return strengths

    @property
    def family(self) -> Family:
        """The family that speaks loudest: verdict and reward go by its trigger."""
        strengths = self.strengths
        return max(strengths, key=lambda family: strengths[family])

    @property
    def trigger(self) -> Recovered:
        """The smallest trigger of that family."""
        return self.triggers[self.family]

    @property
    def trust(self) -> float:
        """How far the reward trusts it, in [0, 1]."""
        trigger = self.trigger
        return trigger.trust(self.mask.sizes) if isinstance(trigger, UntargetedTrigger) else trigger.trust


def find_clues(
    model: nn.Module,
    data: DefenceData,
    config: DetectionConfig,
    seed: int,
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Clues:
    """Make from clean data what verdict and reward go by: the unlearned copy and the recovered triggers.

    Where the masks of classes are conclusive, neither a warp nor a mask without a target is looked for: it could not be
    trusted more. `progress` is called with what comes next.
    """
    journal = journal or Journal()
    progress("unlearning a copy")
    unlearned = copy.deepcopy(model).eval()
    unlearned.load_state_dict(
        journal.recall("unlearned", lambda: plain_weights(unlearn(model, data, config.unlearn, seed).model))
    )
    device, recovery = data.images.device, config.recovery
    progress("recovering masks")
    mask = journal.recall("trigger", lambda: recover_trigger(model, data, recovery, seed).tensors())
    trigger = RecoveredTrigger.of_tensors(mask, device)
    if conclusive(trigger, recovery.conclusive):
        return Clues(unlearned, trigger)
    progress("all-to-all mask")
    untargeted = journal.recall("untargeted", lambda: recover_untargeted_trigger(model, data, recovery, seed).tensors())
    progress("recovering warps")
    warp = journal.recall("warp", lambda: recover_warp(model, unlearned, data, config.warp, seed).tensors())
    return Clues(
        unlearned, trigger, UntargetedTrigger.of_tensors(untargeted, device), RecoveredWarp.of_tensors(warp, device)
    )
