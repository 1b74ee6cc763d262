"""Which units carry a recovered trigger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.data import DefenceData
from onp.engine import Engine
from onp.logits import logits_of
from onp.masks import KeepMask
from onp.units import UnitIndex


def suspicious_units(
    model: nn.Module,
    index: UnitIndex,
    data: DefenceData,
    trigger: Callable[[Tensor], Tensor],
    target: int | None,
    most: int = 12,
    images: int = 100,
) -> list[int]:
    """Up to `most` units whose pruning lowers the log-odds of `target` on triggered clean images, the strongest first.

    Without a target, the log-odds of any class but the one that an image has without the trigger. Estimated to first
    order, on `images` images of other classes (of the target where there are no others).
    """
    others = data.images[data.labels != target] if target is not None else data.images
    shown = (others if len(others) else data.images)[:images]
    classes = torch.arange(data.num_classes, device=shown.device)
    given = logits_of(model.eval(), data.normalise(shown)).argmax(1, keepdim=True)
    goal = classes == target if target is not None else classes != given

    def log_odds(logits: Tensor) -> Tensor:
        inside, outside = (logits.masked_fill(place, -torch.inf).logsumexp(1) for place in (~goal, goal))
        return (inside - outside).sum()

    engine = Engine(model, index, data.normalise(trigger(shown)))
    effects = engine.effects(KeepMask.all_kept(index), log_odds).sum(0)
    ranked = effects.argsort(stable=True)[:most]
    return ranked[effects[ranked] < 0].tolist()
