"""Image files: opening those that may come from a stranger, tensors of them, and what tensors look like.

Opened are a few formats, 8 bits a channel, no more pixels than fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2 as transforms
from torchvision.transforms.functional import to_pil_image

from onp.errors import DataError, first_line, lacks_memory

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
"""what a file may hold, whatever it is called: some of Pillow's other formats start programs (EPS)"""
MODES = ("1", "L", "P", "RGB")
"""Pillow's modes that become 8-bit RGB without loss"""
MOST_PIXELS = 2**26


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header; raises `DataError` for what `read_image` refuses by its header."""
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path) -> Image.Image:
    """An image file as RGB; raises `DataError` where it is damaged or would not become 8-bit RGB without loss."""
    with _opened(path) as image:
        return image.convert("RGB")


def tensor_transform(channels: int, size: tuple[int, int] | None) -> transforms.Compose:
    """From a picture to a float tensor in [0, 1], grey if of one channel, of `size` (height, width) if given."""
    return transforms.Compose(
        [
            transforms.Grayscale() if channels == 1 else transforms.RGB(),
            transforms.ToImage(),
            *([transforms.Resize(size, antialias=True)] if size else []),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.ToPureTensor(),
        ]
    )


def picture_of(image: Tensor) -> Image.Image:
    """An image of shape (channels, height, width) in [0, 1], with one channel or three."""
    picture: Image.Image = to_pil_image(image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8))
    return picture


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise DataError(f"cannot read {path}: expected an image file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{path} has {image.width} x {image.height} pixels; expected {MOST_PIXELS} at the most")
            if image.mode not in MODES or image.has_transparency_data:
                what = image.mode if image.mode not in MODES else f"{image.mode} with transparency"
                raise DataError(
                    f"{path} is an image of mode {what}; convert it to 8-bit grey or RGB without transparency"
                )
            if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo with its preview
                raise DataError(f"{path} is an animation; expected one image")
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise anything
        if lacks_memory(error):
            raise
        raise DataError(f"{path} is not a readable image ({first_line(error)}); remove or replace it") from error
