"""`python -m onp.bench table` and `terms` on tiny networks."""

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
from documented import undocumented
from PIL import Image
from torch import nn

import onp.bench.table
from envs.pruning import PruningEnv
from onp.bench import __main__ as bench
from onp.evaluate import EvaluateConfig, evaluate
from onp.judge import Measurement
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
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["onp.bench", "table", *arguments, *small.split(), "--seeds", "0", *extra])
        with pytest.raises(SystemExit) as stop:
            bench.main()
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
    assert not undocumented("table.json", table(out))
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


def test_a_damaged_report_is_the_matter_of_its_run_alone(made: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    (out / f"tiny-seed0-budget{BUDGETS[0]}" / "report.json").write_text("{")
    assert call(folder, out, *BOTH)[::2] == (1, "")
    failures = {(item["model"], item["budget"]): item["error"] for item in table(out)["failures"]}
    assert "report.json is no readable JSON" in failures.pop(("tiny", BUDGETS[0]))
    assert set(failures) == {("broken", budget) for budget in BUDGETS}
    assert ("tiny", BUDGETS[1], "onp") in {
        (cell["model"], cell["budget"], cell["method"]) for cell in table(out)["cells"]
    }


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
    small = "--env.max-steps 2 --env.unlearn.max-epochs 1 --threads 1"
    small += "".join(f" --env.{family}.steps 2" for family in ("recovery", "warp", "wave"))
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["onp.bench", "terms", "--defence-size", "9", *small.split(), *extra])
        with pytest.raises(SystemExit) as stop:
            bench.main()
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
