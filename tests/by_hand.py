"""Independent computations that several test files compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onp.data import DefenceData, random_crop_and_flip


def known_views(model: nn.Module, data: DefenceData) -> Tensor:
    """Cropped and flipped images in [0, 1], one by one; where the network misses the label, the image itself."""
    shown = []
    for image, view, label in zip(
        data.images, random_crop_and_flip(data.images, seed=0, part=16), data.labels, strict=True
    ):
        with torch.no_grad():
            guess = int(model(data.normalise(view.unsqueeze(0))).argmax())
        shown.append(view if guess == int(label) else image)
    return torch.stack(shown)
