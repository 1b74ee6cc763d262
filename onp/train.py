"""`python -m onp.train`: purify a network that may carry a backdoor, beside the baselines, and report."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from onp.checkpoints import save_weights, sha256, write_json
from onp.commands import console, print_untraced, run_command
from onp.datasets import labels_of
from onp.errors import ConfigError
from onp.inputs import InputConfig, Inputs, open_inputs
from onp.masks import apply_mask
from onp.paths import real_path
from onp.purification import CLUES, METHODS, Purification, PurifyConfig
from onp.report import LABELS, Judge, add_stage_rows, make_rows, make_table, notes_of, read_report, write_report
from onp.run_folder import RunFolder, patient, trigger_path
from onp.stages import STAGES, StageName, rows_of, run_stage
from onp.verdict import headline, make_verdict, read_verdict

UNSPENDING = ("rnp", "rnp_oracle", *(row for rows in STAGES.values() for row, base in rows.items() if base == "rnp"))
"""rows that spend no reward evaluations, and so are the same with every budget"""


@dataclass(frozen=True)
class TrainConfig(InputConfig, PurifyConfig):
    """Options of `python -m onp.train`."""

    trigger: Path | None = None
    """trigger specification (JSON), for judging the result on test/ alone; the defence never sees it"""
    run_dir: Path | None = None
    """folder for the results; runs/MODEL-DATA-seedSEED by default. The same command on it resumes"""
    stages: tuple[StageName, ...] = ()
    """what comes behind the methods, with rows of its own: finetune (of ONP's and RNP's network on the clean images),
    removal (RNP's, from the unlearned copy). A finished run gets what it lacks"""


def train(config: TrainConfig) -> None:
    """Purify a network that may carry a backdoor. Without options: a demonstration on handwritten digits."""
    _show(complete_run(config, console))


def complete_run(
    config: TrainConfig, console: Console, journal_dir: Path | None = None, others: Sequence[RunFolder] = ()
) -> RunFolder:
    """Do what is left of a run: purify, judge, write the report, add stages. `console` shows how far it is.

    Journals of what is computed lie in `journal_dir`, which runs may share and the caller removes; or in the run folder
    until the run is done. What no budget changes is copied from `others`, where they have it.
    """
    config = replace(config.resolved(), run_dir=_run_dir(config))
    assert config.run_dir is not None
    demonstration = config.checkpoint is None
    if demonstration and config.data != "digits":
        raise ConfigError(
            "no --checkpoint: give the weights of the network to purify (or no --data, for the demonstration)"
        )
    if demonstration and config.trigger is not None:
        raise ConfigError(
            f"--trigger {config.trigger} needs --checkpoint: the demonstration makes a trigger of its own"
        )
    if all((config.run_dir / name).exists() for name in ("report.json", "purified.safetensors")):
        folder = RunFolder.create_or_resume(config.run_dir, config)
        report, _ = read_report(folder)
        checkpoint = config.checkpoint
        if checkpoint is not None and (not checkpoint.is_file() or sha256(checkpoint) != report["checkpoint_sha256"]):
            raise ConfigError(
                f"{config.checkpoint} is not the file that {folder.path} purified; restore it, or give another folder"
            )
        if not missing_stages(config):
            console.print(f"This run is complete: {folder.path}")
        console.print(headline(read_verdict(folder.file("clues.json"))), soft_wrap=True, highlight=False)
        _add_stages(config, folder, console, others)
        return folder
    inputs = open_inputs(config)
    judge = Judge(inputs, config.trigger)
    purification = Purification(inputs.model, inputs.defence_data(), config)
    if not demonstration:
        purification.check()
    folder = RunFolder.create_or_resume(config.run_dir, config)
    if demonstration:
        inputs = _make_demonstration(config, folder, inputs, console)
        judge = Judge(inputs, trigger_path(folder.options(), folder))
        purification = Purification(inputs.model, inputs.defence_data(), config)
    _bind(folder, purification, others)
    purification.log_dir, purification.journal_dir = folder.file("tensorboard"), journal_dir or folder.journal_dir
    print_untraced(purification.index, console)
    _defend(folder, inputs, purification, console)
    console.print("Judging every mask on the test images ...")
    rows = make_rows(folder, judge, purification.index)
    write_report(folder, judge, purification.index, rows, _facts(inputs, judge, folder, purification))
    _add_stages(config, folder, console, others, purification)
    return folder


def _bind(folder: RunFolder, purification: Purification, others: Sequence[RunFolder]) -> None:
    folder.bind(purification.subject)
    for other in others:
        folder.adopt(other, UNSPENDING)


def missing_stages(config: TrainConfig) -> list[str]:
    """Rows of stages that the finished run lacks."""
    assert config.run_dir is not None
    _, rows = read_report(RunFolder(config.run_dir))
    return [row for row in rows_of(config.stages) if row not in {known.method for known in rows}]


def _add_stages(
    config: TrainConfig,
    folder: RunFolder,
    console: Console,
    others: Sequence[RunFolder],
    purification: Purification | None = None,
) -> None:
    """Run the stages that a finished run lacks, judge them, and write the report anew."""
    missing = missing_stages(config)
    if not missing:
        return
    inputs = open_inputs(patient(config, folder))
    purification = purification or Purification(inputs.model, inputs.defence_data(), config)
    _bind(folder, purification, others)
    for row in missing:
        if not folder.has(row):
            console.print(f"{LABELS[row]} ...")
            folder.save(run_stage(row, purification, folder))
    add_stage_rows(folder, missing, Judge(inputs, trigger_path(folder.options(), folder)), purification.index)


def _run_dir(config: TrainConfig) -> Path:
    stem = Path(config.model.rpartition(":")[0] or config.model).stem
    name = f"{stem}-{Path(config.data).name}-seed{config.seed}"
    return real_path(config.run_dir or Path("runs") / name, "--run-dir")


def _make_demonstration(config: TrainConfig, folder: RunFolder, inputs: Inputs, console: Console) -> Inputs:
    """Backdoor a small network on digits, once per run folder."""
    from onp.attacks.make import make_backdoored_model  # makes the patient; what treats it never imports this

    if not folder.file("backdoored.safetensors").exists():
        console.print("No --checkpoint given: training a small network on digits with a BadNets backdoor to purify ...")
        make_backdoored_model(inputs, folder.path, seed=config.seed)
    return open_inputs(patient(config, folder))


def _defend(folder: RunFolder, inputs: Inputs, purification: Purification, console: Console) -> None:
    """Run every method that has no result yet, and write the purified network."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        pending = [method for method in METHODS if not folder.has(method)]
        if pending:
            clue = progress.add_task("finding clues", total=CLUES)
            purification.on_clue = lambda stage: progress.update(clue, description=stage, advance=1)
            evidence, _ = purification.timed_evidence
            clues = {**make_verdict(inputs, evidence), "trust": purification.timed_clues[0].trust}
            write_json(folder.file("clues.json"), clues)
            progress.update(clue, description="finding clues", completed=CLUES)
            console.print(headline(clues), soft_wrap=True, highlight=False)
        for method in pending:
            if purification.left_alone:
                folder.save(purification.run(method))
                continue
            total = 1 if method == "rnp" else purification.config.budget
            task = progress.add_task(LABELS[method].partition(",")[0], total=total)
            folder.save(purification.run(method, partial(_advance, progress, task)))
            progress.update(task, completed=total)
    result = folder.load("onp", purification.index)
    assert result.mask is not None
    purified = copy.deepcopy(purification.model)
    apply_mask(purified, result.mask)
    save_weights(purified, folder.file("purified.safetensors"))
    shutil.rmtree(folder.journal_dir, ignore_errors=True)


def _advance(progress: Progress, task: TaskID, method: str, used: int, budget: int) -> None:
    progress.update(task, completed=used)


def _facts(inputs: Inputs, judge: Judge, folder: RunFolder, purification: Purification) -> dict[str, object]:
    config = inputs.config
    checkpoint = config.checkpoint
    clues = read_verdict(folder.file("clues.json"))
    labels = labels_of(judge.dataset) if judge.dataset is not None else []
    target = judge.trigger.target if judge.trigger is not None else None
    return {
        "model": config.model,
        "checkpoint": checkpoint.name if checkpoint else None,
        "checkpoint_sha256": sha256(checkpoint) if checkpoint else None,
        "defence_images": len(purification.data),
        "test_images": len(labels),
        "triggered_images": sum(label != target for label in labels) if target is not None else 0,
        "units": len(purification.index),
        "evidence_of_a_backdoor": clues["verdict"] == "evidence",
        "probability_of_a_backdoor": clues["confidence"],
        "suspect_class": clues["suspect"],
        "kind_of_trigger": clues["kind"],
        "trust_in_recovered_trigger": clues["trust"],
        "seed": config.seed,
        "device": config.device,
        "threads": config.threads,
    }


def _show(folder: RunFolder) -> None:
    report, rows = read_report(folder)
    console.print(make_table(rows, f"{Path(report['model']).name} on {report['defence_images']} clean images"))
    for note in notes_of(rows):
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
    pruned = any(row.units_pruned for row in rows if row.method == "onp")
    console.print(
        f"{'Purified network:' if pruned else 'Network, unchanged:'} {folder.file('purified.safetensors')}\n"
        f"Report: {folder.file('report.md')}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(TrainConfig, train, "onp.train")
