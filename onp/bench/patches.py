"""How far recovered triggers are the true ones."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from baselines_rnp.patch_recovery import success
from onp.attacks.triggers import Trigger
from onp.data import DefenceData
from onp.trigger_recovery import Patch

FIGURES = ("IoU", "cosine", "success", "pixels")


def measure_patch(
    model: nn.Module, test: DefenceData, patch: Patch, suspect: int | None, trigger: Trigger
) -> dict[str, float | None]:
    """The `FIGURES`: overlap, cosine of the changes, success of it doubled, mask's size."""
    device = next(model.parameters()).device
    moved = DefenceData(test.images.to(device), test.labels.to(device), test.num_classes, test.normalise)
    return {
        "IoU": overlap(trigger, patch),
        "cosine": cosine(trigger, patch, test),
        "success": success(model, moved, patch, suspect),
        "pixels": float(patch.mask.sum()),
    }


def overlap(trigger: Trigger, patch: Patch) -> float | None:
    """Intersection over union of the true mask and the recovered one, where it is above half of its largest value.

    None where the trigger is no patch: over the whole image there is no place to find.
    """
    true = trigger.mask.flatten(0, -3).amax(0) > 0
    if trigger.mode == "warp" or bool(true.all()):
        return None
    recovered = patch.mask[0].cpu()
    found = recovered > recovered.max() / 2
    return float((found & true).sum() / (found | true).sum())


def cosine(trigger: Trigger, patch: Patch, test: DefenceData) -> float:
    """Mean over images of the cosine between what the true and the recovered trigger add to the pixels.

    It means something for triggers over the whole image and faint ones too; 0 for a recovered mask of 0.
    """
    images = test.images
    moved = Patch(patch.mask.cpu(), patch.pattern.cpu())
    true, found = ((change(images) - images).flatten(1) for change in (trigger, moved))
    return float(F.cosine_similarity(true, found).mean())
