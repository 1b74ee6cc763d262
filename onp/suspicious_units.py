"""Which units carry a recovered trigger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.data import DefenceData
from onp.engine import Engine
from onp.masks import KeepMask
from onp.units import UnitIndex


def suspicious_units(
    model: nn.Module,
    index: UnitIndex,
    data: DefenceData,
    trigger: Callable[[Tensor], Tensor],
    target: int,
    most: int = 12,
    images: int = 100,
) -> list[int]:
    """Up to `most` units whose pruning lowers the log-odds of `target` on triggered clean images, the strongest first.

    Estimated to first order, on `images` images of other classes (of the target where there are no others).
    """
    others = data.images[data.labels != target]
    shown = (others if len(others) else data.images)[:images]

    def log_odds(logits: Tensor) -> Tensor:
        rest = torch.arange(logits.shape[1], device=logits.device) != target
        return (logits[:, target] - logits[:, rest].logsumexp(1)).sum()

    engine = Engine(model, index, data.normalise(trigger(shown)))
    effects = engine.effects(KeepMask.all_kept(index), log_odds).sum(0)
    ranked = effects.argsort(stable=True)[:most]
    return ranked[effects[ranked] < 0].tolist()
