"""What a table looks like: JSON, Markdown, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table

from onp.bench.aggregates import (
    FEWEST,
    GOOD_DER,
    MAX_ASR,
    MAX_CA_LOSS,
    SUBJECT,
    Aggregate,
    Cell,
    Comparison,
    Interval,
    Reach,
    Summary,
    aggregate,
    compare,
    reach,
    summarise,
    written,
)
from onp.bench.table_plots import draw_ratings, draw_trade
from onp.bench.verdicts import Verdict, detections
from onp.checkpoints import write_json, write_text
from onp.report import LABELS

Lines = tuple[tuple[str, ...], list[list[str]]]
"""a table's heading and rows"""
TEXTS = ("worst run", "ONP is", "error", "truth", "by", "through")
"""columns that are no figures, besides the first"""
DETAILS = ("seeds", "CA [95 %]", "ASR [95 %]", "RA %", "evals", "s", "networks", "worst run", "pairs", "drawn")
"""columns that a narrow terminal has no room for"""
WIDE = 150
"""characters in a line of a terminal that has"""
INTRODUCTION = (
    "Mean ± sample standard deviation over seeds. CA and ASR have the 95 % Wilson interval of their mean for the",
    "number of test images, which are the same for every seed. CA losses are in points. Differences in DER are paired",
    "by network and seed; their 95 % interval is a bootstrap that draws networks, each with all its seeds (or seeds,",
    "where there is one network). Nothing here was used to choose a mask.",
)


@dataclass(frozen=True)
class Failure:
    """A run that gave no cells."""

    model: str
    seed: int
    budget: int
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Results:
    """What a table holds so far."""

    cells: list[Cell]
    verdicts: list[Verdict]
    failures: list[Failure]
    pending: int
    """runs to come"""


def write_table(out: Path, results: Results) -> None:
    """Write plots, `table.md` and `table.json`."""
    cells = results.cells
    record = {
        "pending_runs": results.pending,
        "failures": [asdict(failure) for failure in results.failures],
        "verdicts": [asdict(verdict) for verdict in results.verdicts],
        "cells": [asdict(cell) for cell in cells],
        "aggregates": [asdict(item) for item in aggregate(cells)],
        "summary": [asdict(item) for item in summarise(cells)],
        "comparisons": [asdict(item) for item in compare(cells)],
        "reach": [asdict(item) for item in reach(cells)],
    }
    if any(cell.der is not None for cell in cells):
        draw_ratings(out / "plots" / "der.png", cells)
        draw_trade(out / "plots" / "ca_loss_asr.png", cells)
    text = _markdown(results)
    write_text(out / "table.md", text)
    write_json(out / "table.json", record)


def make_tables(results: Results, width: int) -> list[Table]:
    """The tables for a terminal of `width` characters."""
    titled = [(model, _model_lines(lines)) for model, lines in _by_model(results.cells)]
    titled += _statements(results)
    if results.failures:
        titled.append(("Failed runs", _failure_lines(results.failures)))
    return [terminal_table(title, *lines, () if width >= WIDE else DETAILS) for title, lines in titled]


def percent(value: float | None) -> str:
    return f"{100 * value:.1f}" if value is not None else "-"


def rating(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else "-"


def terminal_table(
    title: str, heading: tuple[str, ...], rows: Iterable[list[str]], hidden: tuple[str, ...] = ()
) -> Table:
    """A table for the terminal without the columns `hidden`; names that are too long go on in the next line."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [number for number, name in enumerate(heading) if name not in hidden]
    for number in shown:
        text = not number or heading[number] in TEXTS
        table.add_column(
            heading[number], justify="left" if text else "right", no_wrap=heading[number] not in TEXTS, overflow="fold"
        )
    for row in rows:
        table.add_row(*(row[number] for number in shown), style="bold" if row[0] == LABELS[SUBJECT] else None)
    return table


def _markdown(results: Results) -> str:
    cells = results.cells
    lines = ["# Networks x methods x seeds", "", *INTRODUCTION, ""]
    if results.pending:
        lines += [f"**Partial: {results.pending} runs to come.**", ""]
    if results.failures:
        lines += ["## Failed runs", "", *markdown_table(*_failure_lines(results.failures)), ""]
    for model, aggregates in _by_model(cells):
        lines += [f"## {model}", "", *markdown_table(*_model_lines(aggregates)), ""]
    for title, statement in _statements(results):
        lines += [f"## {title}", "", *markdown_table(*statement), ""]
    if any(cell.der is not None for cell in cells):
        lines += ["## Plots", "", "![DER](plots/der.png)", "![CA loss and ASR](plots/ca_loss_asr.png)"]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(heading: tuple[str, ...], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table in Markdown; columns but the first, and those in `TEXTS`, are figures."""
    rule = ["---" if name in TEXTS or not number else "---:" for number, name in enumerate(heading)]
    lines = ["| " + " | ".join(heading) + " |", "|" + "|".join(rule) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _by_model(cells: list[Cell]) -> list[tuple[str, list[Aggregate]]]:
    return [(model, list(group)) for model, group in groupby(aggregate(cells), key=lambda item: item.model)]


def _model_lines(aggregates: list[Aggregate]) -> Lines:
    heading = (
        "method",
        "budget",
        "seeds",
        "CA %",
        "CA [95 %]",
        "ASR %",
        "ASR [95 %]",
        "RA %",
        "DER",
        "units",
        "evals",
        "s",
    )
    rows = []
    for item in aggregates:
        of = item.measures
        rows.append([
            LABELS[item.method], _count(item.budget), str(item.seeds),
            written(of["ca"], 100, 1), _interval(item.ca_interval, 100, 1),
            written(of["asr"], 100, 1), _interval(item.asr_interval, 100, 1),
            written(of["ra"], 100, 1), written(of["der"], 1, 3),
            *(written(of[name], 1, 0) for name in ("units_pruned", "reward_evaluations", "seconds")),
        ])  # fmt: skip
    return heading, rows


def _statements(results: Results) -> list[tuple[str, Lines]]:
    """What is said over all networks, with its titles."""
    cells, found = results.cells, list[tuple[str, Lines]]()
    summaries = summarise(cells)
    if results.verdicts:
        found.append(("Is there a backdoor?", _verdict_lines(results.verdicts)))
    if rated := [item for item in summaries if item.runs]:
        aim = f"aim: ASR <= {MAX_ASR:.0%}, CA loss <= {100 * MAX_CA_LOSS:.0f} point"
        found.append((f"Networks with a trigger ({aim})", _summary_lines(rated)))
    if clean := [item for item in summaries if item.clean_runs]:
        found.append(("Clean networks", _clean_lines(clean)))
    if comparisons := compare(cells):
        title = f"DER of ONP less a rival's (fewer than {FEWEST} drawn: undecided)"
        found.append((title, _comparison_lines(comparisons)))
    if reached := reach(cells):
        found.append((f"Evaluations to reach DER {GOOD_DER}", _reach_lines(reached)))
    return found


def _verdict_lines(verdicts: list[Verdict]) -> Lines:
    rows = [
        [item.name, item.truth, str(item.runs), written(item.probability, 1, 2), f"{item.found} of {item.runs}",
         f"{item.right} of {item.runs}"]
        for item in detections(verdicts)
    ]  # fmt: skip
    return ("network", "truth", "runs", "probability", "evidence", "right"), rows


def _summary_lines(summaries: list[Summary]) -> Lines:
    heading = ("method", "budget", "networks", "mean DER", "aim met", "worst DER", "worst run", "worst CA loss")
    rows = [
        [LABELS[item.method], _count(item.budget), str(item.models), rating(item.der), f"{item.met} of {item.runs}",
         rating(item.worst_der), item.worst_run, percent(item.worst_ca_loss)]
        for item in summaries
    ]  # fmt: skip
    return heading, rows


def _clean_lines(summaries: list[Summary]) -> Lines:
    rows = [
        [LABELS[item.method], _count(item.budget), str(item.clean_runs), percent(item.clean_ca_loss),
         percent(item.clean_worst_ca_loss)]
        for item in summaries
    ]  # fmt: skip
    return ("method", "budget", "runs", "mean CA loss", "worst CA loss"), rows


def _comparison_lines(comparisons: list[Comparison]) -> Lines:
    rows = [
        [LABELS[item.rival], _count(item.budget), str(item.pairs), item.drawn, f"{item.difference:+.3f}",
         _interval(item.interval, 1, 3), item.verdict]
        for item in comparisons
    ]  # fmt: skip
    return ("rival", "budget", "pairs", "drawn", "difference", "[95 %]", "ONP is"), rows


def _reach_lines(reached: list[Reach]) -> Lines:
    rows = [
        [LABELS[item.method], f"{item.reached} of {item.runs}",
         f"{item.evaluations:.0f}" if item.evaluations is not None else "not reached"]
        for item in reached
    ]  # fmt: skip
    return ("method", "runs that reach it", "median"), rows


def _failure_lines(failures: list[Failure]) -> Lines:
    rows = [[item.model, str(item.seed), str(item.budget), item.error] for item in failures]
    return ("network", "seed", "budget", "error"), rows


def _count(value: int | None) -> str:
    return str(value) if value is not None else "-"


def _interval(value: Interval | None, scale: int, digits: int) -> str:
    return "-" if value is None else f"[{scale * value[0]:.{digits}f}, {scale * value[1]:.{digits}f}]"
