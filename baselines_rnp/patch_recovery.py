"""Trigger recovery: what the trigger looks like, from the network and through its unlearned copy.

RNP (arXiv 2305.14876, section 4): the copy has forgotten what leads to benign classes and keeps the backdoor, so that a
mask and a pattern recovered through it have less to lean on but the trigger. Neural Cleanse, which recovers them from
the network itself, is the comparison.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from baselines_rnp.label_detection import Evidence
from onp.config import TriggerRecoveryConfig
from onp.data import DefenceData
from onp.logits import logits_of
from onp.trigger_recovery import Patch, recover_patch

Source = Literal["network", "unlearned"]


def recover_patches(
    model: nn.Module, data: DefenceData, evidence: Evidence, config: TriggerRecoveryConfig, seed: int
) -> dict[Source, Patch]:
    """The smallest mask and pattern of the suspect class, by what they were recovered through.

    Where there is no single class, the untargeted trigger of the network alone: what the copy gives without a trigger
    means nothing.
    """
    target = evidence.suspect
    if target is None:
        assert evidence.untargeted is not None
        return {"network": evidence.untargeted}
    data = data.without_majority()  # as the clues
    known = evidence.mask.patch if target == evidence.mask.target else recover_patch(model, data, target, config, seed)
    images = _not_yet(evidence.unlearned, data, target)
    return {"network": known, "unlearned": recover_patch(evidence.unlearned, images, target, config, seed)}


def _not_yet(unlearned: nn.Module, data: DefenceData, target: int) -> DefenceData:
    """The images that the copy does not send to `target` without any trigger; all, where it sends all there."""
    rest = (logits_of(unlearned, data.inputs).argmax(1) != target).nonzero().flatten()
    if not len(rest):
        return data
    return replace(data, images=data.images[rest], labels=data.labels[rest])


def success(model: nn.Module, data: DefenceData, patch: Patch, target: int | None) -> float:
    """Fraction of the images of other classes that `model` sends to `target` with the patch, its mask doubled.

    Without a target, of all images that leave the class which they have without it.
    """
    shown = data.images if target is None else data.images[data.labels != target]
    if not len(shown):
        return 0.0
    said = logits_of(model, data.normalise(patch(shown))).argmax(1)
    fooled = said == target if target is not None else said != logits_of(model, data.normalise(shown)).argmax(1)
    return float(fooled.float().mean())
