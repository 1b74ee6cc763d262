"""RNP from end to end: unlearn, recover, prune where the mask fell (Li et al., arXiv 2305.14876, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from baselines_rnp.recover import RecoverConfig, recover, require_batch_norm
from baselines_rnp.unlearn import Unlearned, unlearn
from onp.config import UnlearnConfig, require
from onp.data import DefenceData
from onp.engine import ActivationCache, Engine
from onp.masks import KeepMask
from onp.units import UnitIndex

THRESHOLDS = tuple(step / 20 for step in range(19))
"""0, 0.05 ... 0.90: the mask values that the reference implementation sweeps"""


@dataclass(frozen=True)
class RNPConfig:
    """Both learning steps of RNP and where pruning stops."""

    def __post_init__(self) -> None:
        require(self, max_accuracy_drop=0)

    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    """the first step"""
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    """the second step"""
    max_accuracy_drop: float = 0.02
    """fraction of the defence images that pruning may lose (ours: RNP selects no threshold)"""


@dataclass(frozen=True, eq=False)
class RNPResult:
    """What RNP learned: `values` holds the recovered masks, shape (N,), float32 in [0, 1]."""

    values: Tensor
    unlearned: Unlearned


def run_rnp(model: nn.Module, index: UnitIndex, data: DefenceData, config: RNPConfig, seed: int) -> RNPResult:
    """Learn RNP's masks for `model`, which stays as it is; `choose_threshold` turns them into a keep mask.

    Raises `ModelError` where the network has no batch-norm.
    """
    require_batch_norm(index)
    unlearned = unlearn(model, data, config.unlearn, seed)
    return RNPResult(recover(unlearned.model, index, data, config.recover, seed), unlearned)


def threshold_masks(index: UnitIndex, values: Tensor) -> list[tuple[float, KeepMask]]:
    """RNP's candidates in the order of `THRESHOLDS`: gamma is zeroed where the mask value is not above the threshold.

    `values` has shape (N,); units that no batch-norm gates are kept.
    """
    return [
        (threshold, KeepMask(index, (values > threshold) | ~index.batch_norm_units, rule="gamma"))
        for threshold in THRESHOLDS
    ]


def choose_threshold(
    model: nn.Module,
    index: UnitIndex,
    values: Tensor,
    data: DefenceData,
    max_accuracy_drop: float,
    cache: ActivationCache | None = None,
) -> tuple[float | None, KeepMask]:
    """The largest threshold up to which clean accuracy falls by no more than `max_accuracy_drop`, with its mask.

    Ours, and trigger-free: accuracy on the defence data, relative to the unpruned model and as a fraction, has
    to hold at every smaller threshold too. Where it does not hold at threshold 0, no threshold serves: the
    result is None and the mask that keeps everything. `cache` holds activations (one of its own when None).
    """
    engine = Engine(model, index, data.inputs, cache)
    chosen: tuple[float | None, KeepMask] = (None, KeepMask.all_kept(index, rule="gamma"))
    correct = _correct(engine, chosen[1], data)
    for threshold, mask in threshold_masks(index, values):
        if (correct - _correct(engine, mask, data)) / len(data) > max_accuracy_drop:
            break
        chosen = (threshold, mask)
    return chosen


def _correct(engine: Engine, mask: KeepMask, data: DefenceData) -> int:
    return int((engine.logits(mask).argmax(1) == data.labels).sum())
