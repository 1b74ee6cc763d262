"""Suites: the networks of a table, from JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onp.bench.suite import read_suites
from onp.errors import ConfigError, DataError

ENTRY: dict[str, Any] = {
    "name": "tiny", "model": "network.py:tiny", "checkpoint": "tiny.safetensors", "trigger": "trigger.json",
    "data": "images",
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_paths_of_a_suite_are_relative_to_its_file(tmp_path: Path) -> None:
    named = {**ENTRY, "name": "named", "model": "small_cnn", "data": "cifar10", "trigger": None, "mean": [0.5, 1, 0.25]}
    sized = {**ENTRY, "name": "sized", "checkpoint": "/elsewhere/w.pth", "image_size": 8, "num_classes": None}
    tiny, second, third = read_suites([write(tmp_path / "suite.json", [ENTRY, named, sized])])
    assert tiny.model == f"{tmp_path}/network.py:tiny" and tiny.data == f"{tmp_path}/images"
    assert (tiny.checkpoint, tiny.trigger) == (tmp_path / "tiny.safetensors", tmp_path / "trigger.json")
    assert (tiny.mean, tiny.std, tiny.image_size, tiny.num_classes) == ((), (), None, None)
    assert (second.model, second.data, second.trigger, second.mean) == ("small_cnn", "cifar10", None, (0.5, 1.0, 0.25))
    assert (third.checkpoint, third.image_size, third.num_classes) == (Path("/elsewhere/w.pth"), 8, None)


def test_folders_say_where_data_lies_that_is_only_named(tmp_path: Path) -> None:
    suite = [{**ENTRY, "name": name, "data": name} for name in ("cifar10", "gtsrb", "images")]
    found = read_suites([write(tmp_path / "suite.json", suite)], (f"cifar10={tmp_path}/mine", "digits=elsewhere"))
    assert [suspect.data for suspect in found] == [f"{tmp_path}/mine", "gtsrb", f"{tmp_path}/images"]
    with pytest.raises(DataError, match="--folders imagenet=x: expected NAME=FOLDER"):
        read_suites([tmp_path / "suite.json"], ("imagenet=x",))


def test_an_entry_is_a_folder_that_may_hold_more(tmp_path: Path) -> None:
    entry = {"name": "zoo", "model": "small_cnn", "data": "gtsrb", "mean": [0.5] * 3, "accuracy": 0.9}
    write(tmp_path / "a" / "entry.json", entry)
    write(tmp_path / "a" / "trigger.json", "{}")
    clean = write(tmp_path / "b" / "entry.json", {**entry, "name": "clean"})
    first, second = read_suites([tmp_path / "a", clean])
    assert (first.name, first.checkpoint, first.trigger, first.mean) == (
        "zoo", tmp_path / "a" / "model.safetensors", tmp_path / "a" / "trigger.json", (0.5, 0.5, 0.5),
    )  # fmt: skip
    assert (second.name, second.checkpoint, second.trigger) == ("clean", clean.with_name("model.safetensors"), None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[", "readable JSON"),
        ([], "no network"),
        (3, "expected an object"),
        ([ENTRY, 3], "network 2: expected an object"),
        ([{key: value for key, value in ENTRY.items() if key != "trigger"}], "lacks trigger"),
        ({"name": "zoo", "model": "small_cnn"}, "lacks data"),
        ([{**ENTRY, "means": [1]}], "has means"),
        ([{**ENTRY, "name": "../up"}], "'../up'"),
        ([{**ENTRY, "data": None}], "data is None"),
        ([{**ENTRY, "checkpoint": 3}], "checkpoint is 3"),
        ([{**ENTRY, "trigger": True}], "trigger is True"),
        ([{**ENTRY, "mean": 0.5}], "mean is 0.5"),
        ([{**ENTRY, "std": ["1"]}], "std is ['1']"),
        ([{**ENTRY, "image_size": 0}], "image_size is 0"),
        ([ENTRY, ENTRY], "tiny comes more than once"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(content: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_suites([write(tmp_path / "suite.json", content)])
    assert expected in str(error.value)


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="readable JSON"):
            read_suites([path])
