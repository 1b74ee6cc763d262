"""What several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # networks this small lose by threads; cores are for workers (-n)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A test that runs a command may leave other threads, and with them other rounding, to those behind it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def randomised() -> Callable[..., nn.Module]:
    """`randomised(model, seed)`: random affine and running statistics in every batch-norm, eval mode.

    Fresh batch-norms (gamma 1, beta 0, mean 0, variance 1) would hide errors.
    """

    def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                size = module.num_features
                module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
                if module.affine:
                    module.weight.data.copy_(0.5 + torch.rand(size, generator=generator))
                    module.bias.data.copy_(0.3 + torch.rand(size, generator=generator))
        return model.eval()

    return randomise
