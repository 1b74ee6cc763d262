"""A run that takes seconds: a tiny network, a tiny image folder and a trigger."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import nn

from onp.config import EnvConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.train import TrainConfig

NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
"""


def tiny_options(folder: Path, seed: int = 0) -> TrainConfig:
    """Write all of it into `folder`: weights and images drawn with `seed`, 12 to defend with and 12 to test on."""
    (folder / "network.py").write_text(NETWORK)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
        for number in range(24):
            path = folder / "images" / ("train" if number < 12 else "test") / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    Image.new("RGB", (8, 8), "white").save(folder / "patch.png")
    (folder / "trigger.json").write_text('{"target": 1, "mode": "add", "pattern": "patch.png"}')
    env = EnvConfig(max_steps=2, unlearn=UnlearnConfig(max_epochs=1), recovery=TriggerRecoveryConfig(steps=2))
    return TrainConfig(
        model=f"{folder / 'network.py'}:tiny", checkpoint=folder / "weights.safetensors", data=str(folder / "images"),
        trigger=folder / "trigger.json", defence_size=12, budget=24, env=env, always=True, threads=1,
    )  # fmt: skip
