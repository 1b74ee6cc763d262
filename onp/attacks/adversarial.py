"""Adversarial perturbation by projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.data import Normalisation


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalise: Normalisation,
    device: torch.device,
    radius: float = 16 / 255,
    steps: int = 10,
    batch_size: int = 250,
) -> Tensor:
    """Images in [0, 1], nowhere more than `radius` away, on which `model` is as wrong as `steps` signed steps get it.

    `images` has shape (n, channels, height, width), `labels` (n,).
    """
    model.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        clean = images[start : start + batch_size].to(device)
        truth, moved = labels[start : start + batch_size].to(device), clean.clone()
        for _ in range(steps):
            moved.requires_grad_(True)
            loss = F.cross_entropy(model(normalise(moved)), truth, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2.5 * radius / steps * gradient.sign()
            moved = (clean + (moved - clean).clamp(-radius, radius)).clamp(0, 1)
        parts.append(moved.cpu())
    return torch.cat(parts)
