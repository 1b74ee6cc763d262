"""What clean images tell about a network: an unlearned copy, and the triggers that it may hide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from baselines_rnp.calibration import conclusive
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

    @cached_property
    def trusted(self) -> tuple[Recovered, float]:
        """The trigger that can be trusted most, which the reward goes by, and the trust in it, in [0, 1]."""
        trusts: list[tuple[Recovered, float]] = [(self.mask, self.mask.trust)]
        if self.untargeted is not None:
            trusts.append((self.untargeted, self.untargeted.trust(self.mask.sizes)))
        if self.warp is not None:
            trusts.append((self.warp, self.warp.trust))
        return max(trusts, key=lambda pair: pair[1])


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
