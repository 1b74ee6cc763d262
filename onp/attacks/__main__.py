"""`python -m onp.attacks`: make a backdoored test model of a registered network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onp.attacks.make import make_backdoored_model
from onp.attacks.poisoning import TrainingConfig
from onp.commands import check_output, console, run_command
from onp.errors import ConfigError
from onp.inputs import InputConfig, open_inputs
from onp.masks import KeepMask
from onp.report import Judge
from onp.units import index_units


@dataclass(frozen=True)
class AttackConfig(InputConfig):
    """Options of `python -m onp.attacks`."""

    out: Path = Path("backdoored")
    """folder for backdoored.safetensors, trigger.json and the trigger's arrays"""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """trigger, poisoning and training"""


def attack(config: AttackConfig) -> None:
    """Train a network on poisoned data and say how well the backdoor works."""
    if config.checkpoint is not None:
        raise ConfigError(f"--checkpoint {config.checkpoint}: a test model is trained from scratch; leave it out")
    out = check_output(config.out, "--out", folder=True)
    inputs = open_inputs(config.resolved())
    with console.status("training ...") as status:
        trigger = make_backdoored_model(
            inputs, out, config.seed, config.training,
            lambda epoch, epochs: status.update(f"training: {epoch} of {epochs} epochs done ..."),
        )  # fmt: skip
    console.print(f"{out / 'backdoored.safetensors'}, trigger to {trigger.target}: {out / 'trigger.json'}")
    made = open_inputs(AttackConfig(**{**vars(inputs.config), "checkpoint": out / "backdoored.safetensors"}))
    judge = Judge(made, out / "trigger.json" if made.dataset("test") is not None else None)
    measured = judge(KeepMask.all_kept(index_units(made.model, made.image_shape)))
    if measured is not None and measured.asr is not None:
        console.print(f"test images: CA {measured.ca:.1%}, ASR {measured.asr:.1%}")


if __name__ == "__main__":
    run_command(AttackConfig, attack, "onp.attacks")
