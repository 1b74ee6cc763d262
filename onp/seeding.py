"""Seeds that are passed in, never set for the whole process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from onp.errors import ConfigError


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a seed that one of the libraries would not take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed}: expected 0 to {2**32 - 1}")


@contextmanager
def restored() -> Iterator[None]:
    """Behind the block Python, NumPy and PyTorch draw on as before; Stable-Baselines3 seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block PyTorch draws from `seed` (initial weights, dropout); behind it everything is as before."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
