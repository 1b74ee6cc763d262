"""Bad inputs: exit code 2, one line that says what is wrong, no traceback, and no run folder."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from onp.checkpoints import load_checkpoint, write_text
from onp.commands import run_command
from onp.images import read_image
from onp.tracing import trace
from onp.train import TrainConfig, train

NETWORK = """
from torch import nn

def good():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def wider():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3))

def deeper():
    return nn.Sequential(*good(), nn.ReLU(), nn.Linear(3, 3))

def raising():
    raise RuntimeError("first line\\nsecond line")

def not_a_network():
    return 3

class Pair(nn.Sequential):
    def forward(self, images):
        return super().forward(images), images

class Flat(nn.Sequential):
    def forward(self, images):
        return super().forward(images).sum(1)

def pair():
    return Pair(*good())

def flat():
    return Flat(*good())

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
"""


class MakesAFolder:
    """Does so when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def write_images(folder: Path, classes: int, per_class: int = 2, side: int = 8) -> None:
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs and, beside them, bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "network.py").write_text(NETWORK)
    (folder / "broken.py").write_text("def good(:\n")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "good.safetensors")
    weights["4.weight"][1, 7] = float("nan")
    safetensors.torch.save_file(weights, folder / "nan.safetensors")
    (folder / "text.pth").write_text("no weights\n")
    torch.save({"state_dict": weights, "note": MakesAFolder(folder / "executed")}, folder / "evil.pth")
    np.save(folder / "evil.npy", np.array([MakesAFolder(folder / "executed")], dtype=object), allow_pickle=True)
    for split in ("train", "test"):
        write_images(folder / "images" / split, 3)
        write_images(folder / "more_classes" / split, 4)
    write_images(folder / "untested" / "train", 3)
    write_images(folder / "larger_tests" / "train", 3)
    write_images(folder / "larger_tests" / "test", 3, side=12)
    (folder / "no_images" / "train" / "class0").mkdir(parents=True)
    (folder / "no_classes" / "train").mkdir(parents=True)
    (folder / "no_train").mkdir()
    write_images(folder / "truncated" / "train", 3)
    picture = folder / "truncated" / "train" / "class0" / "0.png"
    picture.write_bytes(picture.read_bytes()[:40])
    Image.new("RGB", (8, 8), "white").save(folder / "patch.png")
    Image.new("RGB", (9, 9), "white").save(folder / "large.png")
    specifications = {
        "trigger": '{"target": 1, "mode": "add", "pattern": "patch.png"}',
        "out_of_range": '{"target": 3, "mode": "add", "pattern": "patch.png"}',
        "negative": '{"target": -1, "mode": "add", "pattern": "patch.png"}',
        "no_pattern": '{"target": 1, "mode": "add", "pattern": "absent.png"}',
        "large_pattern": '{"target": 1, "mode": "add", "pattern": "large.png"}',
        "evil": '{"target": 1, "mode": "add", "pattern": "evil.npy"}',
        "no_json": "{",
        "list": "[]",
    }
    for name, text in specifications.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.fixture
def arguments(inputs: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """A good command line with some options replaced; `{}` stands for the folder of the inputs."""

    def make(changes: str) -> list[str]:
        options = {
            "--model": f"{inputs}/network.py:good",
            "--checkpoint": f"{inputs}/good.safetensors",
            "--data": f"{inputs}/images",
            "--defence-size": "6",
            "--run-dir": str(tmp_path / "run"),
            "--budget": "24",
            "--env.max-steps": "2",
            "--env.recovery.steps": "2",
            "--env.unlearn.max-epochs": "1",
            "--rnp.unlearn.max-epochs": "1",
            "--rnp.recover.epochs": "1",
            "--threads": "1",
        }
        words = changes.replace("{}", str(inputs)).split()
        while words:
            name = words.pop(0)
            options[name] = words.pop(0)
        return [*(part for name, value in options.items() for part in (name, *value.split(","))), "--always"]

    return make


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(options: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the command, inside this process."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["onp.train", *options])
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
            run_command(TrainConfig, train, "onp.train")
    return int(stop.value.code or 0), err.getvalue()


def check_one_line(code: int, err: str, words: str) -> None:
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert all(word in err for word in words.split()), err


BAD = [
    ("--checkpoint {}/absent.pth", "absent.pth"),
    ("--checkpoint {}", "checkpoint"),
    ("--checkpoint ~no_such_user_here/a.pth", "--checkpoint ~no_such_user_here/a.pth"),
    ("--model {}/network.py:lazy", "nn.Lazy"),
    ("--checkpoint {}/text.pth", "text.pth weights"),
    ("--checkpoint {}/evil.pth", "evil.pth weights"),
    ("--policy {}/evil.pth", "evil.pth weights"),
    ("--trigger {}/evil.json", "evil.npy"),
    ("--image-size 0", "--image-size 0"),
    ("--image-size 1000000", "--image-size 1000000 4096"),
    ("--num-classes 1000000000", "--num-classes 1000000000"),
    ("--data {}/absent", "absent train/CLASS/IMAGE"),
    ("--data {}/no_train", "no_train train/CLASS/IMAGE"),
    ("--data {}/no_images", "no_images"),
    ("--data {}/no_classes", "no_classes"),
    ("--data {}/truncated", "0.png"),
    ("--model resnet_of_dreams", "resnet_of_dreams"),
    ("--model {}/absent.py:good", "absent.py"),
    ("--model {}/network.py:absent", "absent"),
    ("--model {}/network.py:raising", "RuntimeError first second"),
    ("--model {}/network.py:not_a_network", "int"),
    ("--model {}/network.py:pair", "Pair tuple logits (2, classes) wrap"),
    ("--model {}/network.py:flat", "Flat (2,) logits (2, classes) wrap"),
    ("--data {}/larger_tests", "larger_tests (3, 12, 12) (3, 8, 8) --image-size"),
    ("--model {}/broken.py:good", "SyntaxError"),
    ("--model {}/network.py:wider", "good.safetensors 0.weight"),
    ("--model {}/network.py:deeper", "good.safetensors missing"),
    ("--model wide_resnet16_1", "good.safetensors keys"),
    ("--data {}/more_classes", "4 classes 3 outputs"),
    ("--defence-size 0", "--defence-size 0"),
    ("--test-size 0", "--test-size 0"),
    ("--defence-size -1", "--defence-size -1"),
    ("--defence-size 7", "--defence-size 7 6"),
    ("--checkpoint {}/nan.safetensors", "NaN 4.weight"),
    ("--image-size 9", "(3, 9, 9)"),
    ("--trigger {}/out_of_range.json", "out_of_range.json target 3"),
    ("--trigger {}/negative.json", "negative.json target -1"),
    ("--trigger {}/absent.json", "absent.json"),
    ("--trigger {}", "trigger"),
    ("--trigger {}/no_pattern.json", "absent.png"),
    ("--trigger {}/large_pattern.json", "large.png (3, 9, 9)"),
    ("--trigger {}/no_json.json", "no_json.json"),
    ("--trigger {}/list.json", "list.json"),
    ("--trigger {}/trigger.json --data {}/untested", "--trigger test/"),
    ("--mean 0.5,0.5,0.5", "--mean --std"),
    ("--std 0.5,0.5,0.5", "--mean --std"),
    ("--mean 0.5,0.5,0.5 --std 1,1,0", "std"),
    ("--mean 0.5,0.5 --std 1,1", "--mean 2 3"),
    ("--device warp", "warp cpu"),
    ("--device cuda:99", "cuda:99 cpu"),
    ("--threads -1", "--threads -1"),
    ("--channels 2", "--channels 2 1 3"),
    ("--threads 100000", "--threads 100000 1024"),
    ("--seed -1", "--seed -1"),
    ("--seed 4294967296", "--seed 4294967296"),
    ("--agent.ent-coef nan", "ent_coef nan"),
    ("--agent.gamma 2", "gamma 2"),
    ("--env.cache-gib inf", "cache_gib inf"),
    ("--rnp.max-accuracy-drop nan", "max_accuracy_drop nan"),
    ("--budget 3", "--budget 3"),
    ("--finalists 0", "--finalists 0"),
    ("--policy {}/absent.safetensors", "absent.safetensors"),
    ("--policy {}/good.safetensors", "good.safetensors"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_inputs(
    arguments: Callable[[str], list[str]], inputs: Path, tmp_path: Path, changes: str, words: str
) -> None:
    code, err = call(arguments(changes))
    check_one_line(code, err, words)
    assert list(tmp_path.iterdir()) == [], "the command left something behind"
    assert not (inputs / "executed").exists(), "a pickle was executed"


def test_the_pickles_above_would_have_done_something(inputs: Path) -> None:
    torch.load(inputs / "evil.pth", weights_only=False)
    (inputs / "executed").rmdir()
    np.load(inputs / "evil.npy", allow_pickle=True)
    (inputs / "executed").rmdir()


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: TrainConfig) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/masks/onp.json")

    monkeypatch.setattr(sys, "argv", ["onp.train"])
    with pytest.raises(SystemExit) as stop:
        run_command(TrainConfig, fail, "onp.train")
    assert stop.value.code == os.EX_IOERR
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err and "runs/a/masks/onp.json" in err


def test_the_good_command_line_is_good(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Else the errors above might come from what they have in common."""
    code, err = call(arguments("--trigger {}/trigger.json"))
    assert (code, err) == (0, "")
    assert (tmp_path / "run" / "report.json").is_file()


def test_the_real_command(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Two processes side by side, since each takes seconds to import what it needs."""
    cases = {"--data {}/absent": "absent", "--model {}/network.py:raising": "first second"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "onp.train", *arguments(changes)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for changes in cases
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in processes]
    for process, err, words in zip(processes, errors, cases.values(), strict=True):
        check_one_line(process.returncode, err, words)
    assert list(tmp_path.iterdir()) == []


# --- the run folder itself ------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    code, err = call(arguments(""))
    check_one_line(code, err, "--run-dir")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_place_of_the_run_folder(arguments: Callable[[str], list[str]], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    code, err = call(arguments(f"--run-dir {tmp_path}/file{below}"))
    check_one_line(code, err, "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"options": 3}'])
def test_a_damaged_record(arguments: Callable[[str], list[str]], tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    code, err = call(arguments(""))
    check_one_line(code, err, "config.json")
    assert (tmp_path / "run" / "config.json").read_text() == text


# --- the demonstration, where there is no checkpoint ----------------------------------------------------------


def no_training(*arguments: object, **options: object) -> None:
    raise AssertionError("a network is trained before the options are checked")


@pytest.mark.parametrize("changes", ["--defence-size 0", "--defence-size 99999", "--mean 0.5"])
def test_bad_options_of_the_demonstration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: str) -> None:
    monkeypatch.setattr("onp.attacks.make.make_backdoored_model", no_training)
    code, err = call([*changes.split(), "--run-dir", str(tmp_path / "run"), "--threads", "1"])
    check_one_line(code, err, changes.split()[0])
    assert list(tmp_path.iterdir()) == []


def test_other_data_needs_a_checkpoint(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    options = arguments("")
    place = options.index("--checkpoint")
    code, err = call(options[:place] + options[place + 2 :])
    check_one_line(code, err, "--checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), os.EX_OSERR),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), os.EX_OSERR),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), os.EX_OSERR),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_where_memory_does_not_suffice_one_line_says_so(
    error: Exception, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit if code else RuntimeError) as stop:
        run_command(TrainConfig, job, "command")
    if code:
        line = capsys.readouterr().err
        assert stop.value.code == code and "error: out of memory" in line and len(line.splitlines()) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried")])
def test_lack_of_memory_is_not_taken_for_a_bad_file_or_network(error: Exception, tmp_path: Path) -> None:
    class Short(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    def fail(*arguments: object, **options: object) -> None:
        raise error

    (tmp_path / "a.safetensors").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "load_file", fail)
        patch.setattr(Image, "open", fail)
        patch.setattr("onp.tracing._Shapes.propagate", fail)
        jobs = (
            lambda: load_checkpoint(nn.Linear(1, 1), tmp_path / "a.safetensors"),
            lambda: read_image(tmp_path / "a.png"),
            lambda: trace(nn.Sequential(nn.Flatten()), (1, 2, 2)),
        )
        for job in jobs:
            with pytest.raises(type(error)) as caught:
                job()
            assert caught.value is error


def test_bytes_of_names_that_are_no_text_are_shown_and_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_text(tmp_path / "page.html", name)
    assert (tmp_path / "page.html").read_text() == "\\udcff.png"
    job = f"from onp.commands import *; run_command(TrainConfig, lambda _: console.print({name!r}), 'onp.train')"
    code = f"from onp.train import TrainConfig; import sys; sys.argv = ['x']; {job}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\\udcff.png\n"), done.stderr
