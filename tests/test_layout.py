"""Channels lie last, but where oneDNN would write beyond its buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onp.layout import fastest_layout
from onp.models import build_model


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (build_model("cifar_resnet18-w8", 3, 10), torch.channels_last),
        (build_model("wide_resnet16_1", 3, 10), torch.channels_last),
        (build_model("cifar_resnet18-w4", 3, 10), torch.contiguous_format),
        (nn.Conv2d(4, 8, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(4, 8, 3, stride=2), torch.channels_last),
        (nn.Conv2d(4, 8, 1), torch.channels_last),
    ],
)
def test_narrow_strided_convolutions_are_not_laid_out_channels_last(
    model: nn.Module, layout: torch.memory_format
) -> None:
    assert fastest_layout(model) == layout
