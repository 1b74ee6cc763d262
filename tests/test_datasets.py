"""Where images come from, and the draw of the defence data."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_options
from torch import Tensor

import onp
from onp.data import DefenceData, Normalisation
from onp.datasets import (
    ImageDataset,
    TensorImages,
    batches,
    class_count,
    draw_defence_data,
    in_memory,
    labels_of,
    load_dataset,
)
from onp.errors import DataError
from onp.inputs import InputConfig, open_inputs
from onp.masks import KeepMask
from onp.report import Judge
from onp.units import index_units

PLAIN = Normalisation()


def write_image(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (6, 6)) -> None:
    """`size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 8 training images whose pixels number them (0 to 23); test images of classes ant and cow."""
    for number in range(24):
        name = ("ant", "bee", "cow")[number // 8]
        write_image(tmp_path / "train" / name / f"{number:02}.png", (number, number, number))
    for number, name in ((100, "cow"), (101, "cow"), (102, "ant")):
        write_image(tmp_path / "test" / name / f"{number}.png", (number, number, number))
    return tmp_path


def open_folder(
    root: Path, split: str = "train", channels: int = 3, image_size: int | None = None
) -> ImageDataset | None:
    return load_dataset(str(root), split, channels, image_size, root / "nothing")  # type: ignore[arg-type]


def opened(root: Path, split: str = "train", channels: int = 3, image_size: int | None = None) -> ImageDataset:
    dataset = open_folder(root, split, channels, image_size)
    assert dataset is not None
    return dataset


def numbers(data: DefenceData) -> list[int]:
    return [round(float(image.mean()) * 255) for image in data.images]


def numbered(count: int, classes: int) -> TensorImages:
    """1 x 1 grey images with value i / 255, classes taking turns."""
    return TensorImages(torch.arange(count).view(-1, 1, 1, 1) / 255, torch.arange(count) % classes)


# --- drawing the defence data -----------------------------------------------------------------------------


def test_folder_to_defence_data(folder: Path) -> None:
    data = draw_defence_data(opened(folder), 12, 3, PLAIN, seed=0)
    assert data.images.shape == (12, 3, 6, 6) and data.images.dtype == torch.float32
    assert data.input_shape == (3, 6, 6) and len(data) == 12
    assert Counter(data.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    drawn = numbers(data)
    assert len(set(drawn)) == 12
    assert data.labels.tolist() == [number // 8 for number in drawn]
    for image, number in zip(data.images, drawn, strict=True):
        torch.testing.assert_close(image, torch.full((3, 6, 6), number / 255))


def test_the_seed_decides_the_draw(folder: Path) -> None:
    dataset = opened(folder)
    draws = [numbers(draw_defence_data(dataset, 12, 3, PLAIN, seed)) for seed in (4, 4, 5)]
    assert draws[0] == draws[1]
    assert set(draws[0]) != set(draws[2])


def test_draws_are_as_balanced_as_can_be() -> None:
    uneven = {}
    for size in range(1, 31):
        counts = Counter(draw_defence_data(numbered(60, 6), size, 6, PLAIN, seed=1).labels.tolist())
        per_class = [counts[label] for label in range(6)]
        assert sum(per_class) == size
        if max(per_class) - min(per_class) > 1:
            uneven[size] = per_class
    assert uneven == {}


def test_small_classes_give_all_they_have() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3)
    dataset = TensorImages(torch.rand(23, 1, 2, 2), labels)
    assert Counter(draw_defence_data(dataset, 12, 2, PLAIN, 0).labels.tolist()) == {0: 9, 1: 3}


@pytest.mark.parametrize("size", [12, 20, 47])
def test_halves_are_disjoint_and_balanced(size: int) -> None:
    data = draw_defence_data(numbered(60, 6), size, 6, PLAIN, seed=2)
    first, second = data.halves(seed=3)
    one, two = set(numbers(first)), set(numbers(second))
    assert not one & two and one | two == set(numbers(data))
    assert abs(len(first) - len(second)) <= 1
    for half in (first, second):
        assert half.labels.tolist() == [number % 6 for number in numbers(half)]
        counts = [Counter(half.labels.tolist())[label] for label in range(6)]
        assert max(counts) - min(counts) <= 1
    again = data.halves(seed=3)[0]
    assert torch.equal(again.images, first.images)
    assert set(numbers(data.halves(seed=4)[0])) != one


def test_one_image_has_no_halves() -> None:
    data = draw_defence_data(numbered(6, 2), 1, 2, PLAIN, seed=0)
    assert [numbers(half) for half in data.halves(0)] == [numbers(data)] * 2


@pytest.mark.parametrize("size", [0, -1, 25])
def test_impossible_sizes(folder: Path, size: int) -> None:
    with pytest.raises(DataError, match=f"--defence-size {size}: expected 1 to 24"):
        draw_defence_data(opened(folder), size, 3, PLAIN, seed=0)


def test_labels_have_to_be_classes_of_the_network(folder: Path) -> None:
    with pytest.raises(DataError, match="labels up to 2; the network knows classes 0 to 1"):
        draw_defence_data(opened(folder), 6, 2, PLAIN, seed=0)


# --- folders ----------------------------------------------------------------------------------------------


def test_test_images_get_the_labels_of_the_training_classes(folder: Path) -> None:
    train, test = opened(folder), opened(folder, "test")
    assert class_count(train) == 3 and class_count(test) == 3
    assert labels_of(train) == [0] * 8 + [1] * 8 + [2] * 8
    images, labels = (torch.cat(part) for part in zip(*batches(test, batch_size=2), strict=True))
    pairs = {(round(float(image.mean()) * 255), int(label)) for image, label in zip(images, labels, strict=True)}
    assert pairs == {(100, 2), (101, 2), (102, 0)}
    assert sorted(labels_of(test)) == [0, 2, 2]


def test_an_unknown_test_class(folder: Path) -> None:
    write_image(folder / "test" / "dog" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"\['dog'\] that the training folder lacks"):
        open_folder(folder, "test")


def test_no_test_folder_is_no_error(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "ant" / "0.png", (1, 2, 3))
    assert open_folder(tmp_path, "test") is None


def test_no_training_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "ant" / "0.png", (1, 2, 3))
    for split in ("train", "test"):
        with pytest.raises(DataError, match="neither a folder that holds train/CLASS/IMAGE nor one of digits"):
            open_folder(tmp_path, split)
    with pytest.raises(DataError, match="neither a folder"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("inside", ["train", "train/ant"])
def test_empty_folders(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(DataError, match="no images in .*train"):
        open_folder(tmp_path)


def test_an_empty_test_folder(folder: Path) -> None:
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no images in .*test"):
        open_folder(folder, "test")


@pytest.mark.parametrize("number", [0, 9])
@pytest.mark.parametrize("damage", [lambda content: b"no image", lambda content: content[:-30], lambda content: b""])
def test_a_corrupt_image_is_named(folder: Path, number: int, damage: object) -> None:
    path = folder / "train" / ("ant", "bee")[number // 8] / f"{number:02}.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=f"{number:02}.png is not a readable image"):
        draw_defence_data(opened(folder), 24, 3, PLAIN, seed=0)


def test_differing_sizes(folder: Path) -> None:
    write_image(folder / "train" / "ant" / "00.png", (0, 0, 0), size=(7, 5))
    with pytest.raises(DataError, match=r"differ in size \(\(5, 7\), \(6, 6\)\); give --image-size"):
        open_folder(folder)
    assert {tuple(image.shape) for image, _ in opened(folder, image_size=4)} == {(3, 4, 4)}  # type: ignore[attr-defined]


def test_one_differing_size_among_many(tmp_path: Path) -> None:
    for number in range(40):
        write_image(tmp_path / "train" / "ant" / f"{number:02}.png", (0, 0, 0), size=(7, 5) if number == 33 else (6, 6))
    with pytest.raises(DataError, match="differ in size"):
        draw_defence_data(opened(tmp_path), 40, 1, PLAIN, seed=0)


def test_grey_and_colour(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "ant" / "0.png", (255, 0, 0))
    write_image(tmp_path / "train" / "ant" / "1.png", 51)
    red, grey = (opened(tmp_path, channels=1)[i][0] for i in (0, 1))
    assert red.shape == (1, 6, 6)
    torch.testing.assert_close(red, torch.full((1, 6, 6), 0.299), rtol=0, atol=0.003)  # ITU-R 601 luma
    torch.testing.assert_close(grey, torch.full((1, 6, 6), 0.2))
    red, grey = (opened(tmp_path, channels=3)[i][0] for i in (0, 1))
    assert red[:, 0, 0].tolist() == [1, 0, 0]
    torch.testing.assert_close(grey, torch.full((3, 6, 6), 0.2))
    write_image(tmp_path / "train" / "bee" / "0.png", 51)
    for channels, given in ((3, None), (1, 1)):
        inputs = open_inputs(InputConfig(model="wide_resnet16_1", data=str(tmp_path), channels=given))
        assert inputs.channels == channels and next(inputs.model.parameters()).shape[1] == channels


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test = (load_dataset("digits", split, 1, 8, Path("unused")) for split in ("train", "test"))  # type: ignore[arg-type]
    assert train is not None and test is not None
    assert len(train) == 1297 and len(test) == 500  # type: ignore[arg-type]
    bunch = load_digits()

    def count(images: Tensor, labels: list[int]) -> Counter[tuple[bytes, int]]:
        return Counter((image.numpy().tobytes(), label) for image, label in zip(images, labels, strict=True))

    everything = count(torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16, bunch.target.tolist())
    parts = [count(torch.stack([image for image, _ in part]), labels_of(part)) for part in (train, test)]  # type: ignore[attr-defined]
    assert parts[0] + parts[1] == everything, "every digit once, in one of the two"
    assert set(Counter(labels_of(test)).values()) == {50}
    assert class_count(train) == 10 and train[0][0].shape == (1, 8, 8)
    coloured = load_dataset("digits", "train", 3, 8, Path("unused"))
    assert coloured is not None and torch.equal(coloured[0][0], train[0][0].expand(3, 8, 8))
    enlarged = load_dataset("digits", "train", 1, None, Path("unused"))
    assert enlarged is not None and enlarged[0][0].shape == (1, 16, 16)


# --- few test images, and how often images are read -------------------------------------------------------


def test_few_test_images_are_evenly_drawn(folder: Path) -> None:
    config = InputConfig(model="small_cnn", data=str(folder), image_size=16, test_size=5)
    for number in range(103, 114):
        write_image(folder / "test" / "cow" / f"{number}.png", (number, number, number))
    few = open_inputs(config).dataset("test")
    assert few is not None and labels_of(few) == [0, 2, 2, 2, 2], "of one ant and 13 cows"
    ((images, labels),) = batches(few)
    assert labels.tolist() == labels_of(few)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [102, 101, 105, 108, 111], "numbers 0, 2, 5, 8, 11 of 14"
    assert torch.equal(next(batches(in_memory(few)))[0], images)
    for size in (14, 1000):
        every = open_inputs(replace(config, test_size=size)).dataset("test")
        assert every is not None and labels_of(every) == [0] + 13 * [2]
    train = open_inputs(config).dataset("train")
    assert train is not None and len(labels_of(train)) == 24


def test_few_images_are_read_once(folder: Path) -> None:
    dataset = opened(folder, "test")
    held = in_memory(dataset)
    assert labels_of(held) == labels_of(dataset) and in_memory(held) is held
    assert in_memory(dataset, most=3 * 3 * 6 * 6 * 4 - 1) is dataset
    (images, labels), (again, _) = next(batches(dataset)), next(batches(held))
    for path in folder.rglob("test/*/*.png"):
        path.unlink()
    assert torch.equal(images, again) and torch.equal(next(batches(held))[0], images)
    assert labels.tolist() == labels_of(held)


def test_judging_reads_the_test_images_once(tmp_path: Path) -> None:
    options = tiny_options(tmp_path)
    inputs = open_inputs(options)
    judge, whole = Judge(inputs, options.trigger), KeepMask.all_kept(index_units(inputs.model, (3, 8, 8)))
    first = judge(whole)
    shutil.rmtree(tmp_path / "images" / "test")
    assert first is not None and judge(whole) == first


def test_named_grey_data_is_grey_from_python_too() -> None:
    assert onp.load_defence_data("digits", size=10).input_shape == (1, 16, 16)
    assert onp.load_defence_data("digits", size=10, channels=3).input_shape == (3, 16, 16)
    assert "purify" in dir(onp)
