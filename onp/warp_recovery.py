"""Recover the warp that a network may hide, from clean images.

A warp has no mask that Neural Cleanse could find. So for every class the smallest smooth displacement field that sends
clean images to it is optimised, interpolated from a coarse grid as WaNet's is (Nguyen & Tran 2021, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.config import WarpRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.logits import logits_of
from onp.smallest import SmallestSearch, SmallestTrigger


@dataclass(frozen=True, eq=False)
class RecoveredWarp(SmallestTrigger):
    """The smallest warp that works, and the evidence against every class."""

    target: int
    """class with the smallest warp"""
    flow: Tensor
    """(2, height, width), pixels to the right and further down; 0 where no warp worked"""
    sizes: tuple[float, ...]
    """per class, the mean displacement of its smallest warp, in pixels; infinite where no warp worked"""
    agreement: float = 0.0
    """fraction of the images of other classes that the unlearned copy, too, sends to `target` under the doubled warp"""

    def __call__(self, images: Tensor) -> Tensor:
        """Warp images of shape (n, channels, height, width) twice as far, as a `Patch` is doubled."""
        return warp(images, (2 * self.flow).expand(len(images), *self.flow.shape))

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest size that a warp counts as, in pixels.

        Below a 640th of the height images are sent to the class without it; beyond an eighth it is no hidden one.
        """
        height = self.flow.shape[1]
        return height / 640, height / 8

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, for keeping."""
        sizes, agreement = (torch.tensor(value, dtype=torch.float64) for value in (self.sizes, self.agreement))
        return {"flow": self.flow.cpu(), "sizes": sizes, "agreement": agreement}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> RecoveredWarp:
        """The inverse of `tensors`."""
        sizes = tensors["sizes"]
        flow, agreement = tensors["flow"].to(device), float(tensors["agreement"])
        return cls(int(sizes.argmin()), flow, tuple(sizes.tolist()), agreement)


def warp(images: Tensor, flows: Tensor) -> Tensor:
    """Bilinear samples of each image at its pixels plus its flow; (n, channels, h, w) and (n, 2, h, w), in pixels."""
    height, width = images.shape[2:]
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    last = torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=images.device)
    where = torch.stack(torch.meshgrid(columns, rows, indexing="xy")) + flows
    grid = where.permute(0, 2, 3, 1) / last * 2 - 1
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def recover_warp(
    model: nn.Module,
    unlearned: nn.Module,
    data: DefenceData,
    config: WarpRecoveryConfig,
    seed: int,
) -> RecoveredWarp:
    """Optimise the warps of all classes side by side, and the most promising ones for as long again.

    Then ask the `unlearned` copy of `model` about the smallest.
    """
    with frozen(model):
        search = _Search(model, data, config, seed)
        search.optimise(classes := torch.arange(data.num_classes))
        search.optimise(search.promising(classes, config.finalists))
    target = int(search.sizes.argmin())
    found = RecoveredWarp(target, search.flows[target], tuple(search.sizes.tolist()))
    answers = logits_of(unlearned.eval(), data.normalise(found(data.images))).argmax(1)
    others = data.labels != target
    if min(found.sizes) == float("inf") or not bool(others.any()):
        return found
    return replace(found, agreement=float((answers[others] == target).float().mean()))


class _Search(SmallestSearch):
    """Smallest working warps so far, and where their optimisation stands, class by class."""

    enough, ample = 0.8, 0.9
    betas = (0.9, 0.999)

    def __init__(self, model: nn.Module, data: DefenceData, config: WarpRecoveryConfig, seed: int) -> None:
        classes, (_, height, width), device = data.num_classes, data.input_shape, data.images.device
        self.unit = height / 32
        config = replace(config, size_weight=config.size_weight / self.unit)
        super().__init__((model,), data, config, seed, torch.arange(classes))
        self.variables = (torch.randn(classes, 2, config.grid, config.grid, generator=self.generator).to(device),)
        self.flows = torch.zeros(classes, 2, height, width, device=device)
        self.found = (self.flows,)

    def trigger(self, images: Tensor, *variables: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        (coarse,) = variables
        flows = self.unit * F.interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=True)
        sizes = flows.square().sum(1).add(1e-12).sqrt().mean((1, 2))
        warped = warp(images.repeat(len(flows), 1, 1, 1), flows.repeat_interleave(len(images), 0))
        return warped.unflatten(0, (len(flows), len(images))), sizes, (flows,)
