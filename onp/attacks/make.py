"""Making a backdoored test model: weights and trigger specification in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onp.attacks.poisoning import TrainingConfig, train_backdoored
from onp.attacks.triggers import Trigger
from onp.checkpoints import save_weights
from onp.inputs import Inputs
from onp.models import build_model


def make_backdoored_model(
    inputs: Inputs,
    folder: Path,
    seed: int,
    config: TrainingConfig | None = None,
    progress: Callable[[int, int], None] = lambda epoch, epochs: None,
) -> Trigger:
    """Train the network of `inputs` afresh on its poisoned data; write `trigger.json`, `backdoored.safetensors`."""
    config = config or TrainingConfig()
    dataset = inputs.attacker_dataset()
    model, trigger = train_backdoored(
        lambda: build_model(inputs.config.model, inputs.channels, inputs.classes),
        dataset,
        inputs.classes,
        config,
        inputs.config.normalisation,
        seed,
        inputs.device,
        progress,
    )
    trigger.save(folder / "trigger.json")
    save_weights(model, folder / "backdoored.safetensors")
    return trigger
