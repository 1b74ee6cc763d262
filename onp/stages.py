"""Stages behind the methods of a finished run: networks that learn on from the clean images, with rows of their own.

A stage takes a network and a mask to a network, and knows what the methods know: clean images alone.
"""

from __future__ import annotations

import time
from typing import Literal

from torch import nn

from baselines_rnp.removal import RemovalConfig, remove_backdoor
from baselines_rnp.unlearn import unlearn
from envs.rewards import resistance, triggered_images
from onp.data import DefenceData
from onp.errors import ModelError
from onp.finetuning import FinetuneConfig, Worth, finetune
from onp.logits import logits_of
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
        network, mask, note = _remove(purification, folder) if row == "rnp_removal" else _finetune(purification, base)
    except ModelError as error:
        return MethodResult(row, None, note=str(error))
    seconds = base.seconds + time.perf_counter() - start
    return MethodResult(row, mask, base.reward_evaluations, seconds, note, network=network)


def _finetune(purification: Purification, base: MethodResult) -> tuple[nn.Module, KeepMask, str]:
    config, mask, seed = FinetuneConfig(), base.mask, purification.config.seed
    assert mask is not None
    worth = _worth(purification) if base.method == "onp" else None  # RNP knows no recovered trigger
    network = finetune(purification.model, mask, purification.data, config, seed, worth)
    note = f"{config.epochs} epochs at the most" + ("" if mask.units_pruned else "; nothing was pruned before")
    return network, mask, note


def _worth(purification: Purification) -> Worth:
    """ONP's reward of a network that learns on: fidelity is to the labels, and the recovered trigger may not wake."""
    clues, weights = purification.timed_clues[0], purification.config.env.reward

    def worth(network: nn.Module, data: DefenceData) -> float:
        triggered, goals = triggered_images(clues, data)
        asleep = resistance(logits_of(network, triggered), goals, clues.trust)
        loss = data.cross_entropy(logits_of(network, data.inputs))
        return float(weights.trigger_resistance * asleep - weights.clean_fidelity * loss)

    return worth


def _remove(purification: Purification, folder: RunFolder) -> tuple[nn.Module, KeepMask, str]:
    config, data, seed = RemovalConfig(), purification.data, purification.config.seed
    values = folder.rnp_values()
    assert values is not None  # RNP gave a mask
    unlearned = unlearn(purification.model, data, purification.config.rnp.unlearn, seed).model
    network, mask = remove_backdoor(unlearned, purification.index, values, data, config, seed)
    return network, mask, f"{config.epochs} epochs, from the unlearned copy"
