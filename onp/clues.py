"""What clean images tell about a network: an unlearned copy, and the triggers that it may hide."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from baselines_rnp.calibration import conclusive
from baselines_rnp.unlearn import unlearn
from onp.checkpoints import plain_weights
from onp.checks import check_network
from onp.config import DetectionConfig
from onp.data import DefenceData
from onp.journal import Journal
from onp.smallest import SmallestTrigger, lead
from onp.trigger_recovery import RecoveredTrigger, recover_trigger
from onp.untargeted_recovery import UntargetedTrigger, recover_untargeted_trigger
from onp.warp_recovery import RecoveredWarp, recover_warp
from onp.wave_recovery import RecoveredWave, recover_wave

Recovered = RecoveredTrigger | UntargetedTrigger | RecoveredWarp | RecoveredWave
"""a trigger recovered from clean images"""
Family = Literal["mask", "warp", "wave", "all-to-all"]
TELLING = 0.25
"""trust from which a mask or a warp tells of the class of the loudest wave"""

logger = logging.getLogger(__name__)


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
    wave: RecoveredWave | None = None
    """the smallest wave that leads to a class, in the unlearned copy too"""

    @property
    def triggers(self) -> dict[Family, Recovered]:
        """By family, the smallest trigger; those alone that were looked for."""
        found: dict[Family, Recovered | None] = {"mask": self.mask, "warp": self.warp, "wave": self.wave}
        found["all-to-all"] = self.untargeted
        return {family: trigger for family, trigger in found.items() if trigger is not None}

    @property
    def leads(self) -> dict[Family, float]:
        """By family, how many times as large as its smallest trigger the rival's is.

        The rival of the untargeted mask is the smallest mask of a class.
        """
        leads = {family: found.lead for family, found in self.triggers.items() if isinstance(found, SmallestTrigger)}
        if self.untargeted is not None:
            leads["all-to-all"] = lead(self.untargeted.size, min(self.mask.sizes), *self.mask.limits)
        return leads

    @property
    def outliers(self) -> dict[Family, float]:
        """By family, the log of the lead."""
        return {family: math.log(lead) for family, lead in self.leads.items()}

    @property
    def credits(self) -> dict[Family, float]:
        """By family, how far an outlier counts, in [0, 1]: a warp as far as the unlearned copy follows it too.

        Clean networks too have a class that a far smaller warp leads to. But the copy has unlearned what images look
        like, and seldom goes there, unless it is the very class that it collapses to. The untargeted mask counts as far
        as it sends every class to one of its own.
        """
        credits: dict[Family, float] = {"mask": 1.0, "wave": 1.0}
        if self.warp is not None:
            credits["warp"] = self.warp.agreement
        if self.untargeted is not None:
            credits["all-to-all"] = self.untargeted.spread
        return credits

    @property
    def strengths(self) -> dict[Family, float]:
        """By family, the outlier as far as it counts."""
        return {family: outlier * self.credits[family] for family, outlier in self.outliers.items()}

    @property
    def family(self) -> Family:
        """The family that speaks loudest: the verdict goes by its trigger."""
        strengths = self.strengths
        return max(strengths, key=lambda family: strengths[family])

    @property
    def trigger(self) -> Recovered:
        """The smallest trigger of that family."""
        return self.triggers[self.family]

    @property
    def guide(self) -> Recovered:
        """What the reward goes by: that trigger, but for a wave the mask or the warp that tells of the same class.

        They show more of what carries the backdoor than a few frequencies do.
        """
        trigger = self.trigger
        if isinstance(trigger, RecoveredWave):
            if self.mask.target == trigger.target and self._trust("mask") >= TELLING:
                return self.mask
            if self.warp is not None and self.warp.target == trigger.target and self._trust("warp") >= TELLING:
                return self.warp
        return trigger

    @property
    def trust(self) -> float:
        """How far the reward trusts its guide: as far as the family that speaks loudest stands out."""
        return self._trust(self.family)

    def _trust(self, family: Family) -> float:
        """Not where the rival is as small, in full from twice the size on, and no further than the family counts."""
        return min(self.leads[family] - 1, 1.0) * self.credits[family]


def find_clues(
    model: nn.Module,
    data: DefenceData,
    config: DetectionConfig,
    seed: int,
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Clues:
    """Make from clean data what verdict and reward go by: the unlearned copy and the recovered triggers.

    Where the masks of classes are conclusive, nothing else is looked for: it could not be trusted more. `progress` is
    called with what comes next. Of a class that makes up more than half of the images a part is left out. Raises what
    `onp.checks.check_network` does.
    """
    model = copy.deepcopy(model).eval()
    every, journal = check_network(model, data), journal or Journal()
    if len(data := every.without_majority()) < len(every):
        logger.warning("one class has most of the %d images; clues are made from %d", len(every), len(data))
    progress("unlearning a copy")
    unlearned = copy.deepcopy(model)
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
    progress("recovering waves")
    wave = journal.recall("wave", lambda: recover_wave(model, unlearned, data, config.wave, seed).tensors())
    return Clues(
        unlearned,
        trigger,
        UntargetedTrigger.of_tensors(untargeted, device),
        RecoveredWarp.of_tensors(warp, device),
        RecoveredWave.of_tensors(wave, device),
    )
