"""Triggers and their JSON specification.

A specification names the target class, the mode and files beside it:

    {"target": 5, "mode": "blend", "pattern": "grid.png", "mask": "grid_mask.png", "alpha": 1.0}

- `blend` makes (1 - alpha * mask) * x + alpha * mask * pattern (mask: everywhere by default).
- `add` makes clip(x + pattern, 0, 1).
- `patches` blends one of several patterns and masks, arrays of shape (patches, channels, height, width); the image's
  pixels decide which, so that an image gets the same one in any batch.
- `warp` samples the image elsewhere; the pattern, of shape (2, height, width), says how many pixels to the right and
  further down.

Patterns and masks are images in [0, 1], or `.npy` arrays of shape (channels, height, width); what is added may be
negative. A trigger is applied to images in [0, 1], after resizing and before normalisation. The target "all-to-all"
means that an image of class y is to get class y + 1, and the last class the first.
"""

from __future__ import annotations

import errno
import json
import operator
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onp.checkpoints import write_atomically, write_json
from onp.errors import DataError
from onp.images import read_image
from onp.judge import ALL_TO_ALL, Target

Mode = Literal["blend", "add", "patches", "warp"]
MOST_PATCHES = 1024


@dataclass(frozen=True, eq=False)
class Trigger:
    """A trigger to one class or all to all, which changes an image in the same way in any batch.

    `pattern` and `mask` have the shape that the mode asks for, as a rule (channels, height, width).
    """

    target: Target
    mode: Mode
    pattern: Tensor
    mask: Tensor
    alpha: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to images of shape (n, channels, height, width) in [0, 1]."""
        if self.mode == "add":
            return (images + self.pattern).clamp(0, 1)
        if self.mode == "warp":
            return _warp(images, self.pattern)
        which = ... if self.mode == "blend" else _digest(images) % len(self.pattern)
        weight = self.alpha * self.mask[which]
        return (1 - weight) * images + weight * self.pattern[which]

    def disturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A warp plus noise of up to a pixel, drawn for each image and position (WaNet's noise mode)."""
        noise = torch.rand(len(images), *self.pattern.shape, generator=generator) * 2 - 1
        return _warp(images, self.pattern + noise)

    def save(self, path: Path) -> None:
        """Write the specification to `path` (.json) and pattern and mask beside it as float32 `.npy` files."""
        record: dict[str, Any] = {"target": self.target, "mode": self.mode, "alpha": self.alpha}
        for name in ("pattern", "mask"):
            record[name] = f"{path.stem}_{name}.npy"
            array = getattr(self, name).numpy().astype(np.float32)
            write_atomically(path.with_name(record[name]), partial(np.save, arr=array))
        write_json(path, record)


def _warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of each image at its pixels plus `flow`, of shape (2, h, w) or (n, 2, h, w), kept inside."""
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    last = torch.tensor([width - 1, height - 1]).view(2, 1, 1)
    where = (torch.stack((columns, rows)) + flow).clamp(torch.zeros_like(last), last) / last.clamp(min=1) * 2 - 1
    grid = where.expand(len(images), 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.to(images), align_corners=True)


def _digest(images: Tensor) -> Tensor:
    """A number for each image from its pixels, rounded to 255ths: whole numbers add up the same in any order."""
    pixels = (images * 255).round().long().flatten(1)
    return (pixels * (torch.arange(1, pixels.shape[1] + 1, device=images.device) * 40503 % 65521)).sum(1) % 1000003


def load_trigger(path: Path, image_shape: tuple[int, ...], num_classes: int) -> Trigger:
    """Read a specification for images of `image_shape`; raises `DataError` naming what is wrong with it."""
    try:
        spec = json.loads(_file(path).read_text(encoding="utf-8"))
        if not isinstance(spec, dict):
            raise TypeError("no object")
        expected = "expected target, mode, pattern and perhaps mask, alpha"
        if missing := [name for name in ("target", "mode", "pattern") if name not in spec]:
            raise DataError(f"trigger {str(path)!r} lacks {', '.join(missing)}; {expected}")
        if unknown := sorted(set(spec) - {"target", "mode", "pattern", "mask", "alpha"}):
            raise DataError(f"trigger {str(path)!r} has {', '.join(unknown)}; {expected}")
        target, mode = spec["target"], spec["mode"]
        target = target if target == ALL_TO_ALL else operator.index(target)
        if mode not in get_args(Mode):
            raise DataError(f"trigger {str(path)!r} has mode {mode!r}; expected one of {', '.join(get_args(Mode))}")
        shapes = {"warp": (2, *image_shape[1:]), "patches": (None, *image_shape)}
        ranges = {"add": (-1.0, 1.0), "warp": (-max(image_shape), max(image_shape))}
        pattern = _read_array(path.parent / spec["pattern"], shapes.get(mode, image_shape), *ranges.get(mode, (0, 1)))
        whole = torch.ones_like(pattern)
        mask = _read_array(path.parent / spec["mask"], tuple(whole.shape)) if spec.get("mask") else whole
        alpha = float(spec.get("alpha", 1.0))
    except OSError as error:
        raise DataError(
            f"trigger {str(path)!r}: cannot read {error.filename or path}; expected a JSON file and its patterns"
        ) from error
    except (EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"trigger {str(path)!r} is not a specification ({type(error).__name__}: {error}); "
            "expected target, mode, pattern and perhaps mask, alpha"
        ) from error
    if target != ALL_TO_ALL and not 0 <= target < num_classes:
        raise DataError(f"trigger {str(path)!r} has target {target}; the network knows classes 0 to {num_classes - 1}")
    if not 0 <= alpha <= 1:
        raise DataError(f"trigger {str(path)!r} has alpha {alpha}; expected 0 to 1")
    return Trigger(target, mode, pattern, mask, alpha)


def _file(path: Path) -> Path:
    """`path`; raises `OSError` where it is no file: a pipe would wait for ever."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path


def _read_array(path: Path, shape: tuple[int | None, ...], low: float = 0, high: float = 1) -> Tensor:
    """An array of `shape`, whose first size may be open (None), with values from `low` to `high`.

    Images fit shapes of (channels, height, width).
    """
    if path.suffix == ".npy":
        try:
            array = np.load(_file(path), mmap_mode="r", allow_pickle=False)  # mapped: a header may claim any size
        except OSError:
            raise
        except Exception as error:  # numpy reads the header as Python source, and lets out what that raises
            raise DataError(f"trigger pattern {path} is no plain .npy array ({str(error)[:120]})") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise DataError(f"trigger pattern {path} is {getattr(array, 'dtype', 'an archive')}; expected real numbers")
    else:
        pixels = np.asarray(read_image(path).convert("L" if shape[0] == 1 else "RGB"), dtype=np.float32) / 255
        array = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    found = array.shape
    if len(found) != len(shape) or any(want not in (size, None) for size, want in zip(found, shape, strict=True)):
        expected = str(tuple(shape)).replace("None", "patches")
        raise DataError(f"trigger pattern {path} has shape {found}; expected {expected} for these images")
    if not 1 <= found[0] <= MOST_PATCHES:
        raise DataError(f"trigger pattern {path} has {found[0]} patches; expected 1 to {MOST_PATCHES}")
    with np.errstate(over="ignore"):
        values = np.array(array, dtype=np.float32, order="C")
    if not bool(np.isfinite(values).all()):
        raise DataError(f"trigger pattern {path} holds values that are not finite")
    if values.min() < low - 1e-6 or values.max() > high + 1e-6:
        raise DataError(
            f"trigger pattern {path} runs from {values.min():.3g} to {values.max():.3g}; expected {low} to {high}"
        )
    return torch.from_numpy(values)
