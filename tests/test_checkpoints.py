"""Checkpoints: every form that loads, every damage that does not, and whole files or none."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from onp.checkpoints import load_checkpoint, save_weights, sha256, write_atomically
from onp.errors import CheckpointError

Weights = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


@pytest.fixture
def weights() -> Weights:
    """Weights unlike those of `network()`, statistics included."""
    generator = torch.Generator().manual_seed(9)
    return {
        key: torch.tensor(17) if key.endswith("tracked") else torch.rand(value.shape, generator=generator)
        for key, value in network().state_dict().items()
    }


def bits(model: nn.Module) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in model.state_dict().items()}


def check_refused(path: Path, words: str) -> None:
    model = network()
    before = bits(model)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(model, path)
    assert bits(model) == before
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- what loads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "net", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes(tmp_path: Path, weights: Weights, wrapper: str | None, prefix: str) -> None:
    content: Any = {prefix + key: value for key, value in weights.items()}
    torch.save({wrapper: content, "epoch": 3, "acc": 91.5} if wrapper else content, tmp_path / "w.pth")
    model = network()
    load_checkpoint(model, tmp_path / "w.pth")
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_safetensors(tmp_path: Path, weights: Weights) -> None:
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    model = network()
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_float16_weights_become_float32(tmp_path: Path, weights: Weights, name: str) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(half, tmp_path / name)
    model = network()
    load_checkpoint(model, tmp_path / name)
    for key, value in model.state_dict().items():
        assert value.dtype == weights[key].dtype
        assert torch.equal(value, half[key].to(value.dtype))
    assert not torch.equal(model.state_dict()["3.weight"], weights["3.weight"])  # rounded, so really read


def test_batch_counters_may_be_missing(tmp_path: Path, weights: Weights) -> None:
    del weights["1.num_batches_tracked"]
    torch.save(weights, tmp_path / "w.pth")
    model = network()
    load_checkpoint(model, tmp_path / "w.pth")
    assert model.state_dict()["1.num_batches_tracked"] == 0
    assert torch.equal(model.state_dict()["1.running_var"], weights["1.running_var"])


def test_save_and_load(tmp_path: Path, weights: Weights) -> None:
    model, other = network(), network(1)
    model.load_state_dict(weights)
    save_weights(model, tmp_path / "deep" / "er" / "w.safetensors")
    load_checkpoint(other, tmp_path / "deep" / "er" / "w.safetensors")
    assert bits(other) == bits(model)


class Tied(nn.Module):
    """The same linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_tied_weights_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    load_checkpoint(other, tmp_path / "w.safetensors")
    assert bits(other) == bits(model)


# --- what does not ----------------------------------------------------------------------------------------


def test_keys_and_shapes_have_to_fit(tmp_path: Path, weights: Weights) -> None:
    path = tmp_path / "w.pth"
    torch.save({key: value for key, value in weights.items() if key != "1.running_mean"}, path)
    check_refused(path, r"missing keys 1\.running_mean, unexpected keys none")
    torch.save(weights | {"4.weight": torch.ones(2)}, path)
    check_refused(path, r"missing keys none, unexpected keys 4\.weight")
    torch.save(weights | {"3.weight": torch.ones(2, 11)}, path)
    check_refused(path, r"3\.weight is \(2, 11\), expected \(2, 12\)")
    torch.save(weights | {"1.weight": torch.ones(1)}, path)  # would broadcast
    check_refused(path, r"1\.weight is \(1,\), expected \(3,\)")


def test_many_wrong_keys_stay_readable(tmp_path: Path, weights: Weights) -> None:
    torch.save({f"backbone.{key}": value for key, value in weights.items()}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", "and 3 more")  # 8 of 9 keys are required; 5 are named


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var"])
def test_weights_have_to_be_finite(tmp_path: Path, weights: Weights, key: str, value: float) -> None:
    weights[key].view(-1)[1] = value
    torch.save(weights, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", f"NaN or infinite weights in {key}")


def test_weights_have_to_be_finite_in_the_networks_own_type(tmp_path: Path, weights: Weights) -> None:
    torch.save(weights | {"3.bias": torch.tensor([1.0, 1e300], dtype=torch.float64)}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", r"3\.bias")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 700, -1])
def test_truncated_files(tmp_path: Path, weights: Weights, name: str, kept: int) -> None:
    path = tmp_path / name
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    check_refused(path, "not a file of plain weights")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
def test_text_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("accuracy 91.2\n" * 40)
    check_refused(tmp_path / name, "not a file of plain weights")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    check_refused(tmp_path / "none.pth", "does not exist")
    check_refused(tmp_path, "does not exist")


@pytest.mark.parametrize("content", [{}, [1, 2], torch.ones(3), {"state_dict": {}}, {"epoch": 3}, {"net": {"a": 1}}])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", "no state dict")


def test_whole_models_are_not_unpickled(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "w.pth")
    why = r"not a file of plain weights \(it asks for torch\.nn\.[\w.]+, which would run on loading\); give one"
    check_refused(tmp_path / "w.pth", why)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.safetensors"])
@pytest.mark.parametrize("write", [lambda content: pickle.dumps(content, protocol=2), None], ids=["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, weights: Weights, name: str, write: Any) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    content = {"state_dict": weights, "extra": Payload(marker)}
    if write:
        path.write_bytes(write(content))
    else:
        torch.save(content, path)
    check_refused(path, "not a file of plain weights")
    assert not marker.exists()
    if write:
        pickle.loads(path.read_bytes())
    else:
        with path.open("rb") as file:
            torch.load(file, weights_only=False)
    assert marker.exists(), "the payload would have worked"


# --- writing ----------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_write_is_seen_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not path.exists()

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
