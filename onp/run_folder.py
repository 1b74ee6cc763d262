"""A run folder: every result a file that is there whole or not at all, so that a run can go on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.ppo import LearningCurve
from onp.checkpoints import read_json, read_tensors, save_weights, write_atomically, write_json, write_tensors
from onp.errors import ConfigError, FileError
from onp.inputs import InputConfig
from onp.masks import KeepMask
from onp.purification import MethodResult
from onp.units import UnitIndex

UNRECORDED = ("stages", "run_dir")
"""options that change nothing about what a run is: a finished one can be given stages, and be moved"""


class RunFolder:
    """Files of one run; see the README for what each holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, *parts: str) -> Path:
        return self.path.joinpath(*parts)

    @classmethod
    def create_or_resume(cls, path: Path, options: Any, option: str = "--run-dir") -> RunFolder:
        """Record `options` (a dataclass) in a new folder, or check that an old one has the same, but for `UNRECORDED`.

        Raises `ConfigError`, naming the `option`, where they differ or where the folder holds something else.
        """
        folder = cls(path)
        wanted = json.loads(json.dumps(dataclasses.asdict(options), default=str))
        wanted = {name: value for name, value in wanted.items() if name not in UNRECORDED}
        if folder.file("config.json").exists():
            recorded = folder.options()
            before, now = _flat(recorded), _flat(wanted)
            names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            if names:
                changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
                raise ConfigError(f"{path} holds a run with other options ({changes}); give another {option}")
            return folder
        if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise ConfigError(f"{path} exists and holds no run; give a new or empty {option}")
        try:
            write_json(folder.file("config.json"), {"options": wanted, "versions": {"torch": torch.__version__}})
        except OSError as error:
            raise ConfigError(f"{option} {path} cannot be written ({error.strerror}); give another") from error
        return folder

    def options(self) -> dict[str, Any]:
        """The recorded options; raises `ConfigError` where the folder is no run."""
        try:
            options = read_json(self.file("config.json"))["options"]
            assert isinstance(options, dict)
            return options
        except (FileError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"{self.path} is not a run folder: it has no readable config.json") from error

    def bind(self, subject: str) -> None:
        """Record what the run is about (`Purification.subject`); raises `ConfigError` where it was about another."""
        path = self.file("subject.json")
        if not path.exists():
            write_json(path, {"sha256": subject})
        elif read_json(path) != {"sha256": subject}:
            raise ConfigError(
                f"{self.path} was begun with another network, other images, or another version of ONP or PyTorch; "
                "restore them, or give another folder"
            )

    @property
    def journal_dir(self) -> Path:
        """Where methods that are not finished keep their journals."""
        return self.file("journal")

    def save(self, result: MethodResult) -> None:
        """Write everything a method found; `methods/METHOD.json` comes last and says that the rest is there."""
        if result.agent is not None:
            save_weights(result.agent.policy, self.file("policy.safetensors"))
            write_atomically(self.file("policy.zip"), result.agent.save)
        if result.rnp_values is not None:
            values = {"values": result.rnp_values}
            write_tensors(self.file("rnp_mask_values.safetensors"), values)
        if result.network is not None:
            save_weights(result.network, self.weights(result.method))
        if result.mask is not None:
            self.save_mask(result.method, result.mask)
        record: dict[str, Any] = {
            "reward_evaluations": result.reward_evaluations,
            "seconds": result.seconds,
            "note": result.note,
        }
        if result.curve is not None:
            record["learning_curve"] = dataclasses.asdict(result.curve)
        write_json(self.file("methods", f"{result.method}.json"), record)
        (self.journal_dir / result.method).unlink(missing_ok=True)

    def adopt(self, other: RunFolder, methods: Iterable[str]) -> None:
        """Copy what `methods` found in a run with the same subject, and this one lacks."""
        subject = "subject.json"
        if not other.file(subject).exists() or read_json(other.file(subject)) != read_json(self.file(subject)):
            return
        for method in (method for method in methods if other.has(method) and not self.has(method)):
            found = [f"stages/{method}.safetensors", f"masks/{method}.json"]
            values = ["rnp_mask_values.safetensors"] if method == "rnp" else []
            for name in (*values, *found, f"methods/{method}.json"):
                if other.file(name).exists():
                    write_atomically(self.file(name), partial(shutil.copyfile, other.file(name)))

    def weights(self, stage: str) -> Path:
        """The weights that a stage behind a method learned."""
        return self.file("stages", f"{stage}.safetensors")

    def save_mask(self, method: str, mask: KeepMask) -> None:
        write_json(self.file("masks", f"{method}.json"), mask.to_json())

    def has(self, method: str) -> bool:
        return self.file("methods", f"{method}.json").exists()

    def load(self, method: str, index: UnitIndex) -> MethodResult:
        """What `save` wrote, without the agent and the network."""
        path = self.file("methods", f"{method}.json")
        record, mask = read_json(path), self.load_mask(method, index)
        try:
            curve = LearningCurve(**record["learning_curve"]) if "learning_curve" in record else None
            return MethodResult(method, mask, record["reward_evaluations"], record["seconds"], record["note"], curve)
        except (KeyError, TypeError) as error:
            raise FileError(f"{path} is not what a run writes ({error!r}); restore it") from error

    def load_mask(self, method: str, index: UnitIndex) -> KeepMask | None:
        path = self.file("masks", f"{method}.json")
        return KeepMask.load(index, path) if path.exists() else None

    def rnp_values(self) -> Tensor | None:
        """RNP's recovered mask values, (N,); None where RNP could not run."""
        path = self.file("rnp_mask_values.safetensors")
        if not path.exists():
            return None
        if (values := read_tensors(path).get("values")) is None:
            raise FileError(f"{path} holds no values; restore it")
        return values


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their full names, as in `env.reward.unlearning`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def patient(config: InputConfig, folder: RunFolder) -> InputConfig:
    """The options that open the network under treatment: without a checkpoint, the one made in the run folder."""
    return config if config.checkpoint else replace(config, checkpoint=folder.file("backdoored.safetensors"))


def trigger_path(options: dict[str, Any], folder: RunFolder) -> Path | None:
    """The trigger specification to judge with: the user's, or that of the network made in the run folder."""
    if not options.get("checkpoint"):
        return folder.file("trigger.json")
    return Path(options["trigger"]) if options.get("trigger") else None
