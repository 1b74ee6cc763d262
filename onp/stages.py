"""Stages behind the methods of a finished run: networks that learn on from the clean images, with rows of their own.

A stage takes a network and a mask to a network, and knows what the methods know: clean images alone.
"""

from __future__ import annotations

import time
from typing import Literal

from torch import nn

from baselines_rnp.removal import RemovalConfig, remove_backdoor
from baselines_rnp.unlearn import unlearn
from onp.errors import ModelError
from onp.finetuning import FinetuneConfig, finetune
from onp.masks import KeepMask
from onp.purification import NO_EVIDENCE, MethodResult, Purification
from onp.run_folder import RunFolder

StageName = Literal["finetune", "removal"]
STAGES: dict[StageName, dict[str, str]] = {
    "finetune": {"onp_finetuned": "onp", "rnp_finetuned": "rnp"},
    "removal": {"rnp_removal": "rnp"},
}
"""by stage, its rows, each with the method that it begins from"""


def rows_of(stages: tuple[StageName, ...]) -> list[str]:
    """The rows that `stages` add, in the order of the table."""
    return [row for stage, rows in STAGES.items() if stage in stages for row in rows]


def run_stage(row: str, purification: Purification, folder: RunFolder) -> MethodResult:
    """Make the network of a stage's row from what the finished run in `folder` found.

    Where the method that it begins from gave no mask, or left the network alone, so does the stage.
    """
    base = folder.load(next(rows[row] for rows in STAGES.values() if row in rows), purification.index)
    if base.mask is None or base.note == NO_EVIDENCE:
        return MethodResult(row, None, note=base.note)
    start = time.perf_counter()
    try:
        network, mask, note = (
            _remove(purification, folder) if row == "rnp_removal" else _finetune(purification, base.mask)
        )
    except ModelError as error:
        return MethodResult(row, None, note=str(error))
    seconds = base.seconds + time.perf_counter() - start
    return MethodResult(row, mask, base.reward_evaluations, seconds, note, network=network)


def _finetune(purification: Purification, mask: KeepMask) -> tuple[nn.Module, KeepMask, str]:
    config = FinetuneConfig()
    network = finetune(purification.model, mask, purification.data, config, purification.config.seed)
    note = f"{config.epochs} epochs at the most" + ("" if mask.units_pruned else "; nothing was pruned before")
    return network, mask, note


def _remove(purification: Purification, folder: RunFolder) -> tuple[nn.Module, KeepMask, str]:
    config, data, seed = RemovalConfig(), purification.data, purification.config.seed
    values = folder.rnp_values()
    assert values is not None  # RNP gave a mask
    unlearned = unlearn(purification.model, data, purification.config.rnp.unlearn, seed).model
    network, mask = remove_backdoor(unlearned, purification.index, values, data, config, seed)
    return network, mask, f"{config.epochs} epochs, from the unlearned copy"
