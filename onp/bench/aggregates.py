"""From the cells of a table to its statements: spreads, intervals, paired comparisons. Nothing is chosen by them.

Means over networks count every network once, whatever number of seeds it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, sqrt
from statistics import NormalDist, mean, median, stdev

import numpy as np

from onp.report import LABELS

MEASURES = ("ca", "ca_loss", "asr", "ra", "der", "units_pruned", "reward_evaluations", "seconds")
SUBJECT, RIVALS = "onp", ("ranked", "greedy", "random")
MAX_ASR, MAX_CA_LOSS, GOOD_DER = 0.03, 0.01, 0.95
"""the aim: an attack that hardly ever succeeds, at a price of one point of clean accuracy; a DER worth reaching"""
FEWEST = 6
"""independent differences below which nothing is significant: five of one sign still come about with p = 1 / 16"""


@dataclass(frozen=True)
class Cell:
    """One network, one seed, one method; None where a figure does not exist."""

    model: str
    seed: int
    budget: int | None
    """reward evaluations allowed; None for what uses none, which is measured once per network and seed"""
    method: str
    ca: float | None = None
    ca_loss: float | None = None
    """clean accuracy of the backdoored model less that of the purified one"""
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    units_pruned: float | None = None
    reward_evaluations: float | None = None
    seconds: float | None = None
    test_images: int = 0
    triggered_images: int = 0

    @property
    def meets_the_aim(self) -> bool:
        """Whether the attack is gone and clean accuracy is kept, up to rounding."""
        loss = self.ca_loss if self.ca_loss is not None else inf
        return self.asr is not None and self.asr <= MAX_ASR + 1e-9 and loss <= MAX_CA_LOSS + 1e-9


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; None for a single value."""

    mean: float
    std: float | None


Interval = tuple[float, float]


@dataclass(frozen=True)
class Aggregate:
    """One network and method over seeds."""

    model: str
    budget: int | None
    method: str
    seeds: int
    measures: dict[str, Spread | None]
    ca_interval: Interval | None
    """95 % for the mean, from the number of test images, which are the same for every seed"""
    asr_interval: Interval | None


@dataclass(frozen=True)
class Summary:
    """One method over networks; `der` to `worst_ca_loss` over those with a known trigger."""

    budget: int | None
    method: str
    models: int
    runs: int
    der: float | None
    """mean over networks of the mean over seeds"""
    met: int
    """runs with ASR and CA loss within the aim"""
    worst_der: float | None
    worst_run: str
    worst_ca_loss: float | None
    clean_runs: int
    clean_ca_loss: float | None
    """mean over clean networks"""
    clean_worst_ca_loss: float | None


@dataclass(frozen=True)
class Comparison:
    """DER of ONP less that of a rival, over pairs of the same network, seed and budget."""

    budget: int | None
    rival: str
    models: int
    pairs: int
    difference: float
    interval: Interval | None
    drawn: str
    """what the bootstrap draws: networks, each with all its seeds, or the seeds of a single network"""
    verdict: str
    """significantly above, significantly below, or undecided"""


@dataclass(frozen=True)
class Reach:
    """What a method needs to get to `GOOD_DER`, at the budgets measured."""

    method: str
    runs: int
    reached: int
    evaluations: float | None
    """median of what each run used at its first budget that reaches it; None where half of the runs never do"""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that exist."""
    known = [value for value in values if value is not None]
    return Spread(mean(known), stdev(known) if len(known) > 1 else None) if known else None


def written(value: Spread | None, scale: int = 1, digits: int = 2) -> str:
    """Mean ± deviation, times `scale`."""
    if value is None:
        return "-"
    text = f"{scale * value.mean:.{digits}f}"
    return text if value.std is None else f"{text} ± {scale * value.std:.{digits}f}"


def wilson(fraction: float, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial fraction of `count` trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000, confidence: float = 0.95) -> Interval:
    """Percentile interval of the mean."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (draws, len(values))).mean(1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def aggregate(cells: list[Cell]) -> list[Aggregate]:
    """Over seeds; networks in the order of their first cells, then budgets, then methods."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    groups = groupby(
        sorted(cells, key=lambda cell: (models.index(cell.model), *_rank(cell))),
        key=lambda cell: (cell.model, cell.budget, cell.method),
    )
    return [_aggregate(*key, list(members)) for key, members in groups]


def _rank(cell: Cell) -> tuple[int, int]:
    return cell.budget or 0, list(LABELS).index(cell.method)


def _aggregate(model: str, budget: int | None, method: str, cells: list[Cell]) -> Aggregate:
    measures = {name: spread(getattr(cell, name) for cell in cells) for name in MEASURES}
    ca, asr = measures["ca"], measures["asr"]
    images, triggered = max(cell.test_images for cell in cells), max(cell.triggered_images for cell in cells)
    return Aggregate(
        model, budget, method, len(cells), measures,
        wilson(ca.mean, images) if ca and images else None,
        wilson(asr.mean, triggered) if asr and triggered else None,
    )  # fmt: skip


def summarise(cells: list[Cell]) -> list[Summary]:
    """Over networks, a line for each budget and method."""
    groups = groupby(sorted(cells, key=_rank), key=lambda cell: (cell.budget, cell.method))
    return [_summary(*key, list(members)) for key, members in groups]


def _summary(budget: int | None, method: str, cells: list[Cell]) -> Summary:
    rated = [cell for cell in cells if cell.der is not None]
    clean = [cell for cell in cells if cell.ca_loss is not None and cell.asr is None]
    worst = min(rated, key=lambda cell: cell.der or 0.0, default=None)
    return Summary(
        budget, method, len({cell.model for cell in rated}), len(rated),
        _mean_of_means(rated, "der"), sum(cell.meets_the_aim for cell in rated),
        worst.der if worst else None, f"{worst.model}, seed {worst.seed}" if worst else "",
        max((cell.ca_loss for cell in rated if cell.ca_loss is not None), default=None),
        len(clean), _mean_of_means(clean, "ca_loss"),
        max((cell.ca_loss for cell in clean if cell.ca_loss is not None), default=None),
    )  # fmt: skip


def _mean_of_means(cells: list[Cell], name: str) -> float | None:
    groups = dict[str, list[float]]()
    for cell in cells:
        groups.setdefault(cell.model, []).append(getattr(cell, name))
    return mean(map(mean, groups.values())) if groups else None


def compare(cells: list[Cell]) -> list[Comparison]:
    """ONP with every rival, for each budget."""
    rated = {(cell.budget, cell.method, cell.model, cell.seed): cell.der for cell in cells if cell.der is not None}
    comparisons = []
    for budget in sorted({budget for budget, method, *_ in rated if method == SUBJECT}, key=lambda value: value or 0):
        for rival in RIVALS:
            differences = dict[str, list[float]]()
            for (size, method, model, seed), der in rated.items():
                other = rated.get((budget, rival, model, seed))
                if (size, method) == (budget, SUBJECT) and other is not None:
                    differences.setdefault(model, []).append(der - other)
            if differences:
                comparisons.append(_comparison(budget, rival, differences))
    return comparisons


def _comparison(budget: int | None, rival: str, differences: dict[str, list[float]]) -> Comparison:
    pairs = sum(map(len, differences.values()))
    if len(differences) > 1:
        kind, values = "network", [mean(values) for values in differences.values()]
    else:
        kind, (values,) = "seed", differences.values()
    interval = bootstrap(values) if len(values) > 1 else None
    verdict = "undecided"
    if len(values) >= FEWEST and interval is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "significantly above" if interval[0] > 0 else "significantly below"
    drawn = f"{len(values)} {kind}{'s' if len(values) > 1 else ''}"
    return Comparison(budget, rival, len(differences), pairs, mean(values), interval, drawn, verdict)


def reach(cells: list[Cell]) -> list[Reach]:
    """For every method that spends a budget."""
    rated = [cell for cell in sorted(cells, key=_rank) if cell.budget and cell.der is not None]
    found = []
    for method in (name for name in LABELS if any(cell.method == name for cell in rated)):
        first = dict[tuple[str, int], float]()
        for cell in (cell for cell in rated if cell.method == method):
            used = cell.reward_evaluations if (cell.der or 0) >= GOOD_DER - 1e-9 else None
            key = (cell.model, cell.seed)
            first[key] = min(first.get(key, inf), inf if used is None else used)
        middle = median(first.values())
        reached = sum(used < inf for used in first.values())
        found.append(Reach(method, len(first), reached, middle if middle < inf else None))
    return found
