"""Networks x methods x seeds in one table: every run an ordinary run folder, so that the same command goes on."""

from __future__ import annotations

import gc
import shutil
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from onp.bench.aggregates import MEASURES, SUBJECT, Cell
from onp.bench.suite import Suspect, read_suites
from onp.bench.table_report import Failure, Results, make_tables, percent, rating, write_table
from onp.bench.verdicts import Verdict
from onp.checkpoints import read_json
from onp.commands import console
from onp.errors import ConfigError, FileError, OnpError
from onp.inputs import InputConfig
from onp.paths import real_path
from onp.purification import PurifyConfig
from onp.report import read_report
from onp.run_folder import RunFolder
from onp.stages import StageName
from onp.train import TrainConfig, complete_run, missing_stages


@dataclass(frozen=True)
class TableConfig:
    """Options of `python -m onp.bench table`."""

    models: tuple[Path, ...]
    """suites (JSON lists of networks), or folders that hold an entry.json; see onp/bench/suite.py for the fields"""
    out: Path = Path("runs/table")
    """folder for table.json, table.md, plots and the run folders NAME-seedSEED[-budgetBUDGET]"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of everything random"""
    budgets: tuple[int, ...] = ()
    """reward evaluations of random, ranked, greedy and onp, a run for each; --purify.budget alone by default"""
    stages: tuple[StageName, ...] = ()
    """what comes behind the methods, as for onp.train; finished runs get what they lack"""
    folders: tuple[str, ...] = ()
    """where data lies that the networks' files only name, as cifar10=FOLDER gtsrb=FOLDER"""
    defence_size: int = InputConfig.defence_size
    """clean images that the defender has"""
    test_size: int | None = InputConfig.test_size
    """test images to judge on, evenly drawn; all by default"""
    device: str = InputConfig.device
    """cpu, cuda, cuda:1, ... or auto (cuda where there is one)"""
    threads: int = InputConfig.threads
    """CPU threads for PyTorch; 0 leaves its default"""
    purify: PurifyConfig = field(default_factory=PurifyConfig)
    """settings of the job, the same for every network; the seeds come from --seeds, and --always is on"""


@dataclass(frozen=True)
class Run:
    """One network, seed and budget: a group of cells."""

    model: str
    seed: int
    budget: int
    options: TrainConfig

    @property
    def path(self) -> Path:
        assert self.options.run_dir is not None
        return self.options.run_dir

    @property
    def journal_dir(self) -> Path:
        """Journals that the budgets of one network and seed share: what one has computed is there for the others."""
        return self.path.parent / f".{self.model}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        """A run whose report is damaged is not: it is tried, and fails by itself."""
        try:
            return (self.path / "report.json").exists() and not missing_stages(self.options)
        except FileError:
            return False


@dataclass(frozen=True)
class Finished:
    """What a finished run gives."""

    cells: list[Cell]
    verdict: Verdict


def run_table(config: TableConfig) -> int:
    """Purify and judge several networks with several seeds, in one table. The same command goes on, and tries again."""
    out = real_path(config.out, "--out")
    runs = list_runs(config, out)
    for run in runs:
        if run.path.exists():  # other options than those recorded are refused before anything is computed
            RunFolder.create_or_resume(run.path, run.options, "--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); give another") from error
    outcomes = dict[Path, Finished | Failure]()
    for run in sorted(runs, key=lambda run: not run.finished):
        new, budgets = not run.finished, [other for other in runs if other.journal_dir == run.journal_dir]
        with console.status(f"{run.path.name} ..."):
            outcomes[run.path] = outcome = _attempt(run, [RunFolder(other.path) for other in budgets if other != run])
        if all(other.finished for other in budgets):
            shutil.rmtree(run.journal_dir, ignore_errors=True)
        if new:
            console.print(
                f"{len(outcomes)} of {len(runs)}  {run.path.name}: {_gist(outcome)}", markup=False, highlight=False
            )
        if new or len(outcomes) == len(runs):
            results = _collect(runs, outcomes)
            write_table(out, results)
    for table in make_tables(results, console.width):
        console.print(table)
    console.print(f"Table: {out / 'table.md'}", soft_wrap=True)
    return 1 if results.failures else 0


def list_runs(config: TableConfig, out: Path) -> list[Run]:
    """All runs of a table: every network with the first seed, then with the next. Raises `ConfigError`."""
    if config.purify.seed != PurifyConfig.seed:
        raise ConfigError(f"--purify.seed {config.purify.seed}: give --seeds {config.purify.seed}")
    for name in ("seeds", "budgets"):
        if len(set(values := getattr(config, name))) != len(values):
            raise ConfigError(f"--{name} {' '.join(map(str, values))}: one comes twice")
    if not config.seeds:
        raise ConfigError("--seeds: expected one at least")
    suspects = read_suites(config.models, config.folders)
    return [
        Run(suspect.name, seed, budget, _options(config, suspect, out, seed, budget))
        for seed in config.seeds
        for suspect in suspects
        for budget in config.budgets or (config.purify.budget,)
    ]


def _options(config: TableConfig, suspect: Suspect, out: Path, seed: int, budget: int) -> TrainConfig:
    """The options of `onp.train` for one run."""
    name = f"{suspect.name}-seed{seed}" + (f"-budget{budget}" if config.budgets else "")
    values = {**vars(config.purify), **vars(suspect), "seed": seed, "budget": budget, "run_dir": out / name}
    values["stages"] = config.stages
    values["always"] = True  # the gated figures follow from the verdict
    del values["name"]
    common = {name: getattr(config, name) for name in ("defence_size", "test_size", "device", "threads")}
    return TrainConfig(**values, **common).resolved()


def _attempt(run: Run, others: list[RunFolder]) -> Finished | Failure:
    """Do what is left of a run, and read what it gives; whatever goes wrong with it is its own matter.

    `others` are those of the same network and seed with other budgets.
    """
    try:
        folder = complete_run(run.options, Console(quiet=True), run.journal_dir, others)
        report, _ = read_report(folder)
        return Finished(read_cells(run, report), read_verdict(run, report))
    except Exception as error:
        ours = isinstance(error, OnpError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        trace = "" if ours else traceback.format_exc()
        return Failure(run.model, run.seed, run.budget, " ".join(text.split()), trace)
    finally:
        gc.collect()  # an agent and its environment refer to each other, and hold activations


def read_cells(run: Run, report: dict[str, Any]) -> list[Cell]:
    """The cells of a finished run, and what ONP would have done without `--always`."""
    rows = report["rows"]
    images = {name: report.get(name, 0) for name in ("test_images", "triggered_images")}
    clean = next(row["ca"] for row in rows if row["method"] == "backdoored")
    cells = []
    for row in rows:
        loss = clean - row["ca"] if clean is not None and row["ca"] is not None else None
        budget = run.budget if row["reward_evaluations"] else None
        figures = {name: row[name] for name in MEASURES if name != "ca_loss"}
        cells.append(Cell(run.model, run.seed, budget, row["method"], ca_loss=loss, **figures, **images))
    onp, before = (next(cell for cell in cells if cell.method == method) for method in (SUBJECT, "backdoored"))
    kept = onp if report["evidence_of_a_backdoor"] else replace(before, budget=onp.budget)
    return [*cells, replace(kept, method="onp_gated")]


def read_verdict(run: Run, report: dict[str, Any]) -> Verdict:
    """What a finished run said before it pruned, and where its trigger leads."""
    trigger = run.options.trigger
    truth = read_json(trigger)["target"] if trigger is not None else None
    return Verdict.of(run.model, run.seed, truth, report)


def _collect(runs: list[Run], outcomes: dict[Path, Finished | Failure]) -> Results:
    """What is there so far; what spends no budget counts once per network and seed."""
    cells, failures, verdicts = dict[tuple[object, ...], Cell](), [], dict[tuple[str, int], Verdict]()
    for run in (run for run in runs if run.path in outcomes):
        outcome = outcomes[run.path]
        if isinstance(outcome, Failure):
            failures.append(outcome)
            continue
        verdicts.setdefault((run.model, run.seed), outcome.verdict)
        for cell in outcome.cells:
            cells.setdefault((cell.model, cell.seed, cell.budget, cell.method), cell)
    return Results(list(cells.values()), list(verdicts.values()), failures, len(runs) - len(outcomes))


def _gist(outcome: Finished | Failure) -> str:
    if isinstance(outcome, Failure):
        return f"failed: {outcome.error}"
    cell = next(cell for cell in outcome.cells if cell.method == SUBJECT)
    figures = {"CA": percent(cell.ca), "ASR": percent(cell.asr), "DER": rating(cell.der)}
    return "ONP " + ", ".join(f"{name} {figure}" for name, figure in figures.items())
