"""Stages behind the methods of a finished run: networks that learn on from the clean images, with rows of their own.

A stage takes a network and a mask to a network, and knows what the methods know: clean images alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from baselines_rnp.removal import RemovalConfig, remove_backdoor
from baselines_rnp.unlearn import unlearn
from onp.finetuning import FinetuneConfig, finetune
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
    start = time.perf_counter()
    index, data, seed = purification.index, purification.data, purification.config.seed
    base = folder.load(next(rows[row] for rows in STAGES.values() if row in rows), index)
    if base.mask is None or base.note == NO_EVIDENCE:
        return MethodResult(row, None, note=base.note)
    mask = base.mask
    if row == "rnp_removal":
        values, removal = folder.rnp_values(), RemovalConfig()
        assert values is not None
        unlearned = unlearn(purification.model, data, purification.config.rnp.unlearn, seed).model
        network, mask = remove_backdoor(unlearned, index, values, data, removal, seed)
        note = f"{removal.epochs} epochs, from the unlearned copy"
    else:
        network = finetune(purification.model, mask, data, FinetuneConfig(), seed)
        note = f"{FinetuneConfig.epochs} epochs"
    seconds = base.seconds + time.perf_counter() - start
    if not mask.units_pruned:
        note += "; nothing was pruned before"
    return replace(base, method=row, mask=mask, network=network, seconds=seconds, note=note, curve=None)
