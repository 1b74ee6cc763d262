"""Backdoor removal from the unlearned copy: prune what the recovered masks name there, and teach it anew.

RNP (arXiv 2305.14876) counts backdoor removal among the uses of its unlearned copy; how it is done there is not public
in detail, so the details are ours. In the copy benign knowledge is gone and the backdoor lies bare: the masks recovered
in it say which channels carry it, and the clean images restore the rest.
"""

from __future__ import annotations

from torch import Tensor, nn

from onp.data import DefenceData
from onp.finetuning import FinetuneConfig, finetune
from onp.masks import KeepMask
from onp.units import UnitIndex

PRUNE_BELOW = 0.5
"""mask value up to which a channel is pruned"""


def removal_mask(index: UnitIndex, values: Tensor) -> KeepMask:
    """The channels that RNP's recovered mask `values`, shape (N,), leave; others are pruned by RNP's rule."""
    return KeepMask(index, (values > PRUNE_BELOW) | ~index.batch_norm_units, rule="gamma")


def remove_backdoor(
    unlearned: nn.Module, mask: KeepMask, data: DefenceData, config: FinetuneConfig, seed: int
) -> nn.Module:
    """A copy of `unlearned`, pruned by `mask` and fine-tuned on the clean images."""
    return finetune(unlearned, mask, data, config, seed)
