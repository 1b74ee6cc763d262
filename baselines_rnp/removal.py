"""Backdoor removal from the unlearned copy: prune what the recovered masks name there, and teach it anew.

RNP (arXiv 2305.14876) counts backdoor removal among the uses of its unlearned copy. How it is done there we could not
learn from what is public, so the details are ours: in the copy benign knowledge is gone and the backdoor lies bare; the
masks recovered in it say which channels carry it, and the clean images restore the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from onp.data import DefenceData
from onp.finetuning import FinetuneConfig, learn_on
from onp.masks import KeepMask
from onp.units import UnitIndex


@dataclass(frozen=True)
class RemovalConfig(FinetuneConfig):
    """Longer and faster than fine-tuning behind pruning, since the unlearned copy has to learn its classes again."""

    learning_rate: float = 0.01
    """step size of SGD"""
    epochs: int = 20
    """passes over the images"""
    frozen: bool = False
    """keep batch-norm statistics and leave dropout out; those of the unlearned copy are not worth keeping"""
    threshold: float = 0.0
    """recovered mask value up to which a channel is pruned"""


def remove_backdoor(
    unlearned: nn.Module, index: UnitIndex, values: Tensor, data: DefenceData, config: RemovalConfig, seed: int
) -> tuple[nn.Module, KeepMask]:
    """A copy of `unlearned` without the channels whose mask fell, fine-tuned on the clean images; and the mask.

    `values`, shape (N,), are those that RNP recovered in `unlearned`; units that no batch-norm gates are kept. Pruning
    follows RNP's rule: gamma is zeroed, and stays so, and beta learns on.
    """
    mask = KeepMask(index, (values > config.threshold) | ~index.batch_norm_units, rule="gamma")
    return learn_on(unlearned, mask, data, config, seed), mask
