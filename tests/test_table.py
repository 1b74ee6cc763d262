"""`python -m onp.bench table` and `terms`: suites, statements about cells worked out by hand, and tiny networks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import onp.bench.table
from envs.pruning import PruningEnv
from onp.bench import __main__ as bench
from onp.bench.aggregates import Cell, aggregate, bootstrap, compare, reach, spread, summarise, wilson
from onp.bench.suite import read_suites
from onp.bench.verdicts import Verdict, detections
from onp.errors import ConfigError
from onp.evaluate import EvaluateConfig, evaluate
from onp.judge import Measurement, Target
from onp.masks import KeepMask
from onp.report import LABELS
from onp.run_folder import RunFolder
from onp.train import UNSPENDING

NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
"""
ENTRY: dict[str, Any] = {
    "name": "tiny", "model": "network.py:tiny", "checkpoint": "tiny.safetensors", "trigger": "trigger.json",
    "data": "images",
}  # fmt: skip
BUDGETS = (12, 24)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- suites ---------------------------------------------------------------------------------------------------


def test_paths_of_a_suite_are_relative_to_its_file(tmp_path: Path) -> None:
    named = {**ENTRY, "name": "named", "model": "small_cnn", "data": "cifar10", "trigger": None, "mean": [0.5, 1, 0.25]}
    sized = {**ENTRY, "name": "sized", "checkpoint": "/elsewhere/w.pth", "image_size": 8, "num_classes": None}
    tiny, second, third = read_suites([write(tmp_path / "suite.json", [ENTRY, named, sized])])
    assert tiny.model == f"{tmp_path}/network.py:tiny" and tiny.data == f"{tmp_path}/images"
    assert (tiny.checkpoint, tiny.trigger) == (tmp_path / "tiny.safetensors", tmp_path / "trigger.json")
    assert (tiny.mean, tiny.std, tiny.image_size, tiny.num_classes) == ((), (), None, None)
    assert (second.model, second.data, second.trigger, second.mean) == ("small_cnn", "cifar10", None, (0.5, 1.0, 0.25))
    assert (third.checkpoint, third.image_size, third.num_classes) == (Path("/elsewhere/w.pth"), 8, None)


def test_an_entry_is_a_folder_that_may_hold_more(tmp_path: Path) -> None:
    entry = {"name": "zoo", "model": "small_cnn", "data": "gtsrb", "mean": [0.5] * 3, "accuracy": 0.9}
    write(tmp_path / "a" / "entry.json", entry)
    write(tmp_path / "a" / "trigger.json", "{}")
    clean = write(tmp_path / "b" / "entry.json", {**entry, "name": "clean"})
    first, second = read_suites([tmp_path / "a", clean])
    assert (first.name, first.checkpoint, first.trigger, first.mean) == (
        "zoo", tmp_path / "a" / "model.safetensors", tmp_path / "a" / "trigger.json", (0.5, 0.5, 0.5),
    )  # fmt: skip
    assert (second.name, second.checkpoint, second.trigger) == ("clean", clean.with_name("model.safetensors"), None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[", "readable JSON"),
        ([], "no network"),
        (3, "expected an object"),
        ([ENTRY, 3], "network 2: expected an object"),
        ([{key: value for key, value in ENTRY.items() if key != "trigger"}], "lacks trigger"),
        ({"name": "zoo", "model": "small_cnn"}, "lacks data"),
        ([{**ENTRY, "means": [1]}], "has means"),
        ([{**ENTRY, "name": "../up"}], "'../up'"),
        ([{**ENTRY, "data": None}], "data is None"),
        ([{**ENTRY, "checkpoint": 3}], "checkpoint is 3"),
        ([{**ENTRY, "trigger": True}], "trigger is True"),
        ([{**ENTRY, "mean": 0.5}], "mean is 0.5"),
        ([{**ENTRY, "std": ["1"]}], "std is ['1']"),
        ([{**ENTRY, "image_size": 0}], "image_size is 0"),
        ([ENTRY, ENTRY], "tiny comes more than once"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(content: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_suites([write(tmp_path / "suite.json", content)])
    assert expected in str(error.value)


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="readable JSON"):
            read_suites([path])


# --- statements -----------------------------------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network, a tiny image folder and a trigger; a suite with a clean network and one without weights."""
    folder = tmp_path_factory.mktemp("suite")
    write(folder / "network.py", NETWORK)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    safetensors.torch.save_file(network.state_dict(), folder / "tiny.safetensors")
    for split in ("train", "test"):
        for number in range(13):
            path = folder / "images" / split / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    Image.new("RGB", (8, 8), "white").save(folder / "patch.png")
    write(folder / "trigger.json", {"target": 1, "mode": "add", "pattern": "patch.png"})
    broken = {**ENTRY, "name": "broken", "checkpoint": "later.safetensors"}
    write(folder / "suite.json", [broken, ENTRY, {**ENTRY, "name": "clean", "trigger": None}])
    return folder


def call(folder: Path, out: Path, *extra: str) -> tuple[int, str, str]:
    """The command inside this process: exit code, stdout, stderr."""
    small = (
        "--purify.finalists 2 --purify.env.max-steps 2 --purify.env.recovery.steps 2 --purify.env.unlearn.max-epochs 1"
    )
    arguments = ["--models", str(folder / "suite.json"), "--out", str(out), "--defence-size", "9", "--threads", "1"]
    stdout, stderr, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["onp.bench", "table", *arguments, *small.split(), "--seeds", "0", *extra])
        with pytest.raises(SystemExit) as stop:
            bench.main()
    torch.set_num_threads(threads)
    return int(stop.value.code or 0), stdout.getvalue(), stderr.getvalue()


BOTH = ("--budgets", *map(str, BUDGETS))


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The table of the suite, one of whose networks fails, and what was printed."""
    out = tmp_path_factory.mktemp("table") / "out"
    code, printed, err = call(folder, out, *BOTH)
    assert (code, err) == (1, "")
    return out, printed


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table(out: Path) -> dict[str, Any]:
    return json.loads((out / "table.json").read_text())  # type: ignore[no-any-return]


def test_cells_are_the_rows_of_the_runs(made: tuple[Path, str]) -> None:
    out, _ = made
    runs = {path.name for path in out.iterdir() if path.is_dir()} - {"plots"}
    assert runs == {f"{name}-seed0-budget{budget}" for name in ("tiny", "clean") for budget in BUDGETS}
    cells = {(cell["model"], cell["budget"], cell["method"]): cell for cell in table(out)["cells"]}
    searches = [(budget, method) for budget in BUDGETS for method in ("random", "ranked", "greedy", "onp", "onp_gated")]
    others = [(None, method) for method in ("backdoored", "rnp", "rnp_oracle")]
    assert set(cells) == {(name, *key) for name in ("tiny", "clean") for key in searches + others}
    assert len(table(out)["cells"]) == len(cells)
    for (name, budget, method), cell in cells.items():
        report = json.loads((out / f"{name}-seed0-budget{budget or BUDGETS[0]}" / "report.json").read_text())
        rows = {row["method"]: row for row in report["rows"]}
        assert report["evidence_of_a_backdoor"] == (report["probability_of_a_backdoor"] >= 0.5)
        rows["onp_gated"] = rows["onp" if report["evidence_of_a_backdoor"] else "backdoored"]
        figures = ("ca", "asr", "ra", "der", "units_pruned", "reward_evaluations", "seconds")
        assert [cell[figure] for figure in figures] == [rows[method][figure] for figure in figures]
        if cell["ca"] is not None:
            assert cell["ca_loss"] == pytest.approx(rows["backdoored"]["ca"] - cell["ca"], abs=1e-12)
        assert (cell["test_images"], cell["triggered_images"]) == (13, 9 if name == "tiny" else 0)
        assert (cell["asr"] is None) == (name == "clean")


def test_what_no_budget_changes_is_done_once(made: tuple[Path, str]) -> None:
    """To the second: RNP's seconds too are those of the first budget's run."""
    for name in ("subject.json", "methods/rnp.json", "masks/rnp.json", "methods/rnp_oracle.json"):
        first, second = ((made[0] / f"tiny-seed0-budget{budget}" / name).read_bytes() for budget in BUDGETS)
        assert first == second


def test_only_what_a_run_of_the_same_subject_found_is_copied(made: tuple[Path, str], tmp_path: Path) -> None:
    source = RunFolder(made[0] / f"tiny-seed0-budget{BUDGETS[0]}")
    same = json.loads(source.file("subject.json").read_text())["sha256"]
    for subject, copied in (("another", set[str]()), (same, {"rnp", "rnp_oracle"})):
        folder = RunFolder(tmp_path / subject)
        folder.bind(subject)
        folder.adopt(source, UNSPENDING)
        assert {method for method in LABELS if folder.has(method)} == copied
        assert folder.file("rnp_mask_values.safetensors").exists() == bool(copied)
        assert json.loads(folder.file("subject.json").read_text()) == {"sha256": subject}
    mine = folder.file("methods", "rnp.json")
    mine.write_text("{}")
    folder.adopt(source, UNSPENDING)
    assert mine.read_text() == "{}", "what is there stays"


def test_stages_of_finished_runs_are_done_once_too(made: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    call(folder, out, *BOTH, "--stages", "finetune")
    for name in ("methods/rnp_finetuned.json", "stages/rnp_finetuned.safetensors"):
        first, second = ((out / f"tiny-seed0-budget{budget}" / name).read_bytes() for budget in BUDGETS)
        assert first == second


def test_verdicts_are_those_of_the_runs_once_a_network_and_seed(made: tuple[Path, str]) -> None:
    out, printed = made
    lines = (out / "table.md").read_text().splitlines()
    shown = lines[lines.index("## Is there a backdoor?") :]
    assert [item["model"] for item in table(out)["verdicts"]] == ["tiny", "clean"]
    for item, (name, truth) in zip(table(out)["verdicts"], (("tiny", "class 1"), ("clean", "clean")), strict=True):
        report = json.loads((out / f"{name}-seed0-budget{BUDGETS[0]}" / "report.json").read_text())
        assert item["truth"] == (1 if name == "tiny" else None)
        assert item["probability"] == report["probability_of_a_backdoor"]
        assert item["found"] in (None, "all-to-all", report["suspect_class"])
        assert (item["found"] is not None) == report["evidence_of_a_backdoor"]
        assert any(line.startswith(f"| {name} | {truth} | 1 | {item['probability']:.2f} |") for line in shown)
    assert "Is there a backdoor?" in printed


def test_a_failure_is_part_of_the_table(made: tuple[Path, str]) -> None:
    out, printed = made
    record, text = table(out), (out / "table.md").read_text()
    assert record["pending_runs"] == 0
    assert [(item["model"], item["budget"]) for item in record["failures"]] == [("broken", 12), ("broken", 24)]
    for item in record["failures"]:
        assert "later.safetensors" in item["error"] and item["error"] in text and not item["traceback"]
    assert "broken-seed0-budget12: failed:" in " ".join(printed.split()) and "Traceback" not in printed


def test_the_markdown_holds_every_method_and_the_plots_are_drawn(made: tuple[Path, str]) -> None:
    out, printed = made
    lines = (out / "table.md").read_text().splitlines()
    tiny = lines[lines.index("## tiny") : lines.index("## clean")]
    for cell in table(out)["cells"]:
        if cell["model"] == "tiny" and cell["method"] == "onp":
            (line,) = (line for line in tiny if line.startswith(f"| ONP | {cell['budget']} | 1 |"))
            assert f"| {100 * cell['ca']:.1f} | [" in line and f"| {cell['der']:.3f} |" in line
    for heading in ("## tiny", "## clean", "## Clean networks", "## Failed runs"):
        assert heading in lines
    for name in ("der", "ca_loss_asr"):
        assert any(f"(plots/{name}.png)" in line for line in lines)
        with Image.open(out / "plots" / f"{name}.png") as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 200
    assert "one-shot ranking" in printed and str(out / "table.md") in printed


def test_every_run_is_an_ordinary_run_folder(made: tuple[Path, str]) -> None:
    out, _ = made
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate(EvaluateConfig(out / "tiny-seed0-budget12")) == 0


@pytest.fixture
def later(folder: Path) -> Iterator[Path]:
    """The weights that were missing."""
    path = folder / "later.safetensors"
    path.write_bytes((folder / "tiny.safetensors").read_bytes())
    yield path
    path.unlink()


def test_the_same_command_tries_again_what_failed_and_nothing_else(
    made: tuple[Path, str], folder: Path, later: Path
) -> None:
    out, _ = made
    before = {path: data for path, data in contents(out).items() if "seed0" in path}
    code, printed, err = call(folder, out, *BOTH)
    assert (code, err) == (0, "")
    after = contents(out)
    assert {path: after[path] for path in before} == before
    assert "broken-seed0-budget24: ONP" in printed and "tiny-seed0" not in printed
    assert not table(out)["failures"] and "Failed" not in (out / "table.md").read_text()
    tiny, broken = ([c for c in table(out)["cells"] if c["model"] == name] for name in ("tiny", "broken"))
    assert [{**cell, "seconds": 0, "model": ""} for cell in tiny] == [{**c, "seconds": 0, "model": ""} for c in broken]
    assert table(out)["comparisons"][0]["drawn"] == "2 networks"
    assert call(folder, out, *BOTH)[0] == 0
    assert {path: data for path, data in contents(out).items() if "seed0" in path} == {
        path: data for path, data in after.items() if "seed0" in path
    }


def test_other_options_on_the_same_folder_are_refused(made: tuple[Path, str], folder: Path) -> None:
    out, _ = made
    before = contents(out)
    code, _, err = call(folder, out, *BOTH, "--purify.rnp.max-accuracy-drop", "0.5")
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "max_accuracy_drop" in err and "--out" in err
    assert contents(out) == before


def test_any_exception_is_the_matter_of_its_run(
    made: tuple[Path, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, seen = onp.bench.table.complete_run, list[set[str]]()

    def failing(options: Any, console: Any, journal_dir: Path, others: Any) -> Any:
        if options.run_dir.name.startswith("clean"):
            seen.append({cell["model"] for cell in table(tmp_path)["cells"]})
            raise RuntimeError("CUDA out\nof memory")
        return complete(
            replace(options, run_dir=made[0] / f"{options.run_dir.name}-budget12", budget=12), console, None
        )

    monkeypatch.setattr(onp.bench.table, "complete_run", failing)
    code, printed, err = call(folder, tmp_path, "--purify.budget", "12")
    assert (code, err) == (1, "")
    clean = next(item for item in table(tmp_path)["failures"] if item["model"] == "clean")
    assert clean["error"] == "RuntimeError: CUDA out of memory" and "Traceback" in clean["traceback"]
    assert "Traceback" not in printed
    assert len(seen) == 1 and "tiny" in seen[0], "the table is not written behind every run"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--purify.seed 3", "--seeds"),
        ("--budgets 24 7", "--budget 7"),
        ("--budgets 12 12", "--budgets 12 12"),
        ("--seeds 1 1", "--seeds 1 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(
    extra: str, expected: str, folder: Path, tmp_path: Path
) -> None:
    code, _, err = call(folder, tmp_path / "out", *extra.split())
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and expected in err
    assert not (tmp_path / "out").exists()


def test_a_table_that_cannot_be_written(folder: Path) -> None:
    code, _, err = call(folder, folder / "patch.png")
    assert code == 2 and err.startswith("error: --out") and len(err.splitlines()) == 1


def test_an_unknown_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["onp.bench", "chair"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and "engine, networks, table" in capsys.readouterr().err


# --- what rewards predict -------------------------------------------------------------------------------------


def terms(folder: Path, *extra: str) -> tuple[int, str, str]:
    small = "--env.max-steps 2 --env.recovery.steps 2 --env.unlearn.max-epochs 1 --threads 1"
    stdout, stderr, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["onp.bench", "terms", "--defence-size", "9", *small.split(), *extra])
        with pytest.raises(SystemExit) as stop:
            bench.main()
    torch.set_num_threads(threads)
    return int(stop.value.code or 0), stdout.getvalue(), stderr.getvalue()


def test_terms_are_ranked_against_the_attack_success_rate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The success rates are given: the cube of what fidelity loses, so that its ranks are those of minus ASR."""
    seen: list[dict[str, float]] = []
    pruned: list[list[int]] = [[], [0], [1], [2], [3], [0, 1], [2, 9], [5, 6, 7]]

    def search(env: PruningEnv, budget: int, seed: int, progress: Any) -> None:
        seen[:] = []
        for units in pruned:
            score = env.objective.score(env.objective.all_kept.without(units))
            seen.append({**score.terms, "potential": score.potential})

    def judge(mask: KeepMask, images: int) -> Measurement:
        terms = seen[pruned.index((~mask.keep).nonzero().flatten().tolist())]
        return Measurement(0.5, -(terms["clean_fidelity"] ** 3), 0.0)

    monkeypatch.setattr("onp.bench.terms.SEARCHES", {"random": search, "greedy": search})
    monkeypatch.setattr("onp.bench.terms.Judge", lambda inputs, trigger: judge)
    models = ("--models", str(folder / "two.json"), "--json", str(tmp_path / "terms.json"))
    write(folder / "two.json", [ENTRY, {**ENTRY, "name": "clean", "trigger": None}])
    code, printed, err = terms(folder, *models)
    assert (
        (code, err) == (0, "") and "tiny" in printed and "clean " not in printed.partition("\n")[2].partition("\n")[2]
    )
    (record,) = json.loads((tmp_path / "terms.json").read_text())
    assert (record["network"], record["masks"]) == ("tiny", 8)
    assert record["clean_fidelity"] == pytest.approx(1)
    for name in ("clean_accuracy", "unlearning", "trigger_resistance", "potential"):
        column, fidelity = ([values[key] for values in seen] for key in (name, "clean_fidelity"))
        if len(set(column)) == 1:
            assert record[name] is None
        else:
            assert record[name] == pytest.approx(np.corrcoef(ranks(column), ranks(fidelity))[0, 1])


def ranks(values: list[float]) -> list[float]:
    """Ranks, those of equal values averaged."""
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


@pytest.mark.parametrize(
    ("extra", "named"),
    [(("--masks", "9"), "--masks 9"), ((), "no network with a trigger")],
)
def test_terms_refuse_what_they_cannot_do(folder: Path, tmp_path: Path, extra: tuple[str, ...], named: str) -> None:
    write(folder / "harmless.json", [{**ENTRY, "name": "clean", "trigger": None}])
    code, _, err = terms(folder, "--models", str(folder / "harmless.json"), "--json", str(tmp_path / "t.json"), *extra)
    assert code == 2 and named in err and not (tmp_path / "t.json").exists()
