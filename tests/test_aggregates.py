"""Statements about the cells of a table, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from onp.bench.aggregates import Cell, aggregate, bootstrap, compare, reach, spread, summarise, wilson
from onp.bench.verdicts import Verdict, detections
from onp.judge import Target


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(hits: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3."""
    assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


def rated(model: str, seed: int, method: str, der: float | None, budget: int | None = 100, **figures: Any) -> Cell:
    return Cell(model, seed, budget, method, der=der, **figures)


def test_spreads_leave_out_what_does_not_exist() -> None:
    assert spread([None, None]) is None
    one, three = spread([2.0, None]), spread([1.0, 2.0, 6.0])
    assert one is not None and (one.mean, one.std) == (2.0, None)
    assert three is not None and three.mean == 3.0 and three.std == pytest.approx(7**0.5)


def test_aggregates_over_seeds() -> None:
    images = {"test_images": 263, "triggered_images": 20}
    cells = [
        rated("b", 0, "onp", 0.9, ca=80 / 263, asr=0.0, **images),
        rated("b", 0, "rnp", 0.5, None, ca=0.5, asr=1.0, **images),
        rated("b", 1, "onp", 0.7, ca=82 / 263, asr=0.0, **images),
        rated("b", 0, "onp", 0.8, 50, ca=0.5, asr=0.5, **images),
        rated("a", 0, "onp", None, ca=None),
    ]
    found = aggregate(cells)
    assert [(item.model, item.budget, item.method, item.seeds) for item in found] == [
        ("b", None, "rnp", 1), ("b", 50, "onp", 1), ("b", 100, "onp", 2), ("a", 100, "onp", 1),
    ]  # fmt: skip
    both, nothing = found[2], found[3]
    der = both.measures["der"]
    assert der is not None and der.mean == pytest.approx(0.8) and der.std == pytest.approx(0.02**0.5)
    assert both.ca_interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert both.asr_interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert nothing.measures["ca"] is nothing.ca_interval is nothing.asr_interval is None


def test_a_summary_counts_every_network_once() -> None:
    cells = [
        rated("a", 0, "onp", 0.9, asr=0.03, ca_loss=0.847 - 0.837),  # the aim, but for rounding
        rated("a", 1, "onp", 0.7, asr=0.031, ca_loss=0.0),
        rated("a", 2, "onp", 0.8, asr=0.0, ca_loss=0.02),
        rated("b", 0, "onp", 0.6, asr=0.0, ca_loss=-0.01),
        rated("c", 0, "onp", None, ca_loss=0.04),
        rated("c", 1, "onp", None, ca_loss=0.0),
        rated("d", 0, "onp", None, ca_loss=-0.01),
        rated("d", 0, "rnp", None, None, ca=None),
    ]
    nothing, found = summarise(cells)
    assert (nothing.method, nothing.runs, nothing.clean_runs, nothing.der, nothing.clean_ca_loss) == (
        "rnp",
        0,
        0,
        None,
        None,
    )
    assert (found.models, found.runs, found.met) == (2, 4, 2)
    assert found.der == pytest.approx((0.8 + 0.6) / 2)
    assert (found.worst_der, found.worst_run, found.worst_ca_loss) == (0.6, "b, seed 0", 0.02)
    assert (found.clean_runs, found.clean_worst_ca_loss) == (3, 0.04)
    assert found.clean_ca_loss == pytest.approx((0.02 - 0.01) / 2)


def test_bootstrap_intervals() -> None:
    assert bootstrap([0.25] * 4) == (0.25, 0.25)
    assert bootstrap([0.0, 1.0]) == (0.0, 1.0), "a quarter of the draws is all zeros, another all ones"
    values = [float(number) for number in range(100)]
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    deviation = (sum((value - 49.5) ** 2 for value in values) / 100) ** 0.5 / 10
    assert bootstrap(values) == pytest.approx((49.5 - 1.96 * deviation, 49.5 + 1.96 * deviation), abs=0.3)


def pairs(differences: dict[str, list[float]], budget: int = 100) -> list[Cell]:
    return [
        rated(model, seed, method, 0.8 + part * value, budget)
        for model, values in differences.items()
        for seed, value in enumerate(values)
        for method, part in (("onp", 0.5), ("greedy", -0.5))
    ]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.01, 0.02, 0.01, 0.03, 0.01, 0.02], "significantly above"),
        ([-0.01, -0.02, -0.01, -0.03, -0.01, -0.02], "significantly below"),
        ([0.01, -0.02, 0.01, -0.03, 0.03, 0.02], "undecided"),
        ([0.01, 0.02, 0.01, 0.03, 0.01], "undecided"),
    ],
)
def test_the_verdict_of_a_comparison(values: list[float], verdict: str) -> None:
    (by_network,) = compare(pairs({f"network{number}": [value] for number, value in enumerate(values)}))
    (by_seed,) = compare(pairs({"one": values}))
    for found, drawn in ((by_network, "networks"), (by_seed, "seeds")):
        assert (found.verdict, found.drawn, found.pairs) == (verdict, f"{len(values)} {drawn}", len(values))
        assert found.difference == pytest.approx(sum(values) / len(values))
        assert found.interval is not None and found.interval[0] <= found.difference <= found.interval[1]
    assert by_network.interval == by_seed.interval


def test_pairs_share_network_seed_and_budget() -> None:
    cells = [*pairs({"a": [0.1, 0.3], "b": [0.6]}), *pairs({"a": [-0.2]}, budget=50)]
    cells += [rated("a", 7, "onp", 0.1), rated("b", 8, "greedy", 0.1), rated("c", 0, "onp", 0.1, 50)]
    cells += [rated("c", 0, "greedy", None, 50), rated("c", 0, "rnp", 0.9, None)]
    small, large = compare(cells)
    assert (small.budget, small.rival, small.models, small.pairs, small.drawn) == (50, "greedy", 1, 1, "1 seed")
    assert small.difference == pytest.approx(-0.2) and (small.interval, small.verdict) == (None, "undecided")
    assert (large.budget, large.rival, large.models, large.pairs, large.drawn) == (100, "greedy", 2, 3, "2 networks")
    assert large.difference == pytest.approx((0.2 + 0.6) / 2)
    assert large.interval == pytest.approx((0.2, 0.6)), "a network is drawn with all its seeds"


def test_evaluations_to_reach_a_good_rating() -> None:
    def cell(model: str, budget: int, der: float, used: int, method: str = "onp") -> Cell:
        return rated(model, 0, method, der, budget, reward_evaluations=used)

    cells = [
        cell("a", 500, 0.99, 480), cell("a", 50, 0.96, 47), cell("b", 50, 0.9, 50), cell("b", 500, 0.95, 490),
        cell("c", 50, 0.5, 50), cell("c", 500, 0.94, 500), cell("a", 50, 0.94, 50, "random"),
        rated("a", 0, "rnp", 0.99, None, reward_evaluations=0),
    ]  # fmt: skip
    random, agent = reach(cells)
    assert (random.method, random.runs, random.reached, random.evaluations) == ("random", 1, 0, None)
    assert (agent.method, agent.runs, agent.reached, agent.evaluations) == ("onp", 3, 2, 490)


def test_verdicts_over_seeds_and_over_networks() -> None:
    def verdict(model: str, seed: int, truth: Target | None, probability: float, suspect: int | None) -> Verdict:
        report = {
            "suspect_class": suspect, "probability_of_a_backdoor": probability,
            "evidence_of_a_backdoor": probability >= 0.5,
        }  # fmt: skip
        return Verdict.of(model, seed, truth, report)

    found = detections([
        verdict("a", 0, 3, 0.9, 3), verdict("b", 0, "all-to-all", 0.8, None), verdict("c", 0, None, 0.1, 7),
        verdict("a", 1, 3, 0.7, 4), verdict("b", 1, "all-to-all", 0.3, None), verdict("c", 1, None, 0.6, 7),
        verdict("a", 2, 3, 0.2, 3),
    ])  # fmt: skip
    assert [(item.name, item.truth, item.runs, item.found, item.right) for item in found] == [
        ("a", "class 3", 3, 2, 1), ("b", "all-to-all", 2, 1, 1), ("c", "clean", 2, 1, 1),
        ("all backdoored", "", 5, 3, 2), ("all clean", "", 2, 1, 1),
    ]  # fmt: skip
    assert found[0].probability.mean == pytest.approx(0.6) and found[3].probability.mean == pytest.approx(0.58)
    assert found[0].probability.std == pytest.approx(0.13**0.5)
