"""PreActResNet-18 (He et al. 2016b), with the keys of the well-known CIFAR code (no last batch-norm)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from onp.models.resnet import ResNet18


class PreActBlock(nn.Module):
    """Batch-norm and ReLU before each 3 x 3 convolution; a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet18(ResNet18):
    """ResNet-18 of such blocks."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__(PreActBlock, in_channels, num_classes, width)
