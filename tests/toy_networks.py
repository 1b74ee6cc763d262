"""Networks small enough to check by hand, which several test files share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.data import DefenceData, Normalisation
from onp.models import build_model


class TinyNet(nn.Module):
    """Convolution, batch-norm, ReLU, mean, hidden linear layer (no batch-norm), linear: 6 gated units of 9."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 3)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.bn(self.conv(x)).relu().mean((2, 3))))


class PlainNet(nn.Module):
    """conv-bn, conv without bn, flatten to 3 x 4 x 4, hidden linear with bn, hidden linear without, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.fc1 = nn.Linear(3 * 4 * 4, 7)
        self.bn2 = nn.BatchNorm1d(7)
        self.fc2 = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return self.head(F.relu(self.fc2(F.relu(self.bn2(self.fc1(x))))))


class PostActivation(nn.Module):
    """stem - block(conv-bn-relu-conv-bn, + identity, relu) - block with a 1x1 shortcut - pooling - logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv3, self.bn3 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.short, self.bn4 = nn.Conv2d(3, 6, 1, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        x = F.relu(out)
        x = F.relu(self.bn3(self.conv3(x)) + self.bn4(self.short(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """stem without bn; bn-relu-conv-bn-relu-conv added to the stream; last bn reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.bn3(x)), 1).flatten(1))


class Dense(nn.Module):
    """DenseNet-like: bn reads the concatenation of stem (3 channels) and growth convolution (2 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.norm1, self.grow = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(F.relu(self.norm1(x)))], 1)
        return self.head(F.relu(self.norm2(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * scale.view(scale.size(0), 6, 1, 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.depth, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depth(F.relu(self.stem(x)))))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


class Twice(nn.Module):
    """The same conv-bn applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.shared, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.shared(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patch embedding, one Linear-GELU-Linear block on tensors of shape (n, 4 tokens, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.norm = nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def conv_net(*head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), *head)


IMAGE = (1, 8, 8)
TOYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (PlainNet, IMAGE),
    "post_activation": (PostActivation, IMAGE),
    "pre_activation": (PreActivation, IMAGE),
    "dense": (Dense, IMAGE),
    "squeeze_excite": (SqueezeExcite, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "twice": (Twice, IMAGE),
    "transformer": (Transformer, IMAGE),
    "small_cnn": (lambda: build_model("small_cnn", 1, 10), IMAGE),
    "small_vgg": (lambda: build_model("small_vgg", 3, 10), (3, 32, 32)),
    "wide_resnet16_1": (lambda: build_model("wide_resnet16_1", 3, 10), (3, 16, 16)),
    "preact_resnet18": (lambda: build_model("preact_resnet18-w8", 3, 10), (3, 16, 16)),
    "cifar_vgg16_bn": (lambda: build_model("cifar_vgg16_bn-w8", 3, 10), (3, 32, 32)),
    "cifar_mobilenet_v2": (lambda: build_model("cifar_mobilenet_v2-w0.25", 3, 10), (3, 32, 32)),
}


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Logits that are a linear function of the pixels; `weight` has shape (classes, pixels)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias if bias is not None else torch.zeros(len(weight)))
    return nn.Sequential(nn.Flatten(), layer).eval()


class EveryKind(nn.Module):
    """Units of all four kinds: conv without and with batch-norm, batch-norm alone, linear, linear_input."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(1, 3, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.alone = nn.BatchNorm2d(3)
        self.hidden, self.out = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.softplus(self.plain(x))
        x = x + nn.functional.softplus(self.norm(self.conv(x)))
        x = nn.functional.avg_pool2d(self.alone(x), 4)
        return self.out(nn.functional.softplus(self.hidden(x.flatten(1))))


def grey_images() -> DefenceData:
    """Noise in three classes, normalised."""
    images = torch.rand((20, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return DefenceData(images, torch.arange(20) % 3, 3, Normalisation((0.4,), (0.5,)))
