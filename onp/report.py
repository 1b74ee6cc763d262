"""The report of a run: rows of figures, from its masks, as a table in the terminal, JSON, Markdown and plots."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.table import Table
from torch import nn
from torch.utils.data import Subset

from baselines_rnp.rnp import threshold_masks
from onp.checkpoints import load_checkpoint, read_json, write_atomically, write_json, write_text
from onp.datasets import ImageDataset, in_memory, labels_of
from onp.errors import ConfigError, DataError, FileError
from onp.inputs import Inputs
from onp.judge import Measurement, measure
from onp.layout import fastest_layout
from onp.masks import KeepMask, masked
from onp.purification import METHODS, NO_EVIDENCE, MethodResult
from onp.run_folder import RunFolder
from onp.units import UnitIndex

LABELS = {
    "backdoored": "network as given",
    "rnp": "RNP, trigger-free",
    "rnp_oracle": "RNP, oracle",
    "random": "random search",
    "ranked": "one-shot ranking",
    "greedy": "greedy search",
    "onp": "ONP",
    "onp_gated": "ONP, gated",
    "onp_finetuned": "ONP + fine-tuning",
    "rnp_finetuned": "RNP + fine-tuning",
    "rnp_removal": "RNP, from unlearned",
}
FACTS_READ = (
    "model",
    "checkpoint_sha256",
    "defence_images",
    "suspect_class",
    "evidence_of_a_backdoor",
    "probability_of_a_backdoor",
)
"""what commands read of a report, besides its rows"""
_PATH_POINTS = 17
_PATH_IMAGES = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a figure does not exist (no test images, no trigger, not run)."""

    method: str
    ca: float | None = None
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    units_pruned: int | None = None
    reward_evaluations: int | None = None
    seconds: float | None = None
    note: str = ""


class Judge:
    """Measures masks of one run on its test images; the trigger is read for judging alone."""

    def __init__(self, inputs: Inputs, trigger: Path | None) -> None:
        self.inputs = inputs
        layout = fastest_layout(inputs.model, inputs.image_shape)
        self.model: nn.Module = copy.deepcopy(inputs.model).to(memory_format=layout)
        self.dataset: ImageDataset | None = inputs.dataset("test")
        self.trigger = None
        if self.dataset is not None and (shape := tuple(self.dataset[0][0].shape)) != inputs.image_shape:
            raise DataError(
                f"{inputs.config.data}: test images have the shape {shape}, training images {inputs.image_shape}; "
                "give --image-size"
            )
        if trigger is not None:
            if self.dataset is None:
                raise ConfigError(f"--trigger is given, but {inputs.config.data} has no test/ to judge on")
            from onp.attacks.triggers import load_trigger  # judging only: the defending path never gets here

            self.trigger = load_trigger(trigger, tuple(self.dataset[0][0].shape), inputs.classes)

    def __call__(self, mask: KeepMask, limit: int | None = None) -> Measurement | None:
        """Measure a mask on all test images, or on `limit` of them; None without any."""
        with masked(self.model, mask):
            return self.of(self.model, limit)

    def of(self, model: nn.Module, limit: int | None = None) -> Measurement | None:
        """Measure a network, as masks are."""
        dataset, config = self._images, self.inputs.config
        if dataset is None:
            return None
        images = len(labels_of(dataset))
        if limit is not None and limit < images:  # at random: folders come class by class, or class after class
            order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
            dataset = Subset(dataset, order[:limit].tolist())
        target = self.trigger.target if self.trigger else None
        return measure(model, dataset, config.normalisation, self.inputs.device, self.trigger, target)

    @cached_property
    def _images(self) -> ImageDataset | None:
        """The test images, which every mask needs again, in memory where they are few."""
        return in_memory(self.dataset) if self.dataset is not None else None


def make_rows(folder: RunFolder, judge: Judge, index: UnitIndex) -> list[Row]:
    """Measure every mask of the run; the oracle row picks RNP's threshold by DER on the poisoned test images."""
    before = judge(KeepMask.all_kept(index))
    rows = [_row("backdoored", KeepMask.all_kept(index), before, before)]
    for method in METHODS:
        result = folder.load(method, index)
        after = judge(result.mask) if result.mask is not None else None
        rows.append(_row(method, result.mask, after, before, result))
        if method == "rnp":
            rows.append(_oracle_row(folder, judge, index, before, result))
    return rows


def make_stage_rows(folder: RunFolder, stages: list[str], judge: Judge, index: UnitIndex, first: Row) -> list[Row]:
    """Measure the networks of stages that the run has; `first` is the row of the backdoored model."""
    before = Measurement(first.ca, first.asr, first.ra) if first.ca is not None else None
    rows = []
    for stage in stages:
        result, after = folder.load(stage, index), None
        if result.mask is not None:
            network = copy.deepcopy(judge.model)
            load_checkpoint(network, folder.weights(stage))
            after = judge.of(network)
        rows.append(_row(stage, result.mask, after, before, result))
    return rows


def _row(
    method: str,
    mask: KeepMask | None,
    after: Measurement | None,
    before: Measurement | None,
    result: MethodResult | None = None,
) -> Row:
    row = Row(method, units_pruned=mask.units_pruned if mask is not None else None)
    if after is not None and before is not None:
        row = dataclasses.replace(row, ca=after.ca, asr=after.asr, ra=after.ra, der=after.der(before))
    if result is not None:
        row = dataclasses.replace(
            row, reward_evaluations=result.reward_evaluations, seconds=result.seconds, note=result.note
        )
    return row


def _oracle_row(
    folder: RunFolder, judge: Judge, index: UnitIndex, before: Measurement | None, result: MethodResult
) -> Row:
    if before is None or before.asr is None:
        return Row("rnp_oracle", note="an oracle needs --trigger")
    if not folder.has("rnp_oracle"):
        values = folder.rnp_values()
        if values is None:
            return Row("rnp_oracle", note=result.note)
        folder.save(_choose_by_oracle(judge, threshold_masks(index, values), before, result))
    oracle = folder.load("rnp_oracle", index)
    return _row("rnp_oracle", oracle.mask, judge(oracle.mask) if oracle.mask is not None else None, before, oracle)


def _choose_by_oracle(
    judge: Judge, candidates: list[tuple[float, KeepMask]], before: Measurement, result: MethodResult
) -> MethodResult:
    """The threshold with the best DER on the poisoned test images: what no defender can do."""
    ratings: dict[KeepMask, tuple[float, float]] = {}
    for threshold, mask in candidates:
        if mask not in ratings:
            after = judge(mask)
            ratings[mask] = (after.der(before) or 0.0 if after is not None else 0.0, threshold)
    mask = max(ratings, key=lambda mask: ratings[mask][0])
    note = f"threshold {ratings[mask][1]}, chosen with the poisoned test images"
    return MethodResult("rnp_oracle", mask, 0, result.seconds, note)


def notes_of(rows: list[Row]) -> list[str]:
    """Each note once, behind the names of its rows."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        methods.setdefault(row.note, []).append(LABELS[row.method])
    return [f"{', '.join(names)}: {note}" for note, names in methods.items() if note]


def make_table(rows: list[Row], title: str) -> Table:
    """The table for the terminal, of what gave a mask."""
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("CA %", "ASR %", "RA %", "DER", "pruned", "evals", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in filter(_has_mask, rows):
        table.add_row(LABELS[row.method], *_cells(row), style="bold" if row.method == "onp" else None)
    return table


def _has_mask(row: Row) -> bool:
    return row.units_pruned is not None


def _left_alone(rows: list[Row]) -> bool:
    return any(row.note == NO_EVIDENCE for row in rows)


def _cells(row: Row) -> list[str]:
    percent = [f"{100 * value:.1f}" if value is not None else "-" for value in (row.ca, row.asr, row.ra)]
    return [
        *percent,
        f"{row.der:.3f}" if row.der is not None else "-",
        str(row.units_pruned) if row.units_pruned is not None else "-",
        str(row.reward_evaluations) if row.reward_evaluations is not None else "-",
        f"{row.seconds:.1f}" if row.seconds is not None else "-",
    ]


def write_report(folder: RunFolder, judge: Judge, index: UnitIndex, rows: list[Row], facts: dict[str, Any]) -> None:
    """Write plots, `report.md` and, last, `report.json`, which says that the run is complete."""
    results = {method: folder.load(method, index) for method in METHODS}
    path = _measure_path(judge, results["onp"].mask)
    if not _left_alone(rows):
        _draw_plots(folder, path, results["onp"], index)
    text = _markdown(rows, results["onp"].mask, facts)
    write_text(folder.file("report.md"), text)
    record = {"rows": [dataclasses.asdict(row) for row in rows], "pruning_path": path, **facts}
    write_json(folder.file("report.json"), record)


def _draw_plots(folder: RunFolder, path: list[dict[str, Any]], result: MethodResult, index: UnitIndex) -> None:
    _plot(folder.file("plots", "pruning_path.png"), lambda axes: _draw_path(axes, path))
    _plot(folder.file("plots", "learning_curve.png"), lambda axes: _draw_curve(axes, result))
    _plot(folder.file("plots", "pruned_per_layer.png"), lambda axes: _draw_layers(axes, result.mask, index))


def read_report(folder: RunFolder) -> tuple[dict[str, Any], list[Row]]:
    """`report.json` of a finished run, and its rows; raises `FileError` where it is not what a run writes."""
    path = folder.file("report.json")
    report = read_json(path)
    try:
        if missing := [name for name in FACTS_READ if name not in report]:
            raise TypeError(f"without {', '.join(missing)}")
        rows = [Row(**row) for row in report["rows"]]
        if not rows or rows[0].method != "backdoored" or not all(row.method in LABELS for row in rows):
            raise TypeError("rows of other methods")
        figures = [value for row in rows for name, value in vars(row).items() if name not in ("method", "note")]
        if wrong := [value for value in figures if not isinstance(value, float | int | None)]:
            raise TypeError(f"{wrong[0]!r} is no figure")
        return report, rows
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} is not what a run writes ({error}); restore it, or run again elsewhere") from error


def add_stage_rows(folder: RunFolder, stages: list[str], judge: Judge, index: UnitIndex) -> None:
    """Measure stages of a run that has a report, and write that anew with their rows."""
    report, rows = read_report(folder)
    rows = sorted(
        rows + make_stage_rows(folder, stages, judge, index, rows[0]), key=lambda row: list(LABELS).index(row.method)
    )
    facts = {name: value for name, value in report.items() if name not in ("rows", "pruning_path")}
    text = _markdown(rows, folder.load_mask("onp", index), facts)
    write_text(folder.file("report.md"), text)
    write_json(folder.file("report.json"), {**report, "rows": [dataclasses.asdict(row) for row in rows]})


def _measure_path(judge: Judge, mask: KeepMask | None) -> list[dict[str, Any]]:
    """CA and ASR after each unit of ONP's mask (evenly thinned), on some of the test images."""
    steps = mask.path() if mask is not None else []
    chosen = (
        sorted({round(i * (len(steps) - 1) / max(1, _PATH_POINTS - 1)) for i in range(_PATH_POINTS)}) if steps else []
    )
    measured = ((steps[i].units_pruned, judge(steps[i], _PATH_IMAGES)) for i in chosen)
    return [{"units_pruned": units, "ca": m.ca, "asr": m.asr} for units, m in measured if m is not None]


def _plot(path: Path, draw: Any) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    try:
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)


def _draw_path(axes: Any, path: list[dict[str, Any]]) -> None:
    for key, label, colour in (("ca", "clean accuracy", "tab:blue"), ("asr", "attack success rate", "tab:red")):
        points = [(step["units_pruned"], 100 * step[key]) for step in path if step[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, clip_on=False)
            axes.annotate(f"{points[-1][1]:.1f}", points[-1], (6, 6), textcoords="offset points", color=colour)
    axes.set(xlabel="units pruned", ylabel="%", ylim=(0, 102), title="ONP's pruning path on test images")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if path:
        axes.legend(loc="center right")
    else:
        axes.text(0.5, 0.5, "no test images", transform=axes.transAxes, ha="center")


def _draw_curve(axes: Any, result: MethodResult) -> None:
    curve = result.curve
    if curve is not None and curve.returns:
        axes.plot(curve.evaluations, curve.returns, ".", color="tab:gray", label="episode")
        axes.plot(
            curve.evaluations, list(itertools.accumulate(curve.returns, max)), color="tab:green", label="best so far"
        )
        axes.legend(loc="lower right")
    axes.set(xlabel="reward evaluations", ylabel="return (potential gained)", title="ONP's learning curve")


def _draw_layers(axes: Any, mask: KeepMask | None, index: UnitIndex) -> None:
    pruned = mask.to_json()["pruned"] if mask is not None else {}
    names = [layer.name for layer in index]
    bars = axes.barh(range(len(names)), [len(pruned.get(name, [])) for name in names], color="tab:red")
    axes.bar_label(
        bars,
        [f"{len(pruned[layer.name])} of {layer.size}" if layer.name in pruned else "" for layer in index],
        padding=3,
    )
    axes.set_yticks(range(len(names)), names, fontsize=max(3.0, min(8.0, 200 / len(names))))
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="units pruned by ONP", title="Where ONP prunes")
    axes.margins(x=0.15)


def _markdown(rows: list[Row], mask: KeepMask | None, facts: dict[str, Any]) -> str:
    lines = ["# Purification report", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    header = ("method", "CA %", "ASR %", "RA %", "DER", "units pruned", "reward evaluations", "seconds", "note")
    lines += ["", "| " + " | ".join(header) + " |", "|---" + "|---:" * 7 + "|---|"]
    lines += ["| " + " | ".join([LABELS[row.method], *_cells(row), row.note]) + " |" for row in rows if _has_mask(row)]
    if notes := notes_of([row for row in rows if not _has_mask(row)]):
        lines += ["", *(f"- {note}" for note in notes)]
    if mask is not None:
        lines += ["", "## Units that ONP prunes", ""]
        lines += [
            f"- `{layer}`: {', '.join(map(str, units))}" for layer, units in mask.to_json()["pruned"].items()
        ] or ["none"]
    if not _left_alone(rows):
        lines += ["", "## Plots", ""]
        lines += [f"![{name}](plots/{name}.png)" for name in ("pruning_path", "learning_curve", "pruned_per_layer")]
    return "\n".join(lines) + "\n"
