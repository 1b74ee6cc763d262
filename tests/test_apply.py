"""`python -m onp.apply` and the files that it writes: what each holds, that all agree, that none is half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from onp import apply as command
from onp.apply import ApplyConfig, apply
from onp.checkpoints import load_checkpoint, sha256
from onp.data import Normalisation
from onp.errors import CheckpointError, ConfigError, MaskError, ModelError, OnpError
from onp.export import export_onnx, export_program
from onp.shrinking import load_shrunk
from onp.train import complete_run

ROOT = Path(__file__).parents[1]
NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)
    )

def other():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3))
"""
MASK = {"rule": "zero", "units": 4 + 5 + 180, "units_pruned": 3, "pruned": {"1": [2], "6.input": [0, 1]}, "order": []}
"""channel 2 of the first convolution can go; two of the 36 input positions of a channel cannot"""
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FILES = {
    *("deploy.json", "model.onnx", "program.pt2", "purified.safetensors", "shrunk.json", "shrunk.safetensors"),
}


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with random statistics, images, and the mask."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "network.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = tiny()
    for value in network[1].state_dict().values():
        if value.ndim:
            value.copy_(0.5 + torch.rand(4))
    safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
    for number in range(9):
        path = folder / "images" / "train" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    (folder / "mask.json").write_text(json.dumps(MASK))
    return folder


@pytest.fixture(scope="module")
def network(inputs: Path) -> nn.Module:
    """The masked network, pruned here by hand."""
    network = tiny()
    load_checkpoint(network, inputs / "weights.safetensors")
    with torch.no_grad():
        network[1].weight[2] = network[1].bias[2] = 0
        network[6].weight[:, :2] = 0
    return network.eval()


def options(inputs: Path, out: Path) -> ApplyConfig:
    return ApplyConfig(
        model=f"{inputs / 'network.py'}:tiny", checkpoint=inputs / "weights.safetensors", mask=inputs / "mask.json",
        data=str(inputs / "images"), defence_size=9, mean=MEAN, std=STD, threads=1, out=out,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deployed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, written by the command in a process of its own, in which a warning is an error."""
    out = tmp_path_factory.mktemp("deployed") / "new" / "out"
    paths = {
        "--model": "network.py:tiny",
        "--checkpoint": "weights.safetensors",
        "--mask": "mask.json",
        "--data": "images",
    }
    arguments = [part for option, name in paths.items() for part in (option, str(inputs / name))]
    arguments += ["--defence-size", "9", "--threads", "1", "--out", str(out)]
    arguments += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    script = "import atexit, runpy, sys; atexit.register(lambda: print('attacks', 'onp.attacks' in sys.modules)); "
    script += "runpy.run_module('onp.apply', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 189 units pruned: 1 removed, 2 kept as zeros" in done.stdout
    assert "6.input [0, 1]: an input position goes with its whole channel alone: 6 still reads it" in done.stdout
    assert "attacks False" in done.stdout
    return out


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def expected(network: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        return network((given - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))


# --- what is written --------------------------------------------------------------------------------------


def test_the_folder_holds_what_was_asked_for(deployed: Path) -> None:
    assert {path.name for path in deployed.iterdir()} == FILES
    assert [path.name for path in deployed.parent.iterdir()] == ["out"]


def test_the_weights_are_the_masked_ones(deployed: Path, network: nn.Module) -> None:
    weights = safetensors.torch.load_file(deployed / "purified.safetensors")
    wanted = network.state_dict()
    assert set(weights) == set(wanted) and all(torch.equal(value, wanted[name]) for name, value in weights.items())


def test_the_smaller_network_is_smaller_and_says_the_same(deployed: Path, network: nn.Module) -> None:
    shapes = {name: tuple(value.shape) for name, value in
              safetensors.torch.load_file(deployed / "shrunk.safetensors").items()}  # fmt: skip
    assert shapes["0.weight"] == (3, 3, 3, 3) and shapes["1.running_var"] == (3,) and shapes["3.weight"] == (5, 3, 1, 1)
    assert shapes["6.weight"] == (3, 180)
    smaller = load_shrunk(tiny(), deployed / "shrunk.safetensors")
    torch.testing.assert_close(expected(smaller, images(4)), expected(network, images(4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 130])
def test_program_and_onnx_take_any_number_of_images_in_0_1(count: int, deployed: Path, network: nn.Module) -> None:
    program = torch.export.load(deployed / "program.pt2").module()
    session = onnxruntime.InferenceSession(deployed / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = expected(network, images(count))
    torch.testing.assert_close(program(images(count)), wanted, rtol=1e-5, atol=1e-5)
    (logits,) = session.run(["logits"], {"images": images(count).numpy()})
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_the_record_tells_what_became_of_every_unit(deployed: Path) -> None:
    record = json.loads((deployed / "deploy.json").read_text())
    assert (record["units"], record["units_pruned"], record["units_removed"]) == (189, 3, 1)
    assert record["removed"] == [{"layer": "1", "units": [2]}]
    (zeros,) = record["kept_as_zeros"]
    assert (zeros["layer"], zeros["units"]) == ("6.input", [0, 1])
    # Gone: 27 weights and a bias, gamma and beta, and what 5 filters read of the channel.
    full = 4 * 28 + 8 + 5 * 5 + 3 * 181
    assert record["parameters"] == [full, full - 28 - 2 - 5]
    assert record["multiply_adds"] == [36 * 4 * 27 + 36 * 20 + 540, 36 * 3 * 27 + 36 * 15 + 540]
    assert all(0 <= file["deviation"] < 1e-5 for file in record["files"].values()) and len(record["files"]) == 4
    assert record["files"]["purified.safetensors"]["deviation"] == 0


def test_the_same_command_writes_the_same_bytes(deployed: Path, inputs: Path, tmp_path: Path) -> None:
    """In another process, under another name; so no file holds a time, or a path."""
    apply(options(inputs, tmp_path / "again"))
    for name in FILES - {"deploy.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (deployed / name).read_bytes(), name
    again, first = (json.loads((folder / "deploy.json").read_text()) for folder in (tmp_path / "again", deployed))
    assert again == first
    here = str(ROOT).encode()
    assert not any(here in path.read_bytes() for path in deployed.iterdir())


def test_a_choice_of_formats(inputs: Path, tmp_path: Path) -> None:
    apply(replace(options(inputs, tmp_path / "out"), formats=("safetensors",)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"deploy.json", "purified.safetensors"}


# --- what goes wrong --------------------------------------------------------------------------------------


def test_bad_options_leave_nothing(inputs: Path, tmp_path: Path) -> None:
    good = options(inputs, tmp_path / "out")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[dict[str, object], type[OnpError], str]] = [
        ({"mask": tmp_path / "absent.json"}, MaskError, "no readable JSON"),
        ({"mask": tmp_path / "broken.json"}, MaskError, "no readable JSON"),
        ({"model": f"{inputs / 'network.py'}:other"}, CheckpointError, "does not fit"),
        ({"out": tmp_path / "file"}, ConfigError, "new or empty folder"),
        ({"out": tmp_path / "full"}, ConfigError, "new or empty folder"),
        ({"out": tmp_path / "file" / "out"}, ConfigError, "cannot be written"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            apply(replace(good, **change))  # type: ignore[arg-type]
        assert sorted(tmp_path.rglob("*")) == before, change


def test_a_mask_for_another_network_is_refused(inputs: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({**MASK, "units": 464, "pruned": {"conv1": [2]}}))
    with pytest.raises(MaskError, match="for a network of 464 units"):
        apply(replace(options(inputs, tmp_path / "out"), mask=mask))
    assert [path.name for path in tmp_path.iterdir()] == ["mask.json"]


def test_a_mask_of_a_run_is_for_the_checkpoint_of_that_run(inputs: Path, tmp_path: Path) -> None:
    """Units of another network of the same architecture would fit, and mean nothing."""
    (tmp_path / "run" / "masks").mkdir(parents=True)
    mask, report = tmp_path / "run" / "masks" / "onp.json", tmp_path / "run" / "report.json"
    mask.write_text(json.dumps(MASK))
    asked = replace(options(inputs, tmp_path / "deploy"), mask=mask, formats=("safetensors",))
    report.write_text(json.dumps({"checkpoint_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="onp.json was made for another checkpoint than .*weights.safetensors"):
        apply(asked)
    assert not (tmp_path / "deploy").exists()
    report.write_text(json.dumps({"checkpoint_sha256": sha256(inputs / "weights.safetensors")}))
    assert apply(asked) == 0


def test_a_run_knows_its_network_mask_and_images(tmp_path: Path) -> None:
    from tiny_run import tiny_options  # a process of its own that imports this file does not find it

    complete_run(replace(tiny_options(tmp_path), run_dir=tmp_path / "run"), Console(quiet=True))
    asked = ApplyConfig(run=tmp_path / "run", out=tmp_path / "deploy", formats=("safetensors", "shrunk"), threads=1)
    assert apply(asked) == 0
    assert sha256(tmp_path / "deploy" / "purified.safetensors") == sha256(tmp_path / "run" / "purified.safetensors")
    moved = (tmp_path / "weights.safetensors").rename(tmp_path / "moved.safetensors")
    assert apply(replace(asked, checkpoint=moved, out=tmp_path / "again")) == 0
    for changes, words in (
        ({"out": tmp_path / "third"}, "weights.safetensors' does not exist"),
        ({"mean": MEAN, "std": STD}, "--run knows mean, std; leave that out"),
        ({"run": None}, "no --checkpoint, --mask, --data: give --run"),
        ({"run": tmp_path}, "is not a run folder"),
    ):
        with pytest.raises(OnpError, match=words):
            apply(replace(asked, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("disk full")])
def test_stopping_in_the_middle_leaves_nothing(
    failure: BaseException, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(*arguments: object) -> float:
        seen.extend(path.name for path in tmp_path.rglob("*.safetensors"))
        raise failure

    monkeypatch.setattr(command, "export_program", stop)
    with pytest.raises(type(failure)):
        apply(options(inputs, tmp_path / "out"))
    assert sorted(seen) == ["purified.safetensors", "shrunk.safetensors"], "it stopped too early to tell"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_and_the_rest_is_there(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object) -> float:
        raise ModelError("it branches on values")

    monkeypatch.setattr(command, "export_program", stop)
    assert apply(options(inputs, tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "program.pt2").exists()
    for name in ("purified.safetensors", "shrunk.safetensors", "shrunk.json", "model.onnx"):
        assert (tmp_path / "out" / name).exists(), name
    files = json.loads((tmp_path / "out" / "deploy.json").read_text())["files"]
    assert files["program.pt2"] == {"error": "it branches on values"} and "deviation" in files["model.onnx"]
    assert "not written: it branches on values" in capsys.readouterr().out


def test_a_killed_command_leaves_no_folder_of_that_name(inputs: Path, tmp_path: Path) -> None:
    """Killed when all but one file is written; the next attempt goes through."""
    script = (
        "import os, signal; from pathlib import Path; from onp import apply as command; "
        "import tests.test_apply as here; "
        "command.export_program = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL); "
        f"command.apply(here.options(Path({str(inputs)!r}), Path({str(tmp_path / 'out')!r})))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.rglob("shrunk.safetensors")), "it stopped too early to tell"
    assert not (tmp_path / "out").exists()
    apply(replace(options(inputs, tmp_path / "out"), formats=("safetensors",)))
    assert (tmp_path / "out" / "deploy.json").is_file()


def test_accuracy_is_recorded_and_shown(deployed: Path, inputs: Path, network: nn.Module) -> None:
    """A wrong normalisation is the same on both sides of every deviation; accuracy tells."""
    files = [inputs / "images" / "train" / f"class{number % 3}" / f"{number}.png" for number in range(9)]
    images = torch.stack([torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    labels = torch.arange(9) % 3
    original = tiny().eval()
    load_checkpoint(original, inputs / "weights.safetensors")
    expected = [
        float((module(Normalisation(MEAN, STD)(images)).argmax(1) == labels).float().mean())
        for module in (original, network)
    ]
    assert json.loads((deployed / "deploy.json").read_text())["accuracy"] == pytest.approx(expected)


def test_without_the_packages_for_onnx(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onp.export.ONNX_PACKAGES", ("onnx", "no_such_runtime"))
    with pytest.raises(ConfigError, match="needs no_such_runtime: pip install no_such_runtime, or"):
        apply(options(inputs, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


class Noisy(nn.Module):
    """Its dropout is never off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(x.flatten(1)))


class Data(nn.Module):
    """Python control flow that depends on the images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    for model, message in ((Noisy().eval(), "deviate"), (Data(), "cannot be written as program.pt2")):
        with pytest.raises(ModelError, match=message):
            export_program(model, images(8), tmp_path / "program.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", [export_program, export_onnx])
def test_a_file_that_says_something_else_does_not_appear(
    export: Callable[..., float], network: nn.Module, tmp_path: Path
) -> None:
    path, normalise, wanted = tmp_path / "file", Normalisation(MEAN, STD), expected(network, images(8))
    with pytest.raises(ModelError, match="deviate"):
        export(network, images(8), path, normalise, wanted + 1)
    assert list(tmp_path.iterdir()) == []
    assert export(network, images(8), path, normalise, wanted) < 1e-5
    assert list(tmp_path.iterdir()) == [path]
