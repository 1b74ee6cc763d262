"""Where images come from: folders, data sets of a name, and defence data drawn from them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets

from onp.data import DefenceData, Normalisation, balanced_order
from onp.errors import DataError, first_line
from onp.images import image_size, read_image, tensor_transform
from onp.paths import real_path

Split = Literal["train", "test"]
ImageDataset = Dataset[tuple[Tensor, int]]
NAMED_DATA = ("digits", "cifar10", "fashion_mnist", "gtsrb")
"""data sets that `--data` knows by name; all but `digits` are downloaded by torchvision"""
GREY = ("digits", "fashion_mnist")
"""those of one channel"""
logger = logging.getLogger(__name__)
IN_MEMORY = 1 << 30
"""bytes of images that are read once and kept, rather than read again"""


def _check_numbers(names: list[str]) -> None:
    """Warn where classes that are numbers are not in their order, or where one seems to be missing."""
    numbers = [int(name) for name in names]
    if numbers != sorted(numbers):
        logger.warning(
            "classes are taken in the order %s, ...; if the network's outputs are in that of the numbers, "
            "rename them: 02, not 2",
            ", ".join(names[:4]),
        )
        return
    first = numbers[0] if numbers[0] in (0, 1) else 0
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if number != first + place:
            logger.warning(
                "class %s is taken for the network's output %d, as there is no class %d before it; a class without "
                "images needs an empty folder",
                name, place, first + place,
            )  # fmt: skip
            return


class ImageFolder(datasets.ImageFolder):
    """torchvision's image folder, with the classes of the training folder and one clear error for a broken image."""

    def __init__(self, root: Path, transform: Any, classes: list[str] | None = None) -> None:
        self.given_classes = classes
        super().__init__(str(root), transform)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        # What Jupyter, Git or macOS leave beside the classes is none.
        found = [name for name in super().find_classes(directory)[0] if not name.startswith((".", "__MACOSX"))]
        if not found:
            raise FileNotFoundError
        if self.given_classes is None:
            if all(name.isdecimal() for name in found):
                _check_numbers(found)
            return found, {name: number for number, name in enumerate(found)}
        unknown = sorted(set(found) - set(self.given_classes))
        if unknown:
            raise DataError(f"{directory} has classes {unknown} that the training folder lacks")
        known = {name: number for number, name in enumerate(self.given_classes) if name in found}
        return self.given_classes, known

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Paths and labels in torchvision's order. Links inside a class are not followed: they may run in circles."""
        samples = []
        for name, label in class_to_idx.items():
            walked = sorted(os.walk(os.path.join(directory, name)))
            files = [os.path.join(root, file) for root, _, names in walked for file in sorted(names)]
            images = [(file, label) for file in files if file.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
            if not images:
                logger.warning("no images in %s/%s; the classes behind it keep their numbers", directory, name)
            samples += images
        if not samples:
            raise DataError(f"no images in {directory}: expected CLASS/IMAGE.png or .jpg")
        return samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        assert self.transform is not None
        return self.transform(read_image(Path(path))), label


def named_folders(pairs: Iterable[str]) -> dict[str, str]:
    """Where data sets of a name lie, of `NAME=FOLDER`s, absolute. Raises `DataError` for another kind of pair."""
    folders = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if name not in NAMED_DATA or not folder:
            raise DataError(f"--folders {pair}: expected NAME=FOLDER with a name of {', '.join(NAMED_DATA)}")
        folders[name] = str(real_path(folder, "--folders"))
    return folders


def load_dataset(
    data: str, split: Split, channels: int, image_size: int | None, download_root: Path
) -> ImageDataset | None:
    """Open one split of `data`: a name of `NAMED_DATA`, or a folder that holds train/ and perhaps test/.

    Images come as float tensors in [0, 1] of shape (channels, height, width), resized to `image_size` if given.
    Returns None where a folder has no test/. Raises `DataError` where there is nothing to read.
    """
    if data == "digits":
        return _digits(split, image_size or 16, channels)
    size = image_size or (32 if data == "gtsrb" else None)
    transform = tensor_transform(channels, (size, size) if size else None)
    return (
        _folder(Path(data), split, transform, bool(size))
        if data not in NAMED_DATA
        else _download(data, split, transform, download_root)
    )


def _folder(root: Path, split: Split, transform: Any, resized: bool) -> ImageDataset | None:
    if not (root / "train").is_dir():
        raise DataError(
            f"data {str(root)!r} is neither a folder that holds train/CLASS/IMAGE nor one of {', '.join(NAMED_DATA)}"
        )
    if split == "test" and not (root / "test").is_dir():
        return None
    try:
        train = ImageFolder(root / "train", transform)
        dataset = train if split == "train" else ImageFolder(root / "test", transform, train.classes)
    except FileNotFoundError as error:
        raise DataError(f"no images in {root / split}: expected {split}/CLASS/IMAGE.png or .jpg") from error
    _check_sizes(dataset, root / split, resized)
    return dataset


def _check_sizes(dataset: ImageFolder, root: Path, resized: bool) -> None:
    dataset[0]
    shapes = {image_size(Path(path)) for path, _ in dataset.samples} if not resized else set()
    if len(shapes) > 1:
        raise DataError(f"images in {root} differ in size ({', '.join(map(str, sorted(shapes)))}); give --image-size")


def _download(data: str, split: Split, transform: Any, root: Path) -> ImageDataset:
    train = split == "train"
    try:
        if data == "cifar10":
            return datasets.CIFAR10(str(root), train, transform, download=True)
        if data == "gtsrb":
            return datasets.GTSRB(str(root), split, transform, download=True)
        return datasets.FashionMNIST(str(root), train, transform, download=True)
    except Exception as error:
        raise DataError(
            f"torchvision could not provide {data} in {root} ({first_line(error)}); "
            "check the network, or give an image folder"
        ) from error


def _digits(split: Split, size: int, channels: int) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, grey, enlarged from 8 x 8: 1,297 to train on and 500 to test on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, channels, -1, -1)
    labels = torch.tensor(bunch.target)
    order = balanced_order(labels, seed=0)
    chosen = order[500:] if split == "train" else order[:500]
    return TensorImages(images[chosen], labels[chosen])


class Thinned(Subset[tuple[Tensor, int]]):
    """At most `size` images of a dataset, evenly drawn along its order."""

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        labels = labels_of(dataset)
        size = min(size, len(labels))
        super().__init__(dataset, [number * len(labels) // size for number in range(size)])
        self.targets = [labels[index] for index in self.indices]


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images and labels held in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


def in_memory(dataset: ImageDataset, most: int = IN_MEMORY) -> ImageDataset:
    """The same images held in memory, where they take at most so many bytes; else `dataset` itself."""
    labels = labels_of(dataset)
    if isinstance(dataset, TensorImages) or len(labels) * dataset[0][0].nbytes > most:
        return dataset
    held, done = torch.empty(len(labels), *dataset[0][0].shape), 0  # joining batches would take twice the memory
    for images, _ in batches(dataset):
        held[done : done + len(images)] = images
        done += len(images)
    return TensorImages(held, torch.tensor(labels))


def labels_of(dataset: ImageDataset) -> list[int]:
    """All labels without loading the images where the dataset knows them."""
    targets: Sequence[int] | Tensor | None = getattr(dataset, "targets", None)
    if targets is not None:
        return [int(label) for label in targets]
    if isinstance(dataset, datasets.GTSRB):
        return [label for _, label in dataset._samples]
    return [int(dataset[index][1]) for index in range(len(dataset))]  # type: ignore[arg-type]


def class_count(dataset: ImageDataset) -> int:
    """The number of classes that the training data names."""
    classes = getattr(dataset, "classes", None)
    return len(classes) if classes else max(labels_of(dataset)) + 1


def draw_defence_data(
    dataset: ImageDataset, size: int, num_classes: int, normalise: Normalisation, seed: int
) -> DefenceData:
    """Draw `size` images, equally many per class as far as they go. Raises `DataError` where that is impossible."""
    labels = torch.tensor(labels_of(dataset))
    if not 1 <= size <= len(labels):
        raise DataError(f"--defence-size {size}: expected 1 to {len(labels)}, the number of images in train/")
    if int(labels.max()) >= num_classes:
        raise DataError(
            f"the data has labels up to {int(labels.max())}; the network knows classes 0 to {num_classes - 1}"
        )
    order = balanced_order(labels, seed)[:size]
    images = torch.stack([dataset[i][0] for i in order.tolist()])
    return DefenceData(images, labels[order], num_classes, normalise)


def batches(dataset: ImageDataset, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels in order, as tensors of up to `batch_size`."""
    yield from DataLoader(dataset, batch_size=batch_size)
