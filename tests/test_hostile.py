"""Files that a stranger made to do harm, or that are broken in a way that no decoder notices."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from onp.attacks.triggers import load_trigger
from onp.bench.suite import read_suites
from onp.checkpoints import load_checkpoint, read_json, read_tensors
from onp.data import Normalisation
from onp.datasets import ImageDataset, class_count, labels_of, load_dataset
from onp.errors import CheckpointError, ConfigError, DataError, FileError, OnpError
from onp.images import read_image
from onp.inputs import InputConfig
from onp.masks import KeepMask
from onp.run_folder import RunFolder
from onp.samples import load_samples
from onp.units import index_units


@pytest.fixture(autouse=True)
def at_most_ten_minutes() -> Iterator[None]:
    """What waits for ever fails, rather than the whole suite."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()


def check_refused(path: Path, words: str) -> None:
    model, before = network(), network().state_dict()
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- checkpoints ------------------------------------------------------------------------------------------------

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda value: value.to(torch.int8),
    "bool": lambda value: value.bool(),
    "complex64": lambda value: value.to(torch.complex64),
    "float8_e5m2": lambda value: value.to(torch.float8_e5m2),
    "sparse_coo": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_weights_have_to_be_plain_floats(tmp_path: Path, kind: str) -> None:
    weights = network().state_dict()
    torch.save(weights | {"3.weight": ODD[kind](weights["3.weight"])}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", rf"3\.weight is .*{'' if kind == 'meta' else kind}.*, expected float32")


def test_buffers_of_other_types_are_weights(tmp_path: Path) -> None:
    model = network()
    model.register_buffer("seen", torch.tensor([True, False]))
    torch.save({**model.state_dict(), "seen": torch.tensor([False, True])}, tmp_path / "w.pth")
    load_checkpoint(model, tmp_path / "w.pth")
    assert model.get_buffer("seen").tolist() == [False, True]
    torch.save({**model.state_dict(), "seen": torch.tensor([1.0, 0.0])}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="seen is float32, expected bool"):
        load_checkpoint(model, tmp_path / "w.pth")


def test_counters_have_to_be_integers(tmp_path: Path) -> None:
    torch.save(network().state_dict() | {"1.num_batches_tracked": torch.tensor(0.5)}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", r"1\.num_batches_tracked is float32, expected int64")


def test_shared_and_strided_weights_are_weights(tmp_path: Path) -> None:
    weights = network().state_dict()
    whole = torch.rand(12, 4)
    torch.save(
        weights | {"3.weight": whole.T[:2], "1.weight": whole[0, :3], "1.bias": whole[0, :3]}, tmp_path / "w.pth"
    )
    model = network()
    load_checkpoint(model, tmp_path / "w.pth")
    assert torch.equal(model.get_parameter("3.weight"), whole.T[:2])
    assert torch.equal(model.get_parameter("1.bias"), whole[0, :3])


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(file, "w", compression) as other:
        for name in archive.namelist():
            other.writestr(name, change(name, archive.read(name)))
    path.write_bytes(file.getvalue())


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(network().state_dict() | {"x": torch.zeros(10**7)}, path)
    repacked(path, lambda name, part: part, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    check_refused(path, "parts are larger than the file")


def test_a_storage_that_is_declared_larger_than_the_file(tmp_path: Path) -> None:
    """A weight of the right shape in a storage of 2^40 numbers: what the file holds is read, and nothing behind it."""
    path, weight = tmp_path / "w.pth", torch.rand(2, 12)
    torch.save(network().state_dict() | {"3.weight": weight}, path)

    def change(name: str, part: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return part
        place = part.index(b"K\x18", part.index(b"3.weight"))  # the number of elements, 24, as the pickle has it
        return part[:place] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + part[place + 2 :]

    repacked(path, change)
    model = network()
    load_checkpoint(model, path)
    assert torch.equal(model.get_parameter("3.weight"), weight)


def test_a_damaged_part_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(network().state_dict(), path)
    content = path.read_bytes()
    weight = network().state_dict()["3.weight"].numpy().tobytes()
    assert content.count(weight) == 1
    path.write_bytes(content.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    check_refused(path, "is damaged")


class Allowed:
    """A type that some library has allowed for its own files."""

    made = 0

    def __setstate__(self, state: object) -> None:
        Allowed.made += 1


def test_no_library_widens_what_a_checkpoint_may_hold(tmp_path: Path) -> None:
    item = Allowed()
    item.__dict__["x"] = 1
    torch.save({"state_dict": network().state_dict(), "note": item}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Allowed]):
        check_refused(tmp_path / "w.pth", "not a file of plain weights")
        assert Allowed.made == 0
        assert set(torch.serialization.get_safe_globals()) == {*before, Allowed}, "not as it was"
        torch.load(tmp_path / "w.pth", weights_only=True)
    assert Allowed.made == 1, "it would have been made"


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda weights: weights, None),
        (lambda weights: {"net": weights, "acc": 91.5}, "weights under 'net'"),
        (lambda weights: {f"module.{key}": value for key, value in weights.items()}, "prefix 'module.' dropped"),
        (
            lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
            "weights under 'state_dict', prefix 'module.' dropped",
        ),
    ],
)
def test_the_log_names_what_was_unwrapped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrap: Any, said: str | None
) -> None:
    torch.save(wrap(network().state_dict()), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "onp"):
        load_checkpoint(network(), tmp_path / "w.pth")
    assert [record.getMessage() for record in caplog.records] == ([f"{tmp_path / 'w.pth'}: {said}"] if said else [])


def test_a_prefix_of_some_keys_is_no_wrapper(tmp_path: Path) -> None:
    weights = network().state_dict()
    torch.save(weights | {"module.3.bias": torch.ones(2)}, tmp_path / "w.pth")
    check_refused(tmp_path / "w.pth", r"unexpected keys module\.3\.bias")


# --- images -----------------------------------------------------------------------------------------------------


def saved(path: Path, mode: str, **options: Any) -> Path:
    Image.new(mode, (4, 4)).save(path, **options)
    return path


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">II", width, height) + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_images(folder: Path) -> dict[str, tuple[Path, str]]:
    """Broken images by what is wrong with them, and what is said of it."""
    folder.mkdir()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "wide.png").write_bytes(png(9_000, 9_000))
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    (folder / "text.png").write_text("no image\n")
    os.mkfifo(folder / "pipe.png")
    saved(folder / "palette.png", "P", transparency=0)
    return {
        "alpha": (saved(folder / "alpha.png", "RGBA"), "mode RGBA"),
        "grey and alpha": (saved(folder / "grey_alpha.png", "LA"), "mode LA"),
        "print colours": (saved(folder / "print.jpg", "CMYK"), "mode CMYK"),
        "16 bits": (folder / "deep.png", "mode I"),
        "transparent palette": (folder / "palette.png", "P with transparency"),
        "several frames": (folder / "animated.png", "animation"),
        "a program": (folder / "eps.png", "not a readable image"),
        "text": (folder / "text.png", "not a readable image"),
        "60,000 x 60,000": (folder / "bomb.png", "bomb.png"),
        "9,000 x 9,000": (folder / "wide.png", "pixels"),
        "a pipe": (folder / "pipe.png", "cannot read"),
        "a folder": (folder, "cannot read"),
    }


def test_bad_images_are_refused_one_by_one(tmp_path: Path) -> None:
    for what, (path, words) in bad_images(tmp_path / "images").items():
        with pytest.raises(DataError, match=words) as caught:
            read_image(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value), what


def test_samples_are_images_like_all_others(tmp_path: Path) -> None:
    for number, (what, (path, words)) in enumerate(bad_images(tmp_path / "images").items()):
        if path.is_dir():
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{path.stem}.png").symlink_to(path)
        with pytest.raises(DataError, match=words):
            load_samples(folder, (3, 4, 4), resize=True)
            raise AssertionError(what)


def test_pipes_are_waited_for_by_nothing(tmp_path: Path) -> None:
    for name in ("pipe.json", "pipe.npy"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "trigger.json").write_text('{"target": 1, "mode": "add", "pattern": "pipe.npy"}')
    with pytest.raises(FileError, match="pipe.json is no readable JSON"):
        read_json(tmp_path / "pipe.json")
    for name, words in (("pipe.json", "cannot read .*pipe.json"), ("trigger.json", "cannot read .*pipe.npy")):
        with pytest.raises(DataError, match=words):
            load_trigger(tmp_path / name, (3, 4, 4), 3)


@pytest.mark.parametrize("name", ["a\0b.pth", "\ud800.pth"])
def test_what_cannot_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--checkpoint .* is no path"):
        InputConfig(checkpoint=Path(name)).resolved()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_good_modes(tmp_path: Path, mode: str) -> None:
    assert read_image(saved(tmp_path / "i.png", mode)).mode == "RGB"


def opened(root: Path) -> ImageDataset:
    dataset = load_dataset(str(root), "train", 3, None, root)
    assert dataset is not None
    return dataset


def image_folder(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / "train" / name).mkdir(parents=True)
        saved(root / "train" / name / "0.png", "RGB")
    return root


def test_links_in_circles(tmp_path: Path) -> None:
    """Followed, two links to their own folder make 2^40 paths."""
    root = image_folder(tmp_path / "data")
    for name in ("again", "and_again"):
        (root / "train" / "ant" / name).symlink_to(root / "train" / "ant")
    assert labels_of(opened(root)) == [0, 1]


def test_linked_classes_and_images_are_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    (root / "train" / "cow").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "1.png").symlink_to(root / "train" / "ant" / "0.png")
    assert labels_of(opened(root)) == [0, 1, 1, 2, 2]


def test_an_empty_class_is_named_and_the_others_keep_their_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path / "data")
    (root / "train" / "auk").mkdir()
    (root / "train" / "auk" / "notes.txt").write_text("none yet")
    dataset = opened(root)
    assert labels_of(dataset) == [0, 2] and class_count(dataset) == 3  # ant, auk, bee
    assert "train/auk; the classes behind it keep their numbers" in caplog.text


def test_class_folders_that_are_numbered_out_of_order_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path / "data")
    for old, new in (("ant", "2"), ("bee", "10")):
        (root / "train" / old).rename(root / "train" / new)
    assert labels_of(opened(root)) == [0, 1] and "in the order 10, 2" in caplog.text
    caplog.clear()
    (root / "train" / "2").rename(root / "train" / "02")
    assert labels_of(opened(root)) == [0, 1] and "in the order" not in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("0", "1", "3"), "class 3 is taken for the network's output 2, as there is no class 2 before it"),
        (("1", "2", "4"), "class 4 is taken for the network's output 2, as there is no class 3 before it"),
        (("5", "6"), "class 5 is taken for the network's output 0"),
        (("00", "01", "02"), ""),
        (("1", "2", "3"), ""),
    ],
)
def test_a_class_that_seems_to_be_missing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], words: str
) -> None:
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
        saved(tmp_path / "train" / name / "a.png", "RGB")
    assert labels_of(opened(tmp_path)) == list(range(len(names)))
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", "cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        saved(tmp_path / "train" / name / "a.png", "RGB")
    dataset = opened(tmp_path)
    assert class_count(dataset) == 2 and labels_of(dataset) == [0, 1]


@pytest.mark.parametrize(
    ("mean", "std"), [((float("nan"),), (1.0,)), ((0.5,), (float("nan"),)), ((0.5,), (float("inf"),))]
)
def test_normalisation_has_to_be_finite(mean: tuple[float], std: tuple[float]) -> None:
    with pytest.raises(DataError, match="--mean"):
        Normalisation(mean, std)


# --- triggers ---------------------------------------------------------------------------------------------------


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


ARRAYS: dict[str, tuple[bytes | np.ndarray[Any, Any], str]] = {
    "10^12 numbers": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**6, 10**6)}"), "no plain .npy"),
    "2^62 bytes": (
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4, 144115188075855872)}"),
        "no plain .npy",
    ),
    "no header": (npy("((((((("), "no plain .npy"),
    "complex": (np.zeros((1, 4, 4), np.complex64), "real numbers"),
    "text": (np.full((1, 4, 4), "a"), "real numbers"),
    "0 to 255": (np.full((1, 4, 4), 255.0), "runs from 255 to 255; expected 0 to 1"),
    "too large for float32": (np.full((1, 4, 4), 1e300), "not finite"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_triggers(tmp_path: Path, name: str) -> None:
    content, words = ARRAYS[name]
    if isinstance(content, bytes):
        (tmp_path / "p.npy").write_bytes(content)
    else:
        np.save(tmp_path / "p.npy", content)
    (tmp_path / "t.json").write_text('{"target": 1, "mode": "blend", "pattern": "p.npy"}')
    with pytest.raises(DataError, match=words):
        load_trigger(tmp_path / "t.json", (1, 4, 4), 2)


# --- JSON and run folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, "\udcff", "1" * 5000])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FileError, match=r"f\.json is no readable JSON"):
        read_json(tmp_path / "f.json")
    with pytest.raises(DataError, match=r"f\.json"):
        load_trigger(tmp_path / "f.json", (1, 4, 4), 2)
    with pytest.raises(ConfigError, match=r"f\.json"):
        read_suites([tmp_path / "f.json"])


def test_an_entry_names_no_code(tmp_path: Path) -> None:
    (tmp_path / "entry.json").write_text(json.dumps({"name": "a", "model": "evil.py:main", "data": "digits"}))
    with pytest.raises(ConfigError, match=r"entry\.json: model 'evil\.py:main' is code"):
        read_suites([tmp_path])


@pytest.mark.parametrize("content", ["[]", "{}", '{"reward_evaluations": 3}', '{"learning_curve": 7}', "{"])
def test_damaged_results_of_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "onp.json").write_text(content)
    with pytest.raises(FileError, match=r"methods/onp\.json"):
        RunFolder(tmp_path).load("onp", index_units(network(), (1, 4, 4)))


def test_damaged_masks_of_a_run(tmp_path: Path) -> None:
    index = index_units(network(), (1, 4, 4))
    (tmp_path / "masks").mkdir()
    for content in ("{", "[]", '{"rule": "zero"}', json.dumps(KeepMask.all_kept(index).to_json() | {"order": 3})):
        (tmp_path / "masks" / "onp.json").write_text(content)
        with pytest.raises(OnpError):
            RunFolder(tmp_path).load_mask("onp", index)


def test_damaged_tensors_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "rnp_mask_values.safetensors").write_bytes(b"none")
    with pytest.raises(FileError, match="rnp_mask_values"):
        RunFolder(tmp_path).rnp_values()
    with pytest.raises(FileError, match="none"):
        read_tensors(tmp_path / "none.safetensors")
