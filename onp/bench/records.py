"""What is measured on every network with every seed, a file each, so that the same command goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from onp.bench.suite import Suspect, read_suites
from onp.checkpoints import read_json, sha256, write_json
from onp.commands import check_output, console
from onp.errors import ConfigError
from onp.inputs import InputConfig, Inputs, open_inputs
from onp.sources import sources_sha256


@dataclass(frozen=True)
class RecordsConfig:
    """Options of every command that keeps records."""

    models: tuple[Path, ...]
    """suites or entries, as for `onp.bench table`; a network without a trigger counts as clean"""
    seeds: tuple[int, ...] = (0,)
    """seeds of everything random"""
    out: Path = Path("records")
    """folder for a record of every network and seed; what is there is not measured again"""
    images: int = 500
    """test images that are taken once clean and once triggered"""
    folders: tuple[str, ...] = ()
    """where data lies that the networks' files only name, as cifar10=FOLDER gtsrb=FOLDER"""
    defence_size: int = InputConfig.defence_size
    """clean images that the defender has"""
    device: str = InputConfig.device
    """cpu, cuda, cuda:1, ... or auto (cuda where there is one)"""
    threads: int = InputConfig.threads
    """CPU threads for PyTorch; 0 leaves its default"""


Config = TypeVar("Config", bound=RecordsConfig)
Measure = Callable[[Suspect, Config, int], dict[str, Any]]
WHERE = ("models", "seeds", "out", "folders")
"""options that change no record"""


def make_records(config: Config, measure: Measure[Config], backdoored: bool = False) -> list[dict[str, Any]]:
    """`measure` of every network and seed, read where it is there; with `backdoored`, of those with a trigger alone.

    Raises `ConfigError` where a record is of another network, other options or another version.
    """
    if config.images < 10:
        raise ConfigError(f"--images {config.images}: expected at least 10")
    out = check_output(config.out, "--out", folder=True)
    suspects = [item for item in read_suites(config.models, config.folders) if item.trigger or not backdoored]
    if not suspects:
        raise ConfigError("--models: no network with a trigger; without one there is nothing to measure")
    records = []
    for seed in config.seeds:
        for suspect in suspects:
            path, subject = out / f"{suspect.name}-seed{seed}.json", _subject(suspect, config)
            if not path.exists():
                with console.status(f"{path.stem} ..."):
                    found = measure(suspect, config, seed)
                write_json(path, {"network": suspect.name, "seed": seed, "subject": subject, **found})
            record = read_json(path)
            if record.get("subject") != subject:
                raise ConfigError(f"{path} is of another network, options or version; remove it, or give another --out")
            records.append(record)
    return records


def _subject(suspect: Suspect, config: RecordsConfig) -> str:
    """What a record depends on; raises `ConfigError` where a file of the network is missing."""
    paths = [path for path in (suspect.checkpoint, suspect.trigger) if path is not None]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"{suspect.name}: {', '.join(missing)} does not exist; see the suite")
    files = [sha256(path) for path in paths]
    options = [getattr(config, item.name) for item in fields(config) if item.name not in WHERE]
    return repr((suspect, files, options, sources_sha256(), torch.__version__))


def open_suspect(suspect: Suspect, config: RecordsConfig, seed: int) -> Inputs:
    """The network and its data, as the defender has them."""
    common = {name: getattr(config, name) for name in ("defence_size", "device", "threads")}
    values = {name: value for name, value in vars(suspect).items() if name not in ("name", "trigger")}
    return open_inputs(InputConfig(**values, **common, seed=seed).resolved())
