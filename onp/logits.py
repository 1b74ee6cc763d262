"""Logits of many images, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BATCH = 100
"""images that go through a network at a time"""


def logits_of(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """What `model`, in eval mode, says about `inputs`, shape (n, classes)."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(BATCH)])
