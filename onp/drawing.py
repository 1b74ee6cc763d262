"""A picture of a network's graph: layers as columns from left to right, units as dots, chosen units ringed in red."""

from __future__ import annotations

from collections.abc import Set
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

import networkx as nx
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

Places = dict[int, tuple[float, float]]

ROWS = 64
"""units in one column; wider layers get several columns side by side"""
GAP = 4.0
"""space between layers, in columns"""
EDGES_PER_LAYER = {"connectivity": 120, "similarity": 60}
"""edges drawn towards and in one layer, the strongest first"""
NUMBERED = 40
"""marked units that are numbered; where there are more, none is"""


def draw_graph(
    graph: nx.DiGraph,
    file: Path | BinaryIO,
    marked: Set[int] = frozenset(),
    meaning: str = "pruned",
) -> None:
    """Draw the graph of `onp.graph.to_networkx` as a PNG; dots are coloured by their weight change.

    Colours span the 1st to the 99th percentile. `marked` units are ringed in red and carry their number in the layer;
    `meaning` says what they are.
    """
    layers = [list(units) for _, units in groupby(sorted(graph), key=lambda unit: graph.nodes[unit]["layer"])]
    places, centres = _place(layers)
    rows = min(ROWS, max(map(len, layers)))
    width = max(x for x, _ in places.values()) + GAP
    figure = Figure(figsize=(min(26.0, max(9.0, 2.5 + width * 0.16)), 10.0), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_edges(axes, graph, places)
    size = (5.2 * min(1.0, 64 / rows + 0.35) * min(1.0, (figure.get_figwidth() - 2) * 7 / width)) ** 2
    points = np.array([places[unit] for unit in sorted(graph)])
    values = np.array([graph.nodes[unit]["weight_change"] for unit in sorted(graph)])
    low, high = np.percentile(values, [1, 99])
    dots = axes.scatter(
        points[:, 0], points[:, 1],
        c=values, s=size, cmap="viridis", norm=Normalize(low, max(high, low + 1e-6)), linewidths=0, zorder=3,
    )  # fmt: skip
    _ring(axes, graph, places, marked, size)
    for units, centre in zip(layers, centres, strict=True):
        name, kind = graph.nodes[units[0]]["name"].rpartition("[")[0], graph.nodes[units[0]]["kind"]
        label = f"{name}\n{len(units)} {kind.replace('_', ' ')}"
        axes.text(centre, -rows / 2 - 1.5, label, rotation=50, ha="right", va="top", rotation_mode="anchor", fontsize=9)
    bar = figure.colorbar(dots, ax=axes, extend="both", shrink=0.5, pad=0.01, aspect=30)
    bar.set_label("weight change")
    axes.set_title(_title(graph, len(layers), f"{len(marked):,} of them {meaning}"), loc="left", fontsize=12)
    axes.set_xlim(-GAP, width)
    axes.set_axis_off()
    figure.savefig(file, dpi=130, format="png")


def _place(layers: list[list[int]]) -> tuple[Places, list[float]]:
    """Where every unit stands, and the middle of every layer; units run down the columns of their layer."""
    places: Places = {}
    centres: list[float] = []
    left = 0.0
    for units in layers:
        columns = ceil(len(units) / ROWS)
        height = ceil(len(units) / columns)
        for number, unit in enumerate(units):
            column, row = divmod(number, height)
            places[unit] = (left + column, (height - 1) / 2 - row)
        centres.append(left + (columns - 1) / 2)
        left += columns - 1 + GAP
    return places, centres


def _draw_edges(axes: Any, graph: nx.DiGraph, places: Places) -> None:
    """The strongest edges of every layer: straight lines between layers, arcs inside one."""
    drawn: dict[tuple[str, int], list[tuple[float, float, int, int]]] = {}
    for one, two, facts in graph.edges(data=True):
        key = (facts["relation"], graph.nodes[two]["layer"])
        spread = two * 0.618034 % 1  # of equally strong edges, draw some all over the layer
        drawn.setdefault(key, []).append((-facts["weight"], spread, one, two))
    lines: dict[str, list[NDArray[np.float64]]] = {"connectivity": [], "similarity": []}
    for (relation, _), edges in drawn.items():
        for _, _, one, two in sorted(edges)[: EDGES_PER_LAYER[relation]]:
            ends = np.array([places[one], places[two]])
            lines[relation].append(ends if relation == "connectivity" else _arc(ends))
    axes.add_collection(LineCollection(lines["connectivity"], colors="#707a8a", linewidths=0.5, alpha=0.22, zorder=1))
    axes.add_collection(LineCollection(lines["similarity"], colors="#d9822b", linewidths=0.6, alpha=0.28, zorder=2))


def _arc(ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """A curve between two units of a layer that bulges to the right, shape (13, 2)."""
    t = np.linspace(0, 1, 13)[:, None]
    reach = min(1.8, 0.5 + 0.03 * float(np.abs(ends[1] - ends[0]).sum()))
    bulge: NDArray[np.float64] = ends[0] + t * (ends[1] - ends[0]) + 4 * t * (1 - t) * np.array([reach, 0.0])
    return bulge


def _ring(axes: Any, graph: nx.DiGraph, places: Places, marked: Set[int], size: float) -> None:
    if not marked:
        return
    x, y = zip(*(places[unit] for unit in sorted(marked)), strict=True)
    axes.scatter(x, y, s=3.2 * size, facecolors="none", edgecolors="#d81e2c", linewidths=1.6, zorder=4)
    for unit in sorted(marked) if len(marked) <= NUMBERED else ():
        name = graph.nodes[unit]["name"]
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        number = name.rpartition("[")[2].rstrip("]")
        axes.annotate(
            number, places[unit], (7, 5), textcoords="offset points", color="#d81e2c", fontsize=9, weight="bold",
            bbox=box, zorder=5,
        )  # fmt: skip


def _title(graph: nx.DiGraph, layers: int, marked: str) -> str:
    similar = sum(facts["relation"] == "similarity" for _, _, facts in graph.edges(data=True))
    return (
        f"{len(graph):,} units in {layers} layers, {marked} (red)\n"
        f"{similar:,} similarity edges (orange arcs), {graph.number_of_edges() - similar:,} connectivity edges "
        "(grey lines): the strongest drawn"
    )
