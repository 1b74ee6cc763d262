"""Triggers and their JSON specification.

A specification names the target class, the mode and files beside it:

    {"target": 5, "mode": "blend", "pattern": "grid.png", "mask": "grid_mask.png", "alpha": 1.0}

`blend` makes (1 - alpha * mask) * x + alpha * mask * pattern (mask: everywhere by default), `add` makes
clip(x + pattern, 0, 1). Patterns and masks are images in [0, 1], or `.npy` arrays of shape (channels, height, width),
which may be negative. A trigger is applied to images in [0, 1], after resizing and before normalisation.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onp.checkpoints import write_atomically
from onp.errors import DataError

Mode = Literal["blend", "add"]


@dataclass(frozen=True, eq=False)
class Trigger:
    """An all-to-one trigger; `pattern` and `mask` have shape (channels, height, width)."""

    target: int
    mode: Mode
    pattern: Tensor
    mask: Tensor
    alpha: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to images of shape (n, channels, height, width) in [0, 1]."""
        if self.mode == "add":
            return (images + self.pattern).clamp(0, 1)
        weight = self.alpha * self.mask
        return (1 - weight) * images + weight * self.pattern

    def save(self, path: Path) -> None:
        """Write the specification to `path` (.json) and pattern and mask beside it as float32 `.npy` files."""
        record: dict[str, Any] = {"target": self.target, "mode": self.mode, "alpha": self.alpha}
        for name in ("pattern", "mask"):
            record[name] = f"{path.stem}_{name}.npy"
            array = getattr(self, name).numpy().astype(np.float32)
            write_atomically(path.with_name(record[name]), partial(np.save, arr=array))
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n"))


def load_trigger(path: Path, image_shape: tuple[int, ...], num_classes: int) -> Trigger:
    """Read a specification for images of `image_shape`; raises `DataError` naming what is wrong with it."""
    try:
        spec = json.loads(path.read_text())
        target, mode = operator.index(spec["target"]), spec["mode"]
        pattern = _read_array(path.parent / spec["pattern"], image_shape)
        mask = _read_array(path.parent / spec["mask"], image_shape) if spec.get("mask") else torch.ones(image_shape)
        alpha = float(spec.get("alpha", 1.0))
    except OSError as error:
        raise DataError(
            f"trigger {str(path)!r}: cannot read {error.filename or path}; expected a JSON file and its patterns"
        ) from error
    except (EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"trigger {str(path)!r} is not a specification ({type(error).__name__}: {error}); "
            "expected target, mode, pattern and perhaps mask, alpha"
        ) from error
    if mode not in get_args(Mode):
        raise DataError(f"trigger {str(path)!r} has mode {mode!r}; expected one of {', '.join(get_args(Mode))}")
    if not 0 <= target < num_classes:
        raise DataError(f"trigger {str(path)!r} has target {target}; the network knows classes 0 to {num_classes - 1}")
    if not 0 <= alpha <= 1:
        raise DataError(f"trigger {str(path)!r} has alpha {alpha}; expected 0 to 1")
    return Trigger(target, mode, pattern, mask, alpha)


def _read_array(path: Path, image_shape: tuple[int, ...]) -> Tensor:
    if path.suffix == ".npy":
        array = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    else:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if image_shape[0] == 1 else "RGB"), dtype=np.float32) / 255
        array = torch.from_numpy(pixels.reshape(*pixels.shape[:2], image_shape[0])).permute(2, 0, 1)
    if tuple(array.shape) != tuple(image_shape):
        raise DataError(f"trigger pattern {path} has shape {tuple(array.shape)}; the images have {tuple(image_shape)}")
    if not bool(torch.isfinite(array).all()):
        raise DataError(f"trigger pattern {path} holds values that are not finite")
    return array.contiguous()


def badnets(image_shape: tuple[int, ...], target: int) -> Trigger:
    """A checkerboard patch in the bottom right corner, an eighth of the height wide, at least 3 pixels (Gu 2017)."""
    side = max(3, image_shape[1] // 8)
    pattern, mask = torch.zeros(image_shape), torch.zeros(image_shape)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pattern[:, -side:, -side:] = ((rows + columns) % 2 == 0).float()
    mask[:, -side:, -side:] = 1
    return Trigger(target, "blend", pattern, mask)


def blended(image_shape: tuple[int, ...], target: int, alpha: float = 0.2) -> Trigger:
    """Uniform noise over the whole image, blended in (Chen et al. 2017)."""
    pattern = torch.rand(image_shape, generator=torch.Generator().manual_seed(0))
    return Trigger(target, "blend", pattern, torch.ones(image_shape), alpha)


def sig(image_shape: tuple[int, ...], target: int, amplitude: float = 40 / 255, frequency: int = 6) -> Trigger:
    """A horizontal sinusoid added to the image (Barni et al. 2019); made for clean-label poisoning."""
    width = image_shape[2]
    wave = amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(width) / width)
    return Trigger(target, "add", wave.expand(image_shape).clone(), torch.ones(image_shape))
