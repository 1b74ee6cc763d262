"""Images of a folder that may hold triggered ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from onp.errors import DataError
from onp.images import read_image, tensor_transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of shape (n, channels, height, width) in [0, 1], and where they lie."""

    paths: tuple[Path, ...]
    images: Tensor


def load_samples(folder: Path, shape: tuple[int, ...], resize: bool) -> Samples:
    """Read every image in `folder` and below, in the order of their paths.

    `shape` is (channels, height, width). Raises `DataError` where there is none, where one cannot be read, or where
    one has another size and `resize` is false.
    """
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    paths = tuple(path for path in found if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise DataError(f"--samples {folder}: no images found; give a folder that holds {', '.join(IMG_EXTENSIONS)}")
    if skipped := len(found) - len(paths):
        logger.warning("--samples %s: skipped, since their suffix is no image's: %d", folder, skipped)
    return Samples(paths, torch.stack([_read(path, shape, resize) for path in paths]))


def _read(path: Path, shape: tuple[int, ...], resize: bool) -> Tensor:
    channels, height, width = shape
    picture = read_image(path)
    if not resize and picture.size != (width, height):
        found = f"{picture.width} x {picture.height}"
        raise DataError(f"{path} is {found}, the network's images are {width} x {height}; give --image-size")
    image: Tensor = tensor_transform(channels, (height, width))(picture)
    return image
