"""The defence data, the only data that the defending path ever sees, and how it is drawn on.

Everywhere in the project an image is a float tensor in [0, 1]; a network's input normalisation is applied
last, by `Normalisation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

from onp.errors import DataError
from onp.seeding import seeded


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

    def without_majority(self) -> DefenceData:
        """No more images of one class than of all others together, drawn at random; for labels of one class, all.

        Where most images are of one class, the smallest trigger that leads "most images" there is none at all.
        """
        counts = self.labels.bincount()
        most, rest = int(counts.argmax()), len(self) - int(counts.max())
        if not 0 < rest < len(self) - rest:
            return self
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).to(self.labels.device)
        spare = shuffled[self.labels[shuffled] == most][rest:]
        kept = torch.ones_like(self.labels, dtype=torch.bool)
        kept[spare] = False
        return self.subset(kept.nonzero().flatten())

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
