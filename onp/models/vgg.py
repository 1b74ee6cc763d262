"""VGG-16 with batch-norm for 32 x 32 images (Simonyan & Zisserman 2015), with the keys of the well-known CIFAR code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""per stage: its width, in widths of the first, and its number of convolutions"""


class CifarVGG16(nn.Module):
    """Thirteen 3 x 3 convolutions with batch-norm and ReLU, five poolings, and one linear layer.

    The first stage has `width` channels. Images of 32 x 32 leave a single position to the linear layer.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor, convolutions in STAGES:
            for _ in range(convolutions):
                outputs = factor * width
                layers += [nn.Conv2d(in_channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                in_channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))
