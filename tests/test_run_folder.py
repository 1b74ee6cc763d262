"""Run folders that are damaged, or of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onp.checkpoints import write_json, write_tensors
from onp.errors import ConfigError, FileError
from onp.inputs import InputConfig
from onp.report import FACTS_READ, Row, read_report
from onp.run_folder import RunFolder
from onp.train import TrainConfig, complete_run
from onp.verdict import read_verdict

FIRST = {"method": "backdoored"}


@pytest.mark.parametrize("record", [{"model": 3}, {"mean": 3}, {"mean": ["a"]}, {"checkpoint": 3}, {"threads": "2"}])
def test_damaged_options_of_a_run(record: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="restore config.json"):
        InputConfig.from_record(record)


def test_a_run_is_bound_to_its_network_and_images(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.bind("one")
    folder.bind("one")
    with pytest.raises(ConfigError, match="another network, other images, or another version of ONP or PyTorch"):
        folder.bind("another")


@pytest.mark.parametrize(
    "rows",
    [3, [], ["onp"], [{"method": "onp"}], [FIRST, {"method": "cnn"}], [{**FIRST, "cA": 1}], [{**FIRST, "ca": "1"}]],
)
def test_damaged_rows(tmp_path: Path, rows: Any) -> None:
    report = dict.fromkeys(FACTS_READ)
    (tmp_path / "report.json").write_text(json.dumps({**report, "rows": [FIRST]}))
    assert read_report(RunFolder(tmp_path))[1] == [Row("backdoored")]
    (tmp_path / "report.json").write_text(json.dumps({**report, "rows": rows}))
    with pytest.raises(FileError, match="report.json is not what a run writes .*; restore it"):
        read_report(RunFolder(tmp_path))


@pytest.mark.parametrize("name", FACTS_READ)
def test_a_damaged_report(tmp_path: Path, name: str) -> None:
    report = {**dict.fromkeys(FACTS_READ), "rows": [FIRST]}
    del report[name]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(FileError, match="report.json is not what a run writes .*; restore it"):
        read_report(RunFolder(tmp_path))


def test_a_finished_run_is_of_its_checkpoint_alone(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"others than it purified")
    config = TrainConfig(checkpoint=tmp_path / "w.pth", data=str(tmp_path), run_dir=tmp_path / "run").resolved()
    folder = RunFolder.create_or_resume(tmp_path / "run", config)
    report = {**dict.fromkeys(FACTS_READ), "checkpoint_sha256": "0" * 64, "rows": [FIRST]}
    folder.file("report.json").write_text(json.dumps(report))
    folder.file("purified.safetensors").touch()
    for change in (lambda: None, (tmp_path / "w.pth").unlink):
        change()
        with pytest.raises(ConfigError, match="w.pth is not the file that"):
            complete_run(config, Console(quiet=True))


@pytest.mark.parametrize("record", [{}, [], {"verdict": "evidence", "confidence": 0.9, "target": 3, "classes": []}])
def test_a_damaged_verdict(tmp_path: Path, record: Any) -> None:
    write_json(tmp_path / "clues.json", record)
    with pytest.raises(FileError, match="clues.json holds no verdict; restore it"):
        read_verdict(tmp_path / "clues.json")


def test_damaged_mask_values_of_rnp(tmp_path: Path) -> None:
    write_tensors(tmp_path / "rnp_mask_values.safetensors", {})
    with pytest.raises(FileError, match="rnp_mask_values.safetensors holds no values; restore it"):
        RunFolder(tmp_path).rnp_values()
