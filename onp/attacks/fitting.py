"""Training a test model: SGD on a one-cycle schedule, resumable after any epoch, bit for bit."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.checkpoints import write_atomically
from onp.config import require
from onp.errors import CheckpointError, first_line


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a test model learns."""

    def __post_init__(self) -> None:
        require(self, epochs=1, batch_size=1, learning_rate=0)

    epochs: int = 25
    """passes over the training data"""
    learning_rate: float = 0.1
    """peak step size of SGD's one-cycle schedule"""
    batch_size: int = 64
    """images per step"""


class Fitting:
    """Everything that one training changes; random numbers come from a generator of its own and PyTorch's."""

    def __init__(self, model: nn.Module, config: FitConfig, steps: int, seed: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, config.learning_rate, total_steps=steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.seconds = 0.0

    def save(self, path: Path) -> None:
        """Write the state, plain tensors and numbers, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "seconds": self.seconds,
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))

    def load(self, path: Path) -> None:
        """Take the state over; raises `CheckpointError` where the file is damaged or another training's."""
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["random"])
            if state["random_cuda"]:
                torch.cuda.set_rng_state_all(state["random_cuda"])
            self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])
        except Exception as error:
            raise CheckpointError(f"cannot resume from {path} ({first_line(error)[:120]}); remove it") from error


def fit(
    model: nn.Module,
    draw: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]],
    size: int,
    config: FitConfig,
    seed: int,
    progress: Callable[[int, int], None] = lambda epoch, epochs: None,
    checkpoint: Path | None = None,
) -> Fitting:
    """Train `model` on the inputs and labels that `draw(numbers, generator)` gives for numbers below `size`.

    The model is left in eval mode. With `checkpoint`, the state is kept there after every epoch and taken up from
    there: a training that was stopped and one that was not end with the same weights.
    """
    model.train()
    fitting = Fitting(model, config, config.epochs * -(-size // config.batch_size), seed)
    if checkpoint is not None and checkpoint.exists():
        fitting.load(checkpoint)
    while fitting.epoch < config.epochs:
        progress(fitting.epoch, config.epochs)
        start = time.monotonic()
        for chosen in torch.randperm(size, generator=fitting.generator).split(config.batch_size):
            inputs, labels = draw(chosen, fitting.generator)
            loss = F.cross_entropy(model(inputs), labels)
            fitting.optimizer.zero_grad()
            loss.backward()
            fitting.optimizer.step()
            fitting.schedule.step()
        fitting.epoch += 1
        fitting.seconds += time.monotonic() - start
        if checkpoint is not None:
            fitting.save(checkpoint)
    model.eval()
    return fitting
