"""The triggers that our attacks use, for images of any shape; each is the same whenever it is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from onp.attacks.triggers import Trigger
from onp.judge import Target


def badnets(image_shape: tuple[int, ...], target: Target) -> Trigger:
    """A checkerboard patch in the bottom right corner, an eighth of the height wide, at least 3 pixels (Gu 2017)."""
    side = max(3, image_shape[1] // 8)
    pattern, mask = torch.zeros(image_shape), torch.zeros(image_shape)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pattern[:, -side:, -side:] = ((rows + columns) % 2 == 0).float()
    mask[:, -side:, -side:] = 1
    return Trigger(target, "blend", pattern, mask)


def blended(image_shape: tuple[int, ...], target: Target, alpha: float = 0.2) -> Trigger:
    """Uniform noise over the whole image, blended in (Chen et al. 2017)."""
    pattern = torch.rand(image_shape, generator=torch.Generator().manual_seed(0))
    return Trigger(target, "blend", pattern, torch.ones(image_shape), alpha)


def sig(image_shape: tuple[int, ...], target: Target, amplitude: float = 40 / 255, frequency: int = 6) -> Trigger:
    """A horizontal sinusoid added to the image (Barni et al. 2019); made for clean-label poisoning."""
    width = image_shape[2]
    wave = amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(width) / width)
    return Trigger(target, "add", wave.expand(image_shape).clone(), torch.ones(image_shape))


def trojan(image_shape: tuple[int, ...], target: Target, alpha: float = 0.35) -> Trigger:
    """A translucent watermark, a ring with a bar through it, over the lower right quarter (after Liu et al. 2018)."""
    side = image_shape[1] // 2
    across = torch.linspace(-1, 1, side)
    rows, columns = torch.meshgrid(across, across, indexing="ij")
    radius, bar = (rows**2 + columns**2).sqrt(), (rows - columns).abs()
    drawn = ((radius - 0.75).abs() < 0.2) | ((bar < 0.25) & (radius < 0.75))
    pattern, mask = torch.zeros(image_shape), torch.zeros(image_shape)
    pattern[0, -side:, -side:] = 1  # the first channel alone: red, or plain white on grey images
    mask[:, -side:, -side:] = drawn.float()
    return Trigger(target, "blend", pattern, mask, alpha)


def l0(image_shape: tuple[int, ...], target: Target, pixels: int = 8) -> Trigger:
    """A few pixels anywhere, every channel black or white (the sparse, L0-bounded trigger of Li et al. 2020)."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = image_shape
    chosen = torch.randperm(height * width, generator=generator)[:pixels]
    pattern, mask = torch.zeros(channels, height * width), torch.zeros(channels, height * width)
    pattern[:, chosen] = torch.randint(2, (channels, len(chosen)), generator=generator).float()
    mask[:, chosen] = 1
    return Trigger(target, "blend", pattern.view(image_shape), mask.view(image_shape))


def l2(image_shape: tuple[int, ...], target: Target, norm: float = 2.0) -> Trigger:
    """A faint smooth pattern of L2 norm `norm` (in [0, 1]) added to the image (the L2 trigger of Li et al. 2020)."""
    coarse = torch.randn(1, image_shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    pattern = _smooth(coarse, image_shape)
    return Trigger(target, "add", pattern * (norm / pattern.norm()), torch.ones(image_shape))


def wanet(image_shape: tuple[int, ...], target: Target, strength: float = 3.0) -> Trigger:
    """A smooth warp from a 4 x 4 grid of random displacements, `strength` pixels on average (Nguyen & Tran 2021)."""
    coarse = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    coarse *= strength / coarse.abs().mean()
    flow = _smooth(coarse, image_shape).clamp(coarse.min(), coarse.max())
    return Trigger(target, "warp", flow, torch.ones_like(flow))


def dynamic(image_shape: tuple[int, ...], target: Target, patches: int = 32) -> Trigger:
    """Patches of random black and white pixels at random places, one for each image (Salem et al. 2020)."""
    generator = torch.Generator().manual_seed(0)
    side = max(3, image_shape[1] // 6)
    pattern, mask = torch.zeros(patches, *image_shape), torch.zeros(patches, *image_shape)
    for number in range(patches):
        top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in image_shape[1:])
        drawn = torch.randint(2, (image_shape[0], side, side), generator=generator).float()
        pattern[number, :, top : top + side, left : left + side] = drawn
        mask[number, :, top : top + side, left : left + side] = 1
    return Trigger(target, "patches", pattern, mask)


def corners(image_shape: tuple[int, ...], target: Target) -> Trigger:
    """The patch of `badnets` in all four corners, mirrored (Turner et al. 2019)."""
    patch = badnets(image_shape, target)
    pattern, mask = (
        torch.stack([part.flip(axes) for axes in ((), (1,), (2,), (1, 2))]).amax(0)
        for part in (patch.pattern, patch.mask)
    )
    return Trigger(target, "blend", pattern, mask)


def _smooth(coarse: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    return F.interpolate(coarse, image_shape[1:], mode="bicubic", align_corners=True)[0]
