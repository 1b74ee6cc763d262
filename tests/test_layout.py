"""Channels lie last, but where oneDNN would write beyond its buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import onp
from onp.config import EnvConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.engine import Engine
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
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    assert fastest_layout(model, (channels, 32, 32)) == layout
    assert fastest_layout(model, (channels, 32, 32), learns=False) == torch.channels_last


class Viewing(nn.Module):
    """LeNet's way of flattening, which a tensor whose channels lie last does not take."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.out = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.out(self.conv2(x).relu().view(x.size(0), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_that_flatten_by_a_view_lie_as_they_can(channels: int) -> None:
    torch.manual_seed(0)
    model = Viewing(channels).eval()
    with pytest.raises(RuntimeError, match="view"):
        Viewing(channels).to(memory_format=torch.channels_last)(torch.rand(2, channels, 8, 8))  # type: ignore[call-overload]
    assert fastest_layout(model, (channels, 8, 8)) == torch.contiguous_format
    data = onp.DefenceData(torch.rand(20, channels, 8, 8), torch.arange(20) % 5, 5)
    index = onp.index_units(model, data.input_shape)
    mask = onp.KeepMask.all_kept(index).without([1, 14])
    with torch.no_grad(), onp.masked(model, mask):
        expected = model(data.inputs)
    assert torch.allclose(Engine(model, index, data.inputs).logits(mask), expected, atol=1e-5)
    recovery = TriggerRecoveryConfig(steps=2)
    quick = EnvConfig(unlearn=UnlearnConfig(max_epochs=1), recovery=recovery, max_steps=2)
    purified = onp.purify(model, data, onp.PurifyConfig(env=quick, always=True, budget=50))
    assert purified.mask.index.layers == index.layers
