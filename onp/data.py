"""Images: where they come from, and the defence data, the only data that the defending path ever sees.

Everywhere in the project an image is a float tensor in [0, 1]; a network's input normalisation is applied
last, by `Normalisation`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from onp.errors import DataError, first_line
from onp.images import image_size, read_image
from onp.paths import real_path
from onp.seeding import seeded

Split = Literal["train", "test"]
ImageDataset = Dataset[tuple[Tensor, int]]
NAMED_DATA = ("digits", "cifar10", "fashion_mnist", "gtsrb")
"""data sets that `--data` knows by name; all but `digits` are downloaded by torchvision"""
GREY = ("digits", "fashion_mnist")
"""those of one channel"""
logger = logging.getLogger(__name__)
IN_MEMORY = 1 << 30
"""bytes of images that are read once and kept, rather than read again"""


@dataclass(frozen=True)
class Normalisation:
    """`(x - mean) / std` per channel; empty tuples leave images as they are."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < value < inf for value in self.std):
            raise DataError(f"--mean {self.mean} and --std {self.std} need equally many values, and every std above 0")
        if not all(map(isfinite, self.mean)):
            raise DataError(f"--mean {self.mean}: expected finite numbers")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images of shape (n, channels, height, width)."""
        if not self.mean:
            return images
        if len(self.mean) not in (1, images.shape[1]):
            raise DataError(f"--mean has {len(self.mean)} values for images of {images.shape[1]} channels")
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


@dataclass(frozen=True, eq=False)
class DefenceData:
    """The clean labelled images that the defender has.

    `images`: (n, channels, height, width) float32 in [0, 1]; `labels`: (n,) int64 in [0, num_classes).
    Raises `DataError` where shapes, ranges or types are off.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    normalise: Normalisation = field(default_factory=Normalisation)

    def __post_init__(self) -> None:
        for name, dtype in (("images", torch.float32), ("labels", torch.int64)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise DataError(f"defence {name} are of type {kind}; expected a tensor of type {dtype}")
        if self.images.ndim != 4 or len(self.images) == 0:
            raise DataError(
                f"defence images have shape {tuple(self.images.shape)}; expected (n, channels, height, width), n > 0"
            )
        if self.labels.shape != (len(self.images),):
            raise DataError(
                f"labels have shape {tuple(self.labels.shape)}; expected one for each of the {len(self.images)} images"
            )
        least, most = self.images.min().item(), self.images.max().item()
        if not 0 <= least <= most <= 1:  # NaN neither
            raise DataError(
                f"defence images have values from {least:.4g} to {most:.4g}; expected [0, 1], since `normalise` is "
                "applied to them"
            )
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise DataError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}; "
                f"the network knows classes 0 to {self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        return f"DefenceData({len(self)} images of {shape}, {self.num_classes} classes)"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @cached_property
    def inputs(self) -> Tensor:
        """The images as the network takes them."""
        return self.normalise(self.images)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of `logits`, shape (n, classes), in nats."""
        return F.cross_entropy(logits, self.labels)

    def subset(self, indices: Tensor) -> DefenceData:
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def halves(self, seed: int) -> tuple[DefenceData, DefenceData]:
        """Two class-balanced halves: one to search on, one held out for choosing the final mask."""
        order = balanced_order(self.labels, seed, turns=2)
        if len(order) < 2:
            return self, self
        return self.subset(order[0::2]), self.subset(order[1::2])

    def to(self, device: torch.device) -> DefenceData:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def balanced_order(labels: Tensor, seed: int, turns: int = 1) -> Tensor:
    """All indices, shuffled within classes, classes taking turns: any prefix is as balanced as can be.

    Classes come in pairs of turns, so that every second index of the order is balanced too.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    turn = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members), device=labels.device)
    rounds, rest = turn[shuffled] // turns, turn[shuffled] % turns
    classes = int(labels.max()) + 1
    return shuffled[torch.argsort((rounds * classes + labels[shuffled]) * turns + rest)]


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


# --- sources --------------------------------------------------------------------------------------------


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
    grey = channels == 1 or data == "fashion_mnist"
    convert = [transforms.Grayscale(channels)] if grey else []
    size = image_size or (32 if data == "gtsrb" else None)
    resize = [transforms.Resize((size, size), antialias=True)] if size else []
    transform = transforms.Compose(
        [
            *convert,
            transforms.ToImage(),
            *resize,
            transforms.ToDtype(torch.float32, scale=True),
            transforms.ToPureTensor(),
        ]
    )
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


def random_crop_and_flip(images: Tensor, seed: int, part: int = 8, flip: bool = True) -> Tensor:
    """Zero-pad by 1/`part` of the height (4 of 32 pixels), crop at random and, with `flip`, flip half of the images.

    `images` has shape (n, channels, height, width); every image draws its own crop and flip.
    """
    padding = images.shape[2] // part
    crop = transforms.Compose(
        [transforms.RandomCrop(images.shape[2:], padding=padding), transforms.RandomHorizontalFlip(0.5 * flip)]
    )
    with seeded(seed):
        return torch.stack([crop(image) for image in images])


def augmented_batches(
    data: DefenceData, batch_size: int, generator: torch.Generator, flip: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch of (inputs, labels), randomly cropped and, with `flip`, flipped, then normalised.

    A last batch of a single image is left out, since batch-norm cannot train on it, unless it is all there is.
    """
    for indices in torch.randperm(len(data), generator=generator).split(batch_size):
        if len(indices) == 1 < len(data):
            continue
        batch = data.subset(indices.to(data.images.device))
        images = random_crop_and_flip(batch.images, int(torch.randint(2**31, (1,), generator=generator)), flip=flip)
        yield data.normalise(images), batch.labels
