"""The commands from end to end: a small backdoored network, its run folder, and what the report says about it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import safetensors.torch
import torch
from documented import undocumented
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from onp.attacks.__main__ import AttackConfig, attack
from onp.commands import run_command
from onp.evaluate import EvaluateConfig, evaluate
from onp.masks import KeepMask, masked
from onp.train import TrainConfig, train
from onp.units import index_units

ROWS = ["backdoored", "rnp", "rnp_oracle", "random", "ranked", "greedy", "onp"]
DEFENCES = [name for name in ROWS if name not in ("backdoored", "rnp_oracle")]
KEYS = {"method", "ca", "asr", "ra", "der", "units_pruned", "reward_evaluations", "seconds"}
TARGET, MEAN, STD, BUDGET = 3, 0.5, 0.25, 20
NORMALISATION = ["--mean", *[str(MEAN)] * 3, "--std", *[str(STD)] * 3]
NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10))

def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10))
"""


@dataclass(frozen=True)
class Patient:
    """Files of the network under treatment, and the command's options for it."""

    folder: Path

    @property
    def network(self) -> nn.Module:
        module = runpy.run_path(str(self.folder / "network.py"))["tiny"]()
        module.load_state_dict(safetensors.torch.load_file(self.folder / "backdoored" / "backdoored.safetensors"))
        return module.eval()

    @property
    def trigger(self) -> list[str]:
        return ["--trigger", str(self.folder / "backdoored" / "trigger.json")]

    def options(self, data: str = "images", function: str = "tiny", weights: str = "backdoored") -> list[str]:
        checkpoint = self.folder / weights / "backdoored.safetensors"
        model = f"{self.folder / 'network.py'}:{function}"
        return ["--model", model, "--checkpoint", str(checkpoint), "--data", str(self.folder / data),
                "--defence-size", "50", *NORMALISATION]  # fmt: skip

    def job(self, run: Path, *extra: str, budget: int = BUDGET, **options: str) -> list[str]:
        small = f"--budget {budget} --finalists 4 --env.max-steps 4 --env.recovery.steps 10 --threads 1".split()
        small += [
            "--always",
            "--env.reward.clean-fidelity",
            "0.05",
        ]  # so cheap that masks prune something in so short a job
        return [*self.options(**options), "--run-dir", str(run), *small, *extra]


def start(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def call(config: type[Any], job: Any, arguments: list[str]) -> tuple[int, str, str]:
    """The command inside this process, since importing takes longer than the job: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_command(config, job, "command")
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def rows_of(run: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((run / "report.json").read_text())["rows"]}


def read_test_images(folder: Path) -> tuple[Tensor, Tensor]:
    """All test images in [0, 1] and their labels, read without the package."""
    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in (folder / "train").iterdir())):
        for path in sorted((folder / "test" / name).iterdir()):
            images.append(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def figures(model: nn.Module, patient: Patient) -> tuple[float, float, float]:
    """CA, ASR and RA, computed here from images, arrays and logits."""
    images, labels = read_test_images(patient.folder / "images")
    folder = patient.folder / "backdoored"
    spec = json.loads((folder / "trigger.json").read_text())
    pattern, mask = (torch.from_numpy(np.load(folder / spec[name])) for name in ("pattern", "mask"))
    assert spec["mode"] == "blend" and spec["alpha"] == 1 and spec["target"] == TARGET
    with torch.no_grad():
        clean, triggered = (
            model((batch - MEAN) / STD).argmax(1) for batch in (images, torch.where(mask > 0, pattern, images))
        )
    others = labels != TARGET
    right = triggered[others] == labels[others]
    return tuple(float(hits.double().mean()) for hits in (clean == labels, triggered[others] == TARGET, right))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """Digits as an image folder, and a tiny network backdoored on them by `python -m onp.attacks`."""
    folder = tmp_path_factory.mktemp("patient")
    (folder / "network.py").write_text(NETWORK)
    digits = load_digits()
    for label in range(10):
        for number, image in enumerate(digits.images[digits.target == label][:60]):
            path = folder / "images" / ("train" if number < 40 else "test") / f"digit{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).astype(np.uint8)).convert("RGB").save(path)
    done = start(
        "onp.attacks", "--model", f"{folder / 'network.py'}:tiny", "--data", str(folder / "images"), *NORMALISATION,
        "--out", str(folder / "backdoored"), "--training.target", str(TARGET), "--threads", "1",
        "--defence-size", "50",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Patient(folder)


@pytest.fixture(scope="module")
def run(patient: Patient) -> Path:
    """The run folder of the whole job, made by the real command."""
    folder = patient.folder / "run"
    done = start("onp.train", *patient.job(folder, *patient.trigger))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "ONP" in done.stdout
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(run, tmp_path / "copy")
    yield tmp_path / "copy"


# --- python -m onp.attacks ----------------------------------------------------------------------------------


def test_the_attack_command_writes_a_network_that_is_backdoored(patient: Patient) -> None:
    names = {path.name for path in (patient.folder / "backdoored").iterdir()}
    assert names == {"backdoored.safetensors", "trigger.json", "trigger_pattern.npy", "trigger_mask.npy"}
    ca, asr, _ = figures(patient.network, patient)
    assert ca > 0.6 and asr > 0.9


def test_the_attack_command_needs_images_beside_those_of_the_defence(patient: Patient, tmp_path: Path) -> None:
    model = f"{patient.folder / 'network.py'}:tiny"
    data = ["--data", str(patient.folder / "images"), "--defence-size", "400"]
    code, _, err = call(AttackConfig, attack, ["--model", model, *data, "--out", str(tmp_path / "out")])
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- the report and the run folder ----------------------------------------------------------------------------


def test_rows_are_the_contract(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    rows = report["rows"]
    assert not undocumented("report.json", report)
    assert not undocumented("masks/METHOD.json", json.loads((run / "masks/onp.json").read_text()))
    assert not undocumented("verdict.json", json.loads((run / "clues.json").read_text()))
    assert [row["method"] for row in rows] == ROWS
    for row in rows:
        assert set(row) >= KEYS, row["method"]
        assert all(0 <= row[name] <= 1 for name in ("ca", "asr", "ra", "der"))
    by_name = rows_of(run)
    assert by_name["backdoored"]["units_pruned"] == 0 and by_name["backdoored"]["der"] == 0.5
    for name in ("random", "ranked", "greedy", "onp"):
        assert BUDGET // 2 < by_name[name]["reward_evaluations"] <= BUDGET, name
        assert by_name[name]["seconds"] > 0
    assert by_name["rnp"]["reward_evaluations"] == 0 and by_name["rnp"]["seconds"] > 0


def test_the_oracle_is_never_worse_than_trigger_free_rnp(run: Path) -> None:
    rows = rows_of(run)
    assert rows["rnp_oracle"]["der"] >= rows["rnp"]["der"]


def test_the_run_folder_holds_what_it_should(run: Path) -> None:
    files = set(contents(run))
    masks = {f"masks/{name}.json" for name in [*DEFENCES, "rnp_oracle"]}
    weights = {"policy.safetensors", "policy.zip", "purified.safetensors"}
    plots = {path for path in files if path.startswith("plots/")}
    assert files >= {"config.json", "report.json", "report.md", *masks, *weights} and plots
    assert not [path for path in files if Path(path).name.startswith(".")], "temporary files are left"
    for plot in plots:
        with Image.open(run / plot) as image:
            assert image.format == "PNG"
            image.load()
    assert all(bool(torch.isfinite(value).all()) for value in policy_weights(run).values())
    assert "policy.pth" in zipfile.ZipFile(run / "policy.zip").namelist()
    events = [path for path in (run / "tensorboard").rglob("events.out.tfevents.*") if path.stat().st_size]
    assert events
    options = json.loads((run / "config.json").read_text())["options"]
    assert (options["budget"], options["env"]["max_steps"], options["mean"]) == (BUDGET, 4, [MEAN] * 3)


def policy_weights(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "policy.safetensors")


def test_the_purified_network_is_the_masked_original(run: Path, patient: Patient) -> None:
    purified = safetensors.torch.load_file(run / "purified.safetensors")
    original = patient.network
    assert {key: value.shape for key, value in purified.items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }
    restored = patient.network
    restored.load_state_dict(purified)
    inputs = (read_test_images(patient.folder / "images")[0] - MEAN) / STD
    mask = KeepMask.from_json(index_units(original, (3, 8, 8)), json.loads((run / "masks/onp.json").read_text()))
    assert mask.units_pruned == rows_of(run)["onp"]["units_pruned"] > 0
    with torch.no_grad(), masked(original, mask):
        assert torch.equal(restored(inputs), original(inputs))
    with torch.no_grad():
        assert not torch.equal(restored(inputs), original(inputs))


def test_the_figures_follow_from_the_files(run: Path, patient: Patient) -> None:
    rows = rows_of(run)
    before = figures(patient.network, patient)
    purified = patient.network
    purified.load_state_dict(safetensors.torch.load_file(run / "purified.safetensors"))
    after = figures(purified, patient)
    assert before == pytest.approx([rows["backdoored"][name] for name in ("ca", "asr", "ra")], abs=1e-9)
    assert after == pytest.approx([rows["onp"][name] for name in ("ca", "asr", "ra")], abs=1e-9)
    der = (max(0, before[1] - after[1]) - max(0, before[0] - after[0]) + 1) / 2
    assert rows["onp"]["der"] == pytest.approx(der, abs=1e-9)
    for row in rows.values():
        der = (max(0, before[1] - row["asr"]) - max(0, before[0] - row["ca"]) + 1) / 2
        assert row["der"] == pytest.approx(der, abs=1e-9), row["method"]


def test_the_markdown_shows_the_rows(run: Path) -> None:
    lines = [line.strip("| ").split(" | ") for line in (run / "report.md").read_text().splitlines() if "|" in line]
    table = [cells for cells in lines if len(cells) >= 8][1:]
    assert len(table) == len(ROWS)
    for cells, row in zip(table, rows_of(run).values(), strict=True):
        shown = [f"{100 * row[name]:.1f}" for name in ("ca", "asr", "ra")]
        assert [*shown, f"{row['der']:.3f}", str(row["units_pruned"])] == [cell.strip() for cell in cells[1:6]]
    for plot in (run / "plots").iterdir():
        assert f"(plots/{plot.name})" in (run / "report.md").read_text()


# --- the same command again -----------------------------------------------------------------------------------


def test_the_same_command_again_changes_nothing(run: Path, patient: Patient) -> None:
    before = contents(run)
    code, out, err = call(TrainConfig, train, patient.job(run, *patient.trigger))
    assert (code, err) == (0, "")
    assert "complete" in out
    assert contents(run) == before


def test_a_purified_network_that_is_gone_is_written_again(copied: Path, patient: Patient) -> None:
    purified = copied / "purified.safetensors"
    before = purified.read_bytes()
    purified.unlink()
    code, out, err = call(TrainConfig, train, patient.job(copied, *patient.trigger))
    assert (code, err) == (0, "") and "complete" not in out
    assert purified.read_bytes() == before


def test_a_run_may_be_moved(run: Path, patient: Patient, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    code, out, err = call(TrainConfig, train, patient.job(moved, *patient.trigger))
    assert (code, err) == (0, "") and "complete" in out and contents(moved) == contents(run)
    assert "vidence of a backdoor" in out, "the verdict comes first, here too"


def test_other_options_on_the_same_folder_are_refused(run: Path, patient: Patient) -> None:
    before = contents(run)
    code, _, err = call(TrainConfig, train, patient.job(run, *patient.trigger, budget=BUDGET + 1))
    assert code == 2
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "budget" in err
    assert contents(run) == before


# --- the defender sees clean training images alone ------------------------------------------------------------


def test_masks_depend_on_no_trigger_and_no_test_label(run: Path, patient: Patient) -> None:
    shutil.copytree(patient.folder / "images", patient.folder / "shuffled")
    for label in range(10):  # every test folder gets the images of the next class
        source = patient.folder / "images" / "test" / f"digit{(label + 1) % 10}"
        shutil.rmtree(patient.folder / "shuffled" / "test" / f"digit{label}")
        shutil.copytree(source, patient.folder / "shuffled" / "test" / f"digit{label}")
    folder = patient.folder / "blind"
    code, _, err = call(TrainConfig, train, patient.job(folder, data="shuffled"))
    assert (code, err) == (0, "")
    for method in DEFENCES:
        assert (folder / "masks" / f"{method}.json").read_bytes() == (run / "masks" / f"{method}.json").read_bytes()
    for name in ("policy.safetensors", "purified.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    rows = rows_of(folder)
    assert list(rows) == ROWS
    assert all(row[name] is None for row in rows.values() for name in ("asr", "ra", "der"))
    assert rows["backdoored"]["ca"] < 0.3 < rows_of(run)["backdoored"]["ca"], "the labels were not shuffled"
    assert rows["rnp_oracle"]["ca"] is None and rows["rnp_oracle"]["note"]
    assert not (folder / "masks" / "rnp_oracle.json").exists()


def test_a_network_without_evidence_is_left_alone(patient: Patient) -> None:
    """Ten steps recover no trigger of any class, so there is none."""
    folder = patient.folder / "gated"
    job = [option for option in patient.job(folder) if option != "--always"]
    code, printed, err = call(TrainConfig, train, job)
    assert (code, err) == (0, "")
    assert "No evidence of a backdoor" in printed and "--always" in printed
    rows = rows_of(folder)
    assert list(rows) == ROWS
    for name in ("ca", "asr", "ra", "der", "units_pruned"):
        assert rows["onp"][name] == rows["backdoored"][name]
        assert all(rows[method][name] is None for method in ROWS if method not in ("onp", "backdoored"))
    purified = safetensors.torch.load_file(folder / "purified.safetensors")
    given = safetensors.torch.load_file(patient.folder / "backdoored" / "backdoored.safetensors")
    assert all(torch.equal(purified[key], value) for key, value in given.items())
    report = (folder / "report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert len(table) == 4 and "| network as given |" in report and "| ONP |" in report, "rows of what was not done"
    assert "- RNP, trigger-free, random search, one-shot ranking, greedy search: no evidence" in report
    assert not (folder / "plots").exists() and "Plots" not in report, "there is nothing to draw"


def test_a_network_that_is_refused_leaves_no_folder_in_the_way(patient: Patient, tmp_path: Path) -> None:
    job = [option for option in patient.job(tmp_path / "run") if option != "--always"]
    wrong = [*job, "--mean", "9", "--std", "0.01"]
    code, _, err = call(TrainConfig, train, wrong)
    assert code == 2 and "check --checkpoint, --mean, --std" in err
    assert list(tmp_path.iterdir()) == []


def test_masks_depend_on_the_clean_images(run: Path, patient: Patient) -> None:
    """Negative control of the test above: another draw of defence images gives other scores."""
    folder = patient.folder / "reseeded"
    assert call(TrainConfig, train, patient.job(folder, "--seed", "1"))[0] == 0
    assert (folder / "policy.safetensors").read_bytes() != (run / "policy.safetensors").read_bytes()
    assert (folder / "methods" / "onp.json").read_bytes() != (run / "methods" / "onp.json").read_bytes()


def test_without_test_images_the_job_runs(run: Path, patient: Patient) -> None:
    shutil.copytree(patient.folder / "images" / "train", patient.folder / "untested" / "train")
    folder = patient.folder / "untested-run"
    code, _, err = call(TrainConfig, train, patient.job(folder, data="untested"))
    assert (code, err) == (0, "")
    rows = rows_of(folder)
    assert list(rows) == ROWS
    assert all(row[name] is None for row in rows.values() for name in ("ca", "asr", "ra", "der"))
    assert rows["onp"]["units_pruned"] == rows_of(run)["onp"]["units_pruned"]
    assert (folder / "masks" / "onp.json").read_bytes() == (run / "masks" / "onp.json").read_bytes()
    code, _, err = call(TrainConfig, train, patient.job(folder.with_name("none"), *patient.trigger, data="untested"))
    assert code == 2 and "--trigger" in err


def test_a_network_without_batch_norm(patient: Patient) -> None:
    (patient.folder / "plain").mkdir()
    torch.manual_seed(0)
    network = runpy.run_path(str(patient.folder / "network.py"))["plain"]()
    safetensors.torch.save_file(network.state_dict(), patient.folder / "plain" / "backdoored.safetensors")
    folder = patient.folder / "plain-run"
    job = patient.job(folder, *patient.trigger, function="plain", weights="plain")
    code, _, err = call(TrainConfig, train, job)
    assert (code, err) == (0, "")
    rows = rows_of(folder)
    assert list(rows) == ROWS
    for method in ("rnp", "rnp_oracle"):
        figure_names = ("ca", "asr", "ra", "der", "units_pruned")
        assert [rows[method][name] for name in figure_names] == [None] * 5
        assert "batch" in rows[method]["note"]
    for method in ("backdoored", "random", "ranked", "greedy", "onp"):
        assert rows[method]["der"] is not None
    assert call(EvaluateConfig, evaluate, [str(folder)])[0] == 0


# --- python -m onp.evaluate -----------------------------------------------------------------------------------


def test_evaluate_agrees_with_the_report(run: Path) -> None:
    before = {path: data for path, (data, _) in contents(run).items()}
    done = start("onp.evaluate", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: data for path, (data, _) in contents(run).items()} == before


@pytest.mark.parametrize("method", [*DEFENCES, "rnp_oracle"])
def test_evaluate_notices_a_changed_mask(copied: Path, patient: Patient, method: str) -> None:
    path = copied / "masks" / f"{method}.json"
    record = json.loads(path.read_text())
    index = index_units(patient.network, (3, 8, 8))
    mask = KeepMask.from_json(index, record)
    free = (mask.keep & index.batch_norm_units).nonzero().flatten()
    path.write_text(json.dumps(mask.without(free[:2]).to_json()))
    code, out, err = call(EvaluateConfig, evaluate, [str(copied)])
    assert code == 1, out + err
    assert method in out


def test_evaluate_finds_what_was_moved(run: Path, patient: Patient, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(patient.folder / "backdoored", tmp_path / "weights"))
    images = str(shutil.copytree(patient.folder / "images", tmp_path / "images"))
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((copied / "config.json").read_text())
    record["options"] |= {"checkpoint": "gone.safetensors", "data": "gone", "trigger": "gone.json", "device": "cuda:9"}
    (copied / "config.json").write_text(json.dumps(record))
    assert call(EvaluateConfig, evaluate, [str(copied)])[0] == 2
    moved = ["--checkpoint", str(weights / "backdoored.safetensors"), "--trigger", str(weights / "trigger.json")]
    code, out, err = call(EvaluateConfig, evaluate, [str(copied), *moved, "--data", images, "--device", "cpu"])
    assert (code, err) == (0, "") and "Every figure agrees" in out


def test_evaluate_refuses_what_is_no_finished_run(copied: Path) -> None:
    (copied / "report.json").unlink()
    code, _, err = call(EvaluateConfig, evaluate, [str(copied)])
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    code, _, err = call(EvaluateConfig, evaluate, [str(copied / "masks")])
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


# --- python -m onp.graph --------------------------------------------------------------------------------------


def test_the_graph_command_draws_every_unit(run: Path, patient: Patient) -> None:
    out = patient.folder / "graph"
    mask = ["--mask", str(run / "masks" / "onp.json")]
    done = start("onp.graph", *patient.options(), "--out", str(out), *mask, "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"graph.png", "graph.graphml"}
    with Image.open(out / "graph.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 100
    graph = nx.read_graphml(out / "graph.graphml")
    assert graph.number_of_nodes() == len(index_units(patient.network, (3, 8, 8)))
    assert graph.number_of_edges() > 0
