"""A small network in its environment, and what its reward is, by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from by_hand import known_views
from torch import Tensor, nn

from envs.pruning import PruningEnv
from onp.clues import Clues
from onp.config import EnvConfig, RewardConfig
from onp.data import DefenceData, Normalisation
from onp.masks import KeepMask, apply_mask
from onp.trigger_recovery import RecoveredTrigger

REWARD = RewardConfig(clean_accuracy=0.7, clean_fidelity=2.0, unlearning=0.5, trigger_resistance=0.4)
HALVES = (1 / 3, 1 / 2)
"""of a `TinyNet`: 2 units of layers 0 and 1 (actions 23 and 24), 4 and 6 of layer 2 (25, 26), 2 of layer 3 (27)"""
STOP = 28


class TinyNet(nn.Module):
    """Units 0-2 (stem) and 3-5 (branch) are tied by a residual sum; 6-17 are flattened positions, 18-22 neurons."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.branch, self.branch_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.hidden, self.out = nn.Linear(12, 5), nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = nn.functional.avg_pool2d((x + self.branch_norm(self.branch(x))).relu(), 4)
        return self.out(self.hidden(x.flatten(1)).relu())


class Unlearned(TinyNet):
    """Stands for the unlearned copy."""


def tiny_data() -> DefenceData:
    images = torch.rand((18, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return DefenceData(images, torch.arange(18) % 3, 3, Normalisation((0.4,), (0.5,)))


def tiny_clues() -> Clues:
    """Another network as unlearned copy, and a corner patch for class 1 that is half trusted."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :3, :3] = 0.9
    return Clues(Unlearned(seed=5), RecoveredTrigger(1, mask, torch.ones(1, 1, 8, 8), (6.0, 4.0, 9.0)))


def make_env(data: DefenceData, clues: Clues, **settings: Any) -> PruningEnv:
    return PruningEnv(TinyNet(), data, EnvConfig(**{"max_steps": 5, "reward": REWARD, **settings}), clues)


def terms_by_hand(data: DefenceData, clues: Clues, mask: KeepMask) -> dict[str, float]:
    """The reward terms from logits of permanently pruned copies, in NumPy; clean ones on cropped and flipped images."""

    def logits(model: nn.Module, images: Tensor, prune: bool = True) -> np.ndarray:
        model = copy.deepcopy(model)
        if prune:
            apply_mask(model, mask)
        with torch.no_grad():
            return model((images - 0.4) / 0.5).double().numpy()

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(1, keepdims=True)

    labels, rows = data.labels.numpy(), np.arange(len(data))
    views = known_views(TinyNet(), data)
    before, after = softmax(logits(TinyNet(), views, prune=False)), softmax(logits(TinyNet(), views))
    cross_entropy = -np.log(softmax(logits(clues.unlearned, data.images))[rows, labels]).mean()
    others = data.images[data.labels != 1].clone()
    others[:, :, :3, :3] = 1  # 0.9 of the patch, doubled, is all of it
    success = softmax(logits(TinyNet(), others))[:, 1].mean()
    return {
        "clean_accuracy": float((after.argmax(1) == labels).mean()),
        "clean_fidelity": -float((before * np.log(before / after)).sum(1).mean()),
        "unlearning": -0.55 * math.log(max(cross_entropy, 0.5 * math.log(3))),  # half trusted: 1 - 0.9 / 2
        "trigger_resistance": -0.5 * math.log(max(success, 1e-3) / (1 - max(success, 1e-3))),
    }


def potential_by_hand(data: DefenceData, clues: Clues, mask: KeepMask) -> float:
    terms = terms_by_hand(data, clues, mask)
    return sum(getattr(REWARD, name) * value for name, value in terms.items())


def pruned(mask: KeepMask) -> list[int]:
    return (~mask.keep).nonzero().flatten().tolist()
