"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pad by an eighth of the height (4 at 32 pixels) and crop at random; with `flip`, mirror half of the images.

    `images` has shape (n, channels, height, width); every image draws its own crop and flip.
    """
    n, _, height, width = images.shape
    padding = height // 8
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    numbers = torch.arange(n).view(n, 1, 1)
    return padded[numbers, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
