"""`python -m onp.bench relearn`: statements about records worked out by hand, and a tiny run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from tiny_run import tiny_options

from onp.attacks.triggers import Trigger
from onp.bench import relearn
from onp.bench.relearn import RelearnConfig, Subject, find_runs, poisoned, run_relearn
from onp.bench.relearn_report import make_tables, markdown, steps_until, summarise
from onp.data import DefenceData
from onp.errors import CheckpointError, ConfigError
from onp.finetuning import FinetuneConfig
from onp.judge import ALL_TO_ALL
from onp.masks import masked
from onp.train import complete_run

# --- statements -----------------------------------------------------------------------------------------------


def record(method: str, asr: list[float], seed: int = 0, triggered: int = 5) -> dict[str, Any]:
    path = [{"steps": step, "ca": 0.9 - step / 100, "asr": rate} for step, rate in zip((0, 5, 20), asr, strict=True)]
    return {"run": "grid-seed0", "method": method, "triggered": triggered, "seed": seed, "path": path, "subject": ""}


def test_steps_until_the_backdoor_is_back() -> None:
    assert steps_until(record("onp", [0.0, 0.49, 0.5])) == 20
    assert steps_until(record("onp", [1.0, 0.2, 0.1])) == 0
    assert steps_until(record("onp", [0.0, 0.2, 0.49])) == inf


def test_a_summary_over_seeds() -> None:
    records = [
        record("onp", [0.0, 0.2, 0.6], 0), record("twin", [0.0, 0.1, 0.2], 0), record("onp", [0.1, 0.5, 0.8], 1),
        record("onp", [0.2, 0.2, 0.4], 2), record("onp", [0.0, 0.0, 0.0], 0, triggered=0),
    ]  # fmt: skip
    many, twin, none = summarise(records)
    assert (many["method"], many["triggered"], many["seeds"], many["steps"]) == ("onp", 5, 3, [0, 5, 20])
    assert [value.mean for value in many["asr"]] == pytest.approx([0.1, 0.3, 0.6])
    assert [value.mean for value in many["ca"]] == pytest.approx([0.9, 0.85, 0.7])
    assert many["asr_range"] == [[0.0, 0.2], [0.2, 0.5], [0.4, 0.8]]
    assert many["steps_until"] == 20, "the median of 20, 5 and never"
    assert (twin["method"], twin["steps_until"]) == ("twin", None)
    assert none["triggered"] == 0
    text = markdown([many, twin])
    assert "| ONP | 5 | 3 | 90.0 ± 0.0 | 10.0 ± 10.0 | 30.0 ± 17.3 | 60.0 ± 20.0 | 70.0 ± 0.0 |" in text
    assert "| never backdoored | 5 | 1 | 90.0 | 0.0 | 10.0 | 20.0 | 70.0 |" in text
    harmless, table = make_tables(records)
    assert list(harmless.columns[0].cells) == ["ONP"] and "0 triggered" in str(harmless.title)
    assert list(table.columns[0].cells) == ["ONP", "never backdoored"]
    assert list(table.columns[-2].cells) == ["20", "never"]


# --- what is learned from -------------------------------------------------------------------------------------


def white(target: Any) -> Trigger:
    return Trigger(target, "add", torch.ones(1, 2, 2), torch.ones(1, 2, 2))


def some_data() -> DefenceData:
    return DefenceData(torch.full((9, 1, 2, 2), 0.25), torch.arange(9) % 3, 3)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_a_few_images_are_triggered(count: int) -> None:
    data = some_data()
    taught = poisoned(data, white(1), count, seed=0)
    changed = (taught.images == 1).flatten(1).all(1)
    assert int(changed.sum()) == count and not changed[data.labels == 1].any()
    assert torch.equal(taught.labels, torch.where(changed, torch.ones_like(data.labels), data.labels))
    assert (taught.images[~changed] == 0.25).all() and (data.images == 0.25).all()


def test_which_images_are_triggered_depends_on_the_seed() -> None:
    drawn = [poisoned(some_data(), white(0), 2, seed).labels.tolist() for seed in range(6)]
    assert poisoned(some_data(), white(0), 2, 0).labels.tolist() == drawn[0]
    assert len(set(map(tuple, drawn))) > 1


def test_all_to_all_and_too_many() -> None:
    taught = poisoned(some_data(), white(ALL_TO_ALL), 9, seed=0)
    assert torch.equal(taught.labels, (torch.arange(9) + 1) % 3)
    with pytest.raises(ConfigError, match=r"--triggered 7: only 6 images"):
        poisoned(some_data(), white(1), 7, seed=0)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with stages, and beside it an entry of a network that fits and one that does not."""
    folder = tmp_path_factory.mktemp("relearn")
    options = replace(tiny_options(folder), run_dir=folder / "run", stages=("finetune",))
    complete_run(options, Console(quiet=True))
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    twin = {name: value.flip(0) if value.ndim == 4 else value for name, value in weights.items()}
    safetensors.torch.save_file({name: value.contiguous() for name, value in twin.items()}, folder / "twin.safetensors")
    (folder / "twins.json").write_text(json.dumps([
        {"name": "other", "model": "small_cnn", "checkpoint": "none", "trigger": None, "data": "images"},
        {"name": "twin", "model": "network.py:tiny", "checkpoint": "twin.safetensors", "trigger": None,
         "data": "images", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    ]))  # fmt: skip
    return folder / "run"


def small(run: Path, out: Path, **changes: Any) -> RelearnConfig:
    training = FinetuneConfig(learning_rate=0.1, batch_size=4, epochs=2, frozen=False)
    config = RelearnConfig(
        (run,), twins=(run.parent / "twins.json",), methods=("backdoored", "onp", "onp_held", "onp_finetuned"),
        triggered=(0, 3), seeds=(0, 1), steps=(1, 4), images=100, out=out, training=training,
    )  # fmt: skip
    return replace(config, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


def test_it_begins_with_the_figures_of_the_report_and_goes_on(run: Path, tmp_path: Path) -> None:
    config = small(run, tmp_path / "out")
    run_relearn(config)
    before = contents(config.out)
    assert (config.out / "relearn.png").read_bytes()[:4] == b"\x89PNG"
    report = {row["method"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    records = json.loads(before["relearn.json"])["records"]
    methods = (*config.methods, "twin")
    assert [(r["method"], r["triggered"], r["seed"]) for r in records] == [
        (method, count, seed) for method in methods for count in (0, 3) for seed in (0, 1)
    ]
    for item in records:
        assert [point["steps"] for point in item["path"]] == [0, 1, 4]
        if item["method"] != "twin":
            row = report[item["method"].removesuffix("_held")]
            assert (item["path"][0]["ca"], item["path"][0]["asr"]) == (row["ca"], row["asr"])
    assert len({str(item["path"]) for item in records}) > 4, "nothing is learned, or the same by all"
    lost = config.out / "run" / "onp-3-seed1.json"
    kept = {path: path.stat().st_mtime_ns for path in config.out.glob("run/*.json") if path != lost}
    lost.unlink()
    run_relearn(config)
    assert contents(config.out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there is measured again"
    with pytest.raises(ConfigError, match="another network or other options"):
        run_relearn(small(run, config.out, images=11))


def test_twins_that_fit_no_run_or_cannot_be_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = json.loads((run.parent / "twins.json").read_text())[1]
    few = {"methods": ("onp",), "triggered": (0,), "seeds": (0,), "twins": (run.parent / "twin.json",)}
    (run.parent / "twin.json").write_text(json.dumps([{**twin, "model": "small_cnn"}]))
    run_relearn(small(run, tmp_path / "out", **few))
    assert "run: none of --twins is such a network" in capsys.readouterr().out
    (run.parent / "twin.json").write_text(json.dumps([{**twin, "checkpoint": "twins.json"}]))
    with pytest.raises(CheckpointError, match="twins.json is not a file of plain weights"):
        run_relearn(small(run, tmp_path / "out", **few))


def test_records_are_of_one_run(run: Path) -> None:
    config = small(run, run)
    subject, other = (Subject(find_runs((run,))[0], []) for _ in range(2))
    assert subject.key("backdoored", config) == other.key("backdoored", config)
    other.config = replace(other.config, seed=1)
    assert subject.key("backdoored", config) != other.key("backdoored", config)


def test_networks_that_learn(run: Path) -> None:
    """The twin has weights of its own; held units are the mask's, and else every unit may learn."""
    config = small(run, run)
    subject = Subject(find_runs((run.parent,))[0], relearn.read_suites(config.twins))
    inputs = subject.data.inputs
    mask = subject.folder.load_mask("onp", subject.index)
    assert mask is not None
    with torch.no_grad():
        expected = copy.deepcopy(subject.own.model)
        with masked(expected, mask):
            for method in ("onp", "onp_held"):
                network, held = subject.learner(method)
                assert torch.equal(network(inputs), expected(inputs))
                assert held.pruned == (mask.pruned if method == "onp_held" else frozenset())
        twin, _ = subject.learner("twin")
        assert subject.judges[True].inputs.config.mean == (0.5, 0.5, 0.5)
    own = safetensors.torch.load_file(run.parent / "weights.safetensors")["0.weight"]
    assert torch.equal(twin.get_parameter("0.weight"), own.flip(0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ("onp", "twin")}, "--methods twin"),
        ({"methods": ("onp_gated",)}, "--methods onp_gated"),
        ({"triggered": ()}, "--triggered"),
        ({"triggered": (3, 3)}, "--triggered 3 3"),
        ({"steps": (0, 5)}, "--steps 0 5"),
        ({"steps": (1, 400)}, "--steps 400: the training takes"),
        ({"images": 9}, "--images 9"),
        ({"methods": ("rnp_removal",)}, "no mask of 'rnp_removal'"),
        ({"triggered": (9,)}, "--triggered 9: only 8"),
    ],
)
def test_what_makes_no_sense_is_said(run: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run_relearn(small(run, tmp_path, **changes))
    assert not contents(tmp_path)


def test_runs_are_looked_for(run: Path, tmp_path: Path) -> None:
    assert [folder.path for folder in find_runs((run,))] == [run.resolve()]
    with pytest.raises(ConfigError, match="no finished run"):
        find_runs((tmp_path,))
    with pytest.raises(ConfigError, match="run comes more than once"):
        find_runs((run, run.parent))
