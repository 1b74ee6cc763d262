"""What `onp.bench relearn` shows: tables for the terminal, JSON, and one plot."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from onp.bench.aggregates import Spread, spread, written
from onp.bench.table_report import markdown_table
from onp.checkpoints import write_atomically, write_json, write_text
from onp.report import LABELS

Record = dict[str, Any]
SUCCESS = 0.5
"""attack success rate from which the backdoor counts as back"""
TWIN = "twin"
"""the method's name of a network that never had a backdoor"""
HELD = "_held"
"""behind a method's name: its pruned units stay away, as in a physically smaller network"""
STYLES = {
    "backdoored": "black", TWIN: "tab:blue", "onp": "tab:red", "onp_held": "tab:pink", "onp_finetuned": "tab:purple",
    "rnp": "tab:gray", "rnp_oracle": "tab:brown", "greedy": "tab:green",
}  # fmt: skip


def label(method: str) -> str:
    """As in other tables."""
    if method == TWIN:
        return "never backdoored"
    return LABELS[method.removesuffix(HELD)] + (", held" if method.endswith(HELD) else "")


def steps_until(record: Record) -> float:
    """The first measured step with an ASR of `SUCCESS`; infinite where there is none."""
    return next((point["steps"] for point in record["path"] if point["asr"] >= SUCCESS), inf)


def summarise(records: list[Record]) -> list[Record]:
    """Over seeds, in the order of the first records: spreads along the steps, and the median of `steps_until`."""
    order = list(dict.fromkeys(_group(record) for record in records))
    summaries = []
    for key, members in groupby(sorted(records, key=lambda record: order.index(_group(record))), key=_group):
        group = list(members)
        points = list(zip(*(record["path"] for record in group), strict=True))
        until = median(steps_until(record) for record in group)
        summaries.append({
            "run": key[0], "triggered": key[1], "method": key[2], "seeds": len(group),
            "steps": [same[0]["steps"] for same in points],
            "ca": [spread(point["ca"] for point in same) for same in points],
            "asr": [spread(point["asr"] for point in same) for same in points],
            "asr_range": [[min(part := [point["asr"] for point in same]), max(part)] for same in points],
            "steps_until": until if until < inf else None,
        })  # fmt: skip
    return summaries


def _group(record: Record) -> tuple[str, int, str]:
    return record["run"], record["triggered"], record["method"]


def make_tables(records: list[Record]) -> list[Table]:
    """A table a run and number of triggered images: mean ASR by steps, steps until 50 %, mean CA at both ends."""
    tables = []

    def place(item: Record) -> tuple[str, int]:
        return item["run"], item["triggered"]

    for (run, count), members in groupby(sorted(summarise(records), key=place), key=place):
        group = list(members)
        title = f"{run}, {count} triggered: ASR % by steps"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("network", no_wrap=True)
        steps = [f"step {step}" if not step else str(step) for step in group[0]["steps"]]
        for name in (*steps, "50 % at", "CA %"):
            table.add_column(name, justify="right", no_wrap=True)
        for item in group:
            until = item["steps_until"]
            cells = [f"{100 * asr.mean:.1f}" for asr in item["asr"]] + ["never" if until is None else f"{until:g}"]
            ends = " > ".join(f"{100 * item['ca'][place].mean:.1f}" for place in (0, -1))
            table.add_row(label(item["method"]), *cells, ends)
        tables.append(table)
    return tables


def write_results(out: Path, records: list[Record]) -> None:
    """Write `relearn.md`, `relearn.json` and `relearn.png`."""
    summaries = summarise(records)
    _draw(out / "relearn.png", summaries)
    text = markdown(summaries)
    write_text(out / "relearn.md", text)
    spreads = [
        {**item, **{name: [asdict(value) for value in item[name]] for name in ("ca", "asr")}} for item in summaries
    ]
    write_json(out / "relearn.json", {"summaries": spreads, "records": records})


def markdown(summaries: list[Record]) -> str:
    """A table a run: CA before, ASR by steps and CA at the end, in %, mean ± deviation over seeds."""

    def cell(value: Spread) -> str:
        return written(value, 100, 1)

    parts = []
    for run, members in groupby(sorted(summaries, key=lambda item: item["run"]), key=lambda item: item["run"]):
        group = list(members)
        steps = [f"ASR behind {step} steps" for step in group[0]["steps"]]
        rows = [
            [label(item["method"]), str(item["triggered"]), str(item["seeds"]), cell(item["ca"][0]),
             *map(cell, item["asr"]), cell(item["ca"][-1])]
            for item in group
        ]  # fmt: skip
        heading = ("network", "triggered images", "seeds", "CA before", *steps, "CA then")
        parts += [f"## {run}", "", *markdown_table(heading, rows), ""]
    return "\n".join(parts)


def _draw(path: Path, summaries: list[Record]) -> None:
    """A row a run, a column a number of triggered images, a line a network; shades are the range over seeds."""
    runs = list(dict.fromkeys(item["run"] for item in summaries))
    counts = sorted({item["triggered"] for item in summaries})
    figure, grid = plt.subplots(
        len(runs), len(counts), figsize=(1.5 + 2.3 * len(counts), 1 + 1.9 * len(runs)), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    drawn: dict[str, Any] = {}
    for item in summaries:
        axes = grid[runs.index(item["run"])][counts.index(item["triggered"])]
        colour = STYLES.get(item["method"], "tab:olive")
        (line,) = axes.plot(item["steps"], [100 * asr.mean for asr in item["asr"]], ".-", color=colour, clip_on=False)
        low, high = ([100 * ends[side] for ends in item["asr_range"]] for side in (0, 1))
        axes.fill_between(item["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
        drawn.setdefault(label(item["method"]), line)
    for axes, count in zip(grid[0], counts, strict=True):
        axes.set_title(f"{count} triggered image{'' if count == 1 else 's'}", fontsize=9)
    for row, run in zip(grid, runs, strict=True):
        row[0].set_ylabel(f"{run}\nASR %", fontsize=7)
        for axes in row:
            axes.set(ylim=(0, 102))
            axes.axhline(100 * SUCCESS, color="0.7", linestyle=":", linewidth=1)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("steps")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(4, len(drawn)), frameon=False)
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)
