"""ResNet-18 for small images: a 3 x 3 stem without pooling (He et al. 2016, section 4.2, at ImageNet's widths)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch-norm; the addition comes before the last ReLU (post-activation)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Stem and four stages of two blocks, of `width`, 2 x, 4 x and 8 x as many channels, then one linear layer."""

    def __init__(
        self, block: Callable[[int, int, int], nn.Module], in_channels: int, num_classes: int, width: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(block(width, width, 1), block(width, width, 1))
        self.layer2 = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(block(2 * width, 4 * width, 2), block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(block(4 * width, 8 * width, 2), block(8 * width, 8 * width, 1))
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the first stage."""
        return self.conv1(x)


class CifarResNet18(ResNet18):
    """With blocks that end in a ReLU, and batch-norm and ReLU behind the stem."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__(BasicBlock, in_channels, num_classes, width)
        self.bn1 = nn.BatchNorm2d(width)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))
