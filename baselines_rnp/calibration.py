"""How far a recovered trigger stands out from its rivals, and how probable that makes a backdoor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources

from onp.trigger_recovery import RecoveredTrigger


@dataclass(frozen=True)
class Calibration:
    """A logistic regression on the strength of the evidence."""

    weight: float
    intercept: float

    @classmethod
    def of_package(cls) -> Calibration:
        """The one that comes with the package; `calibration.json` says how it was made."""
        record = json.loads(resources.files("baselines_rnp").joinpath("calibration.json").read_text())
        return cls(record["weight"], record["intercept"])

    def __call__(self, strength: float) -> float:
        """Probability of a backdoor, if half of all networks had one, for `Evidence.strength`."""
        return 1 / (1 + math.exp(-self.intercept - self.weight * strength))


def runner_up(sizes: tuple[float, ...]) -> float:
    """The smallest size but one."""
    return sorted(sizes)[1]


def lead(size: float, rival: float, least: float, most: float) -> float:
    """How many times as large as `size` the rival's is, at least 1; both count as within `least` and `most`."""
    first, second = (min(max(value, least), most) for value in (size, rival))
    return max(second / first, 1.0)


def limits(mask: RecoveredTrigger) -> tuple[float, float]:
    """The least and the largest size that a mask counts as, in pixels.

    It can cover the whole image; where less than a pixel leads to a class, images are sent there without it.
    """
    return 1.0, float(mask.masks[0].numel())


def mask_lead(mask: RecoveredTrigger) -> float:
    """How many times as large as the smallest mask of a class that of any other is."""
    return lead(min(mask.sizes), runner_up(mask.sizes), *limits(mask))


def conclusive(mask: RecoveredTrigger, probability: float) -> bool:
    """Whether the masks of classes alone speak for a backdoor with so much probability."""
    return Calibration.of_package()(math.log(mask_lead(mask))) >= probability
