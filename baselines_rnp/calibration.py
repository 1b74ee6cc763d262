"""How probable a recovered trigger that stands out makes a backdoor."""

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
        record = json.loads(resources.files("baselines_rnp").joinpath("calibration.json").read_text(encoding="utf-8"))
        return cls(record["weight"], record["intercept"])

    def __call__(self, strength: float) -> float:
        """Probability of a backdoor, if half of all networks had one, for `Evidence.strength`."""
        return 1 / (1 + math.exp(-self.intercept - self.weight * strength))


def conclusive(mask: RecoveredTrigger, probability: float) -> bool:
    """Whether the masks of classes alone speak for a backdoor with so much probability."""
    return Calibration.of_package()(math.log(mask.lead)) >= probability
