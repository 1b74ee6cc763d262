"""A job that is killed, whenever it is: what is in the run folder is whole, and the same command goes on to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

METHODS = ("rnp", "random", "ranked", "greedy", "onp")
NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
"""
FRACTIONS = (0.2, 0.4)
"""of the time of the first run, which is somewhat slower than those behind it"""

# A process that has imported the command forks a child for every run, so that killing many costs little. Kills:
# ["renaming", k] before the k-th renaming of a temporary file; ["seconds", s] after a time; or null, none.
FORKS = """
import json, os, signal, sys, time
from pathlib import Path
from onp.commands import run_command
from onp.train import TrainConfig, train

def child(arguments, kill):
    replace, calls = os.replace, [0]

    def counting(source, target):
        calls[0] += 1
        if kill and kill[0] == "renaming" and calls[0] == kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counting
    sys.argv = ["onp.train", *arguments]
    sys.stdout = sys.stderr
    try:
        run_command(TrainConfig, train, "onp.train")
    except SystemExit as stop:
        Path("renamings").write_text(str(calls[0]))
        os._exit(stop.code)
    finally:
        os._exit(99)

for line in sys.stdin:
    arguments, kill = json.loads(line)
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        child(arguments, kill)
    if kill and kill[0] == "seconds":
        time.sleep(kill[1])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start]), flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network and a tiny image folder."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "network.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
    for number in range(18):
        path = folder / "images" / ("train" if number < 12 else "test") / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    Image.new("RGB", (8, 8), "white").save(folder / "patch.png")
    (folder / "trigger.json").write_text('{"target": 1, "mode": "add", "pattern": "patch.png"}')
    return folder


def arguments(folder: Path, run: str) -> list[str]:
    files = {"--model": "network.py:tiny", "--checkpoint": "weights.safetensors", "--data": "images",
             "--trigger": "trigger.json", "--run-dir": run}  # fmt: skip
    small = {"--defence-size": 12, "--budget": 40, "--env.max-steps": 4, "--env.recovery.steps": 20,
             "--env.reward.clean-fidelity": 0.05, "--threads": 1}  # fmt: skip
    options = {**{name: str(folder / path) for name, path in files.items()}, **small}
    return [*(str(part) for option in options.items() for part in option), "--always"]


Job = Callable[[str, tuple[str, float] | None], tuple[int, float]]
"""runs the command on a folder of this name, kills it as told, returns exit code (negative: signal) and seconds"""


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[Job]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], cwd=folder, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip

        def run(name: str, kill: tuple[str, float] | None) -> tuple[int, float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([arguments(folder, name), kill]) + "\n")
            process.stdin.flush()
            code, seconds = json.loads(process.stdout.readline())
            return code, seconds

        yield run


def check_whole(run: Path) -> None:
    """Every result that is there is whole; what is not yet renamed begins with a dot and counts for nothing."""
    files = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")]
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
    renamings: int
    """results written, each by renaming a temporary file"""


@pytest.fixture(scope="module")
def reference(folder: Path, job: Job) -> Reference:
    code, seconds = job("reference", None)
    assert code == 0
    masks = [json.loads((folder / "reference" / "masks" / f"{method}.json").read_text()) for method in METHODS]
    assert sum(mask["units_pruned"] for mask in masks) > 0, "nothing to compare"
    return Reference(folder / "reference", seconds, int((folder / "renamings").read_text()))


def check_killed_and_finished(run: Path, job: Job, kill: tuple[str, float], reference: Reference) -> None:
    code, _ = job(run.name, kill)
    assert code == -signal.SIGKILL, "it was over before it was killed"
    check_whole(run)
    assert not (run / "report.json").exists()
    code, _ = job(run.name, None)
    assert code == 0, "the same command does not go on"
    check_whole(run)
    check_same_results(run, reference.path)


@pytest.mark.parametrize("part", [0, 0.1, 0.15, 0.3, 0.55, 0.65, 0.75, 1])
def test_killed_while_a_result_is_written(folder: Path, job: Job, reference: Reference, part: float) -> None:
    """The temporary file is there and the result is not: 0 is the first result of the run, 1 the last."""
    run = folder / f"renaming{part}"
    number = 1 + round(part * (reference.renamings - 1))
    check_killed_and_finished(run, job, ("renaming", number), reference)
    assert [path for path in run.rglob(".*") if path.is_file()], "no temporary file was left: killed at no such moment"


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
    code, _ = job(run.name, None)
    assert code == 0
    check_whole(run)
    check_same_results(run, reference.path)
