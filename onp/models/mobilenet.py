"""torchvision's MobileNetV2 (Sandler et al. 2018) with a stem and strides for 32 x 32 images."""

from __future__ import annotations

from torch import nn
from torchvision.models import MobileNetV2

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""per stage: expansion, channels, blocks, stride; torchvision's, but for the second stage's stride"""


class CifarMobileNetV2(MobileNetV2):
    """The stem and the second stage keep the resolution; `width` multiplies every stage's channels."""

    def __init__(self, in_channels: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__(num_classes, width, [list(stage) for stage in STAGES])
        stem = self.features[0][0]
        self.features[0][0] = nn.Conv2d(in_channels, stem.out_channels, 3, 1, 1, bias=False)
