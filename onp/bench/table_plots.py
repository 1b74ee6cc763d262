"""The plots of a table, at the largest budget measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from onp.bench.aggregates import MAX_ASR, MAX_CA_LOSS, SUBJECT, Cell
from onp.checkpoints import write_atomically
from onp.report import LABELS

STYLES = {
    "backdoored": ("X", "black"),
    "rnp": ("v", "tab:gray"),
    "rnp_oracle": ("^", "tab:brown"),
    "random": ("s", "tab:blue"),
    "ranked": ("D", "tab:orange"),
    "greedy": ("P", "tab:green"),
    "onp": ("o", "tab:red"),
    "onp_gated": (".", "tab:pink"),
    "onp_finetuned": ("*", "tab:purple"),
    "rnp_finetuned": ("<", "tab:olive"),
    "rnp_removal": (">", "tab:cyan"),
}
"""marker and colour of every method; any other is a grey dot"""


def draw_ratings(path: Path, cells: list[Cell]) -> None:
    """DER of every network and method: the mean, and a line over the spread of the seeds."""
    shown = [cell for cell in _at_largest_budget(cells) if cell.der is not None and cell.method != "backdoored"]
    models = list(dict.fromkeys(cell.model for cell in shown))
    methods = [name for name in LABELS if any(cell.method == name for cell in shown)]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.85 * len(models)), layout="constrained")
    for number, method in enumerate(methods):
        marker, colour = STYLES.get(method, (".", "tab:gray"))
        for row, model in enumerate(models):
            ratings = [cell.der or 0 for cell in shown if (cell.model, cell.method) == (model, method)]
            if ratings:
                height = row + 0.72 * ((number + 0.5) / len(methods) - 0.5)
                axes.plot([min(ratings), max(ratings)], [height] * 2, "|-", color=colour, linewidth=1.4, zorder=2)
                axes.plot(np.mean(ratings), height, marker, color=colour, markersize=6, clip_on=False, zorder=3)
        axes.plot([], [], marker, color=colour, label=LABELS[method])
    for row in range(0, len(models), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0)
    axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1, zorder=1)
    axes.set_yticks(range(len(models)), models)
    axes.set(ylim=(len(models) - 0.5, -0.5), xlabel="DER, mean and range over seeds (dotted: nothing done)")
    axes.set_xlim(min(0.48, *axes.get_xlim()), 1.005)
    axes.grid(axis="x", color="0.9", zorder=0)
    _finish(figure, axes, path, f"Defence effectiveness{_budget(shown)}", len(methods))


def draw_trade(path: Path, cells: list[Cell]) -> None:
    """What every run pays in clean accuracy, and what is left of its backdoor."""
    shown = [cell for cell in _at_largest_budget(cells) if cell.asr is not None and cell.ca_loss is not None]
    shown = [cell for cell in shown if cell.method != "backdoored"]
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    methods = [name for name in LABELS if any(cell.method == name for cell in shown)]
    for number, method in enumerate(methods):  # smaller ones in larger, hollow ones: what coincides is seen
        marker, colour = STYLES.get(method, (".", "tab:gray"))
        runs = [cell for cell in shown if cell.method == method]
        axes.scatter(
            [100 * (cell.ca_loss or 0) for cell in runs], [100 * (cell.asr or 0) for cell in runs],
            s=100 - 70 * number / len(methods), marker=marker, edgecolors=colour, linewidths=1.3, clip_on=False,
            facecolors=colour if method == SUBJECT else "none", label=LABELS[method], zorder=3,
        )  # fmt: skip
    losses = [100 * (cell.ca_loss or 0) for cell in shown]
    low, high = min(-1.0, *losses) - 0.5, max(3.0, *losses) * 1.15
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("function", functions=(_root, _square))
    axes.set_xticks([tick for tick in (-10, -3, -1, 0, 1, 3, 10, 30, 60) if low <= tick <= high])
    axes.set_yticks([0, 1, 3, 10, 30, 60, 100])
    axes.set(xlim=(low, high), ylim=(0, 108), ylabel="attack success rate, % (square root scale)")
    axes.set_xlabel("loss of clean accuracy, points (square root scale)")
    aim = (100 * MAX_CA_LOSS, 100 * MAX_ASR)
    axes.add_patch(Rectangle((low, 0), aim[0] - low, aim[1], color="tab:green", alpha=0.12, linewidth=0, zorder=1))
    axes.annotate("aim", (low, 0), (5, 5), textcoords="offset points", color="tab:green")
    axes.grid(color="0.92", zorder=0)
    _finish(figure, axes, path, f"Price and effect of every run{_budget(shown)}", len(methods))


def _at_largest_budget(cells: list[Cell]) -> list[Cell]:
    """Cells of the largest budget, and of what spends none."""
    largest = max((cell.budget or 0 for cell in cells), default=0)
    return [cell for cell in cells if cell.budget in (None, largest)]


def _budget(cells: list[Cell]) -> str:
    largest = max((cell.budget or 0 for cell in cells), default=0)
    return f", {largest} evaluations" if largest else ""


def _finish(figure: Any, axes: Any, path: Path, title: str, entries: int) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=min(4, entries), frameon=False)
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)


def _root(values: Any) -> NDArray[np.float64]:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> NDArray[np.float64]:
    return np.sign(values) * np.square(values)
