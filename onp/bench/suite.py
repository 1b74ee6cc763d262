"""Suites: the networks of a table, from JSON files.

A suite is a list of objects, an entry is one object (`entry.json`, in a folder with its weights and trigger):

    [{"name": "grid", "model": "wide_resnet16_1", "checkpoint": "grid.pth", "trigger": "grid.trigger.json",
      "data": "images", "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26], "image_size": 32, "num_classes": 10}]

Paths are relative to the JSON file. `trigger` is null for a clean network; what comes behind `data` may be left out.
An entry may hold more, and leave out `checkpoint` (model.safetensors) and `trigger` (trigger.json, if it is there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from onp.checkpoints import read_json
from onp.datasets import NAMED_DATA, named_folders
from onp.errors import ConfigError, FileError
from onp.paths import real_path


@dataclass(frozen=True)
class Suspect:
    """A network that a table is about; the fields but `name` are options of `onp.train`."""

    name: str
    model: str
    checkpoint: Path
    trigger: Path | None
    data: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int | None = None
    num_classes: int | None = None
    channels: int | None = None


def read_suites(paths: Iterable[Path], folders: Iterable[str] = ()) -> list[Suspect]:
    """The networks of suites, entries and folders of entries, in order. Raises `ConfigError` for what is wrong.

    `folders` (`NAME=FOLDER`) say where data lies that they only name.
    """
    data = named_folders(folders)
    suspects: list[Suspect] = []
    for path in paths:
        path = real_path(path, "--models")
        suspects += _read(path / "entry.json" if path.is_dir() else path)
    names = [suspect.name for suspect in suspects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--models: {', '.join(twice)} comes more than once; give every network a name of its own")
    if not suspects:
        raise ConfigError("--models: no network; give suite files, or folders that hold an entry.json")
    return [replace(suspect, data=data.get(suspect.data, suspect.data)) for suspect in suspects]


def _read(path: Path) -> list[Suspect]:
    try:
        content = read_json(path)
    except FileError as error:
        raise ConfigError(f"--models: {error}, or give another suite or entry") from error
    if isinstance(content, list):
        return [_suspect(record, path, f"{path}, network {number}") for number, record in enumerate(content, 1)]
    known = {item.name for item in fields(Suspect)}
    record = {key: value for key, value in content.items() if key in known} if isinstance(content, dict) else content
    if isinstance(record, dict):
        trigger = "trigger.json" if (path.parent / "trigger.json").exists() else None
        record = {"checkpoint": "model.safetensors", "trigger": trigger, **record}
        if ":" in str(record.get("model")):
            raise ConfigError(f"{path}: model {record['model']!r} is code; an entry names a registered network")
    return [_suspect(record, path, str(path))]


def _suspect(record: Any, path: Path, where: str) -> Suspect:
    """One object of a suite, with absolute paths."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected an object with name, model, checkpoint, trigger and data")
    known = [item.name for item in fields(Suspect)]
    if missing := [name for name in known[:5] if name not in record]:
        raise ConfigError(f"{where} lacks {', '.join(missing)} (trigger is null for a clean network)")
    if unknown := sorted(set(record) - set(known)):
        raise ConfigError(f"{where} has {', '.join(unknown)}; expected {', '.join(known)}")
    values = {name: value for name, value in record.items() if value is not None or name == "trigger"}
    for name in ("name", "model", "checkpoint", "data"):
        if not isinstance(values.get(name), str):
            raise ConfigError(f"{where}: {name} is {record[name]!r}; expected a string")
    if not re.fullmatch(r"\w[\w.+-]*", values["name"]):
        raise ConfigError(f"{where}: the name {values['name']!r} names a folder; use letters, digits, _ . + and -")
    for name in ("mean", "std"):
        values[name] = _numbers(values.get(name, []), f"{where}: {name}")
    for name in ("image_size", "num_classes", "channels"):
        if name in values and (type(values[name]) is not int or values[name] < 1):
            raise ConfigError(f"{where}: {name} is {values[name]!r}; expected a positive integer, or null")
    if not isinstance(values["trigger"], str | None):
        raise ConfigError(f"{where}: trigger is {values['trigger']!r}; expected a path, or null for a clean network")
    values["checkpoint"] = path.parent / values["checkpoint"]
    values["trigger"] = path.parent / values["trigger"] if values["trigger"] is not None else None
    if values["data"] not in NAMED_DATA:
        values["data"] = str(path.parent / values["data"])
    if ":" in values["model"]:
        values["model"] = str(path.parent / values["model"])
    return Suspect(**values)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(type(number) in (int, float) and abs(number) < 1e9 for number in value):
        raise ConfigError(f"{where} is {value!r}; expected a list of numbers")
    return tuple(float(number) for number in value)
