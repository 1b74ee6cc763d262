"""A job that is killed, whenever it is: what is in the run folder is whole, and the same command goes on to the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
from killing import Jobs, Kill, differences, jobs
from PIL import Image
from tiny_run import tiny_options

METHODS = ("rnp", "random", "ranked", "greedy", "onp")
FRACTIONS = (0.2, 0.4)
"""of the time of the first run, which is somewhat slower than those behind it"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network and a tiny image folder."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_options(folder)
    return folder


def arguments(folder: Path, run: str) -> list[str]:
    files = {"--model": "network.py:tiny", "--checkpoint": "weights.safetensors", "--data": "images",
             "--trigger": "trigger.json", "--run-dir": run}  # fmt: skip
    small = {"--defence-size": 12, "--budget": 40, "--env.max-steps": 4, "--env.recovery.steps": 20,
             "--env.reward.clean-fidelity": 0.05, "--threads": 1}  # fmt: skip
    options = {**{name: str(folder / path) for name, path in files.items()}, **small}
    return [*(str(part) for option in options.items() for part in option), "--always"]


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[Jobs]:
    with jobs(folder) as runner:
        yield runner


class Job:
    """The command on a folder of a name; returns exit code (negative: signal), seconds and events."""

    def __init__(self, runner: Jobs, folder: Path) -> None:
        self.runner, self.folder = runner, folder

    def __call__(self, name: str, kill: Kill) -> tuple[int, float, dict[str, int]]:
        return self.runner.run("onp.train", arguments(self.folder, name), kill)


@pytest.fixture(scope="module")
def job(runner: Jobs, folder: Path) -> Job:
    return Job(runner, folder)


def check_whole(run: Path) -> None:
    """Every result that is there is whole; what is not yet renamed begins with a dot and counts for nothing."""
    everything = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = [path for path in everything if path.parent.name != "journal"]  # whose last record may be torn
    for path in files:
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict), path
        elif path.suffix == ".safetensors":
            assert safetensors.torch.load_file(path), path
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            assert path.suffix in (".zip", ".md") or "tfevents" in path.name, path
            assert path.suffix != ".zip" or path.read_bytes()[:2] == b"PK"
    for path in files:  # what says that a result is there comes after the result
        if path.parent.name == "methods":
            assert (run / "masks" / path.name).is_file(), path
    if (run / "report.json").is_file():
        assert (run / "purified.safetensors").is_file() and (run / "report.md").is_file()


def check_same_results(run: Path, reference: Path) -> None:
    report, expected = (json.loads((path / "report.json").read_text()) for path in (run, reference))
    for row, other in zip(report["rows"], expected["rows"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for name in [*(f"masks/{method}.json" for method in (*METHODS, "rnp_oracle")), "purified.safetensors"]:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name


@dataclass(frozen=True)
class Reference:
    """A run that nothing interrupts."""

    path: Path
    seconds: float
    events: dict[str, int]
    """results written, each by renaming a temporary file, and records of journals"""


@pytest.fixture(scope="module")
def reference(folder: Path, job: Job) -> Reference:
    code, seconds, events = job("reference", None)
    assert code == 0
    masks = [json.loads((folder / "reference" / "masks" / f"{method}.json").read_text()) for method in METHODS]
    assert sum(mask["units_pruned"] for mask in masks) > 0, "nothing to compare"
    return Reference(folder / "reference", seconds, events)


def check_killed_and_finished(run: Path, job: Job, kill: Kill, reference: Reference) -> None:
    code, _, _ = job(run.name, kill)
    assert code == -signal.SIGKILL, "it was over before it was killed"
    check_whole(run)
    assert not (run / "report.json").exists()
    code, _, _ = job(run.name, None)
    assert code == 0, "the same command does not go on"
    check_whole(run)
    check_same_results(run, reference.path)


@pytest.mark.parametrize("part", [0, 0.1, 0.15, 0.3, 0.55, 0.65, 0.75, 1])
def test_killed_while_a_result_is_written(folder: Path, job: Job, reference: Reference, part: float) -> None:
    """The temporary file is there and the result is not: 0 is the first result of the run, 1 the last."""
    run = folder / f"renaming{part}"
    number = 1 + round(part * (reference.events["renaming"] - 1))
    check_killed_and_finished(run, job, ("renaming", number), reference)
    assert [path for path in run.rglob(".*") if path.is_file()], "no temporary file was left: killed at no such moment"


@pytest.mark.parametrize("part", [0, 0.2, 0.5, 0.9])
def test_killed_while_a_record_is_written(folder: Path, job: Job, reference: Reference, part: float) -> None:
    """Half of a score is in the journal: it counts for nothing, and those before it are not computed again."""
    run = folder / f"record{part}"
    number = 1 + round(part * (reference.events["record"] - 1))
    code, _, _ = job(run.name, ("record", number))
    assert code == -signal.SIGKILL
    check_whole(run)
    code, _, events = job(run.name, None)
    assert code == 0
    assert events["record"] == reference.events["record"] - number + 1, "something was computed again"
    check_same_results(run, reference.path)


@pytest.mark.parametrize("size", [4000, 9000])
def test_a_full_disk_leaves_what_was_written_before(folder: Path, job: Job, reference: Reference, size: int) -> None:
    """4000 bytes end a journal, 9000 a policy or a plot; the same command goes on when there is room again."""
    run = folder / f"size{size}"
    code, _, _ = job(run.name, ("size", size))
    assert code == os.EX_IOERR
    check_whole(run)
    assert not (run / "report.json").exists()
    assert not [path for path in run.rglob(".*") if path.is_file()], "a temporary file was left behind"
    code, _, _ = job(run.name, None)
    assert code == 0
    check_same_results(run, reference.path)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_killed_after_some_time(folder: Path, job: Job, reference: Reference, fraction: float) -> None:
    check_killed_and_finished(folder / f"time{fraction}", job, ("seconds", fraction * reference.seconds), reference)


def test_the_real_command_killed_thrice(folder: Path, job: Job, reference: Reference) -> None:
    """`kill -9` as soon as a mask is there, the same command again, and so on to the end."""
    run = folder / "real"
    command = [sys.executable, "-m", "onp.train", *arguments(folder, "real")]
    for method in ("rnp", "random", "greedy"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        deadline = time.monotonic() + 60
        while not (run / "masks" / f"{method}.json").exists() and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL, "it was over before it was killed"
        assert (run / "masks" / f"{method}.json").exists()
        check_whole(run)
        assert not (run / "report.json").exists(), "killed too late to tell anything"
    code, _, _ = job(run.name, None)
    assert code == 0
    check_whole(run)
    check_same_results(run, reference.path)


def killed_again_and_again(runner: Jobs, command: str, whole: list[str], again: list[str], kills: int) -> None:
    """Run `whole`, then `again`, the same for another folder, killed at moments drawn with a seed."""
    code, _, events = runner.run(command, whole)
    assert code == 0
    before = 0
    for moment in sorted(random.Random(0).sample(range(1, events["event"] + 1), kills)):
        assert runner.run(command, again, ("event", moment - before))[0] == -signal.SIGKILL
        before = moment - 1
    assert runner.run(command, again)[0] == 0


def test_a_table_killed_again_and_again(folder: Path, runner: Jobs) -> None:
    """Two networks; the results of both runs, and the table itself."""
    entry = {"model": "network.py:tiny", "checkpoint": "weights.safetensors", "data": "images"}
    suite = [{**entry, "name": "one", "trigger": "trigger.json"}, {**entry, "name": "two", "trigger": None}]
    (folder / "suite.json").write_text(json.dumps(suite))
    small = {"--models": folder / "suite.json", "--seeds": 0, "--defence-size": 12, "--threads": 1}
    small |= {"--purify.budget": 24, "--purify.env.max-steps": 2, "--purify.env.recovery.steps": 5}
    options = [str(part) for option in small.items() for part in option]
    paths = [["--out", str(folder / name)] for name in ("table", "killed_table")]
    killed_again_and_again(runner, "onp.bench table", options + paths[0], options + paths[1], kills=4)
    assert differences(folder / "killed_table", folder / "table") == []
    assert len(json.loads((folder / "table" / "table.json").read_text())["cells"]) >= 2 * len(METHODS)


def test_a_zoo_killed_again_and_again(folder: Path, runner: Jobs) -> None:
    """Whatever the epoch, and between the files of the result."""
    options = ["make", "digits-small_cnn-clean", "--threads", "1", "--root"]
    roots = [str(folder / name) for name in ("zoo", "killed_zoo")]
    killed_again_and_again(runner, "onp.zoo", [*options, roots[0]], [*options, roots[1]], kills=2)
    assert differences(folder / "killed_zoo", folder / "zoo") == []
    assert len(list((folder / "zoo").glob("*/entry.json"))) == 1


def test_differences_are_noticed(folder: Path, reference: Reference) -> None:
    """Negative control: a mask that differs, a network that differs, a file that is missing."""
    shutil.copytree(reference.path, folder / "copied")
    assert differences(folder / "copied", reference.path) == []
    changed = ["clues.json", "masks/onp.json", "purified.safetensors"]
    (folder / "copied" / changed[0]).unlink()
    (folder / "copied" / changed[1]).write_text('{"rule": "zero"}')
    (folder / "copied" / changed[2]).write_bytes((reference.path / changed[2]).read_bytes()[:-1] + b"?")
    assert differences(folder / "copied", reference.path) == changed
