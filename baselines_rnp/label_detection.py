"""Backdoor label detection: which class a network can be sent to far more easily than to any other, if any.

RNP (arXiv 2305.14876, section 4) reads the class off the unlearned copy, which collapses to it. Alone that is no
evidence, since the unlearned copy of a clean network collapses to a class too; so triggers of three families, masks
with patterns, warps and waves, are recovered for every class, and a mask that sends every class to one of its own, as
an all-to-all attack does. The confidence is calibrated on networks of known truth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from baselines_rnp.calibration import Calibration
from onp.checks import check_network
from onp.clues import Clues, find_clues
from onp.config import DetectionConfig
from onp.data import DefenceData
from onp.errors import ModelError
from onp.layout import fastest_layout
from onp.logits import logits_of
from onp.untargeted_recovery import UntargetedTrigger

LEAST_CONFIDENCE = 0.5
"""confidence from which the verdict is that there is evidence"""
LEAST_SKILL = 0.2
"""accuracy from which a network can be judged: 0 is that of always giving the most frequent class, 1 is 100 %"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence(Clues):
    """What clean images tell about a backdoor."""

    collapse: tuple[float, ...]
    """per class, the fraction of clean images that the unlearned copy sends to it"""
    clean_accuracy: float
    """fraction of the clean images that the network classifies as labelled"""

    @property
    def masks_alone(self) -> bool:
        """Whether masks were conclusive, and triggers of no other family were looked for."""
        return set(self.triggers) == {"mask"}

    @property
    def strength(self) -> float:
        """The largest strength."""
        return max(self.strengths.values())

    @property
    def suspect(self) -> int | None:
        """The class that `trigger` leads to; None where there is no single one."""
        trigger = self.trigger
        return None if isinstance(trigger, UntargetedTrigger) else trigger.target

    @cached_property
    def confidence(self) -> float:
        """Probability of a backdoor, if half of all networks had one."""
        return Calibration.of_package()(self.strength)

    @property
    def found(self) -> bool:
        """The verdict: whether there is evidence of a backdoor."""
        return self.confidence >= LEAST_CONFIDENCE


def find_evidence(
    model: nn.Module,
    data: DefenceData,
    config: DetectionConfig,
    seed: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> Evidence:
    """Unlearn a copy and recover triggers of every class, from clean images alone; `model` stays as it is.

    Where masks are conclusive, as most patches are, nothing else is looked for. `progress` is called with what comes
    next. Raises `ModelError` where unlearning diverges, and as `check_network` and `check_skill`.
    """
    model = copy.deepcopy(model).eval().to(memory_format=fastest_layout(model, data.input_shape))
    data = check_network(model, data)
    check_skill(model, data)
    return weigh(model, data, find_clues(model, data, config, seed, progress=progress))


def weigh(model: nn.Module, data: DefenceData, clues: Clues) -> Evidence:
    """The evidence in what was found about `model`."""
    return Evidence(
        clues.unlearned,
        clues.mask,
        clues.untargeted,
        clues.warp,
        clues.wave,
        collapse=collapse(clues.unlearned, data),
        clean_accuracy=clean_accuracy(model, data),
    )


def clean_accuracy(model: nn.Module, data: DefenceData) -> float:
    """Fraction of the clean images that `model` classifies as labelled."""
    return float((logits_of(model, data.inputs).argmax(1) == data.labels).float().mean())


def check_skill(model: nn.Module, data: DefenceData) -> None:
    """Raise `ModelError` where the network does hardly better than always giving the same class, or has one to show.

    That class would look like a target.
    """
    accuracy = clean_accuracy(model, data)
    same = float(data.labels.bincount().max()) / len(data)
    if same == 1:
        raise ModelError("all clean images are of one class: there is nothing to judge; give images of two or more")
    if accuracy - same < LEAST_SKILL * (1 - same):
        raise ModelError(
            f"the network classifies {accuracy:.0%} of the clean images as labelled, and one class alone has "
            f"{same:.0%} of them: there is nothing to judge; check --checkpoint, --mean, --std and the "
            "order of the classes"
        )


def collapse(unlearned: nn.Module, data: DefenceData) -> tuple[float, ...]:
    """Per class, the fraction of the clean images that `unlearned` sends to it."""
    predicted = logits_of(unlearned, data.inputs).argmax(1)
    return tuple((predicted.bincount(minlength=data.num_classes) / len(data)).tolist())
