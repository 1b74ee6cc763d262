"""`python -m onp.evaluate RUN`: measure every mask of a finished run again, from its files."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from onp.checkpoints import load_checkpoint, sha256
from onp.commands import console, run_command
from onp.errors import ConfigError
from onp.inputs import InputConfig, open_inputs
from onp.masks import KeepMask, apply_mask
from onp.report import Judge, Row, make_rows, make_stage_rows, make_table, read_report
from onp.run_folder import RunFolder, patient, trigger_path
from onp.stages import STAGES, rows_of
from onp.units import UnitIndex, index_units


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `python -m onp.evaluate`."""

    run: Annotated[Path, tyro.conf.Positional]
    """run folder of a finished `python -m onp.train`"""
    checkpoint: Path | None = None
    """where the purified network's original lies now; where the run found it, by default"""
    data: str | None = None
    """likewise the images"""
    trigger: Path | None = None
    """likewise the trigger"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; that of the run by default"""


def evaluate(config: EvaluateConfig) -> int:
    """Recompute every figure of a run from its files; exit code 1 where one differs from the report."""
    folder = RunFolder(config.run)
    elsewhere = {name: value for name, value in vars(config).items() if name != "run" and value is not None}
    options = {**folder.options(), **{name: str(value) for name, value in elsewhere.items()}}
    if not folder.file("report.json").exists():
        raise ConfigError(f"{config.run} holds no report.json: the run is not finished; run its command again")
    report, reported = read_report(folder)
    inputs = open_inputs(patient(InputConfig.from_record(options), folder))
    if inputs.config.checkpoint is not None and sha256(inputs.config.checkpoint) != report["checkpoint_sha256"]:
        raise ConfigError(f"{inputs.config.checkpoint} is not the file that this run purified; restore it")
    index = index_units(inputs.model, inputs.image_shape)
    judge, stages = Judge(inputs, trigger_path(options, folder)), rows_of(tuple(STAGES))
    rows = make_rows(folder, judge, index)
    added = [row.method for row in reported if row.method in stages]
    rows += make_stage_rows(folder, added, judge, index, rows[0])
    console.print(make_table(rows, f"{config.run} measured again"))
    if not _delivered(folder, inputs.model, index):
        console.print("purified.safetensors is not the network that masks/onp.json makes")
        return 1
    if revived := [row for row in added if not _still_pruned(folder, row, inputs.model, index)]:
        console.print(f"Not zero where masks prune: {', '.join(f'stages/{row}.safetensors' for row in revived)}")
        return 1
    before = {row.method: row for row in reported}
    differing = [row.method for row in rows if row.method not in before or not _same(row, before[row.method])]
    if differing:
        console.print(
            f"Differs from report.json: {', '.join(differing)} (on another processor or device by an image or two, "
            "whose logits it rounds otherwise)",
            soft_wrap=True,
        )
        return 1
    console.print("Every figure agrees with report.json.")
    return 0


def _delivered(folder: RunFolder, model: nn.Module, index: UnitIndex) -> bool:
    """Whether `purified.safetensors` is `model` under ONP's mask, bit for bit."""
    purified = copy.deepcopy(model)
    load_checkpoint(purified, folder.file("purified.safetensors"))
    return _equal(purified, model, folder.load_mask("onp", index))


def _still_pruned(folder: RunFolder, stage: str, model: nn.Module, index: UnitIndex) -> bool:
    """Whether the stage's network is the same once more masked, bit for bit."""
    if (mask := folder.load_mask(stage, index)) is None:
        return True
    network = copy.deepcopy(model)
    load_checkpoint(network, folder.weights(stage))
    return _equal(network, network, mask)


def _equal(network: nn.Module, model: nn.Module, mask: KeepMask | None) -> bool:
    """Whether `network` is `model` under `mask`, bit for bit."""
    expected = copy.deepcopy(model)
    if mask is not None:
        apply_mask(expected, mask)
    weights = expected.state_dict()
    return all(bool(torch.equal(value, weights[name])) for name, value in network.state_dict().items())


def _same(new: Row, old: Row) -> bool:
    """Whether two rows are equal, fractions up to what writing them has rounded."""
    for name, value in asdict(new).items():
        other = getattr(old, name)
        if isinstance(value, float) and isinstance(other, float):
            if abs(value - other) > 1e-9:
                return False
        elif value != other:
            return False
    return True


if __name__ == "__main__":
    run_command(EvaluateConfig, evaluate, "onp.evaluate")
