"""`python -m onp.bench engine` on a small network: what it measures, not how fast it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from onp.bench import __main__ as bench


def test_the_engine_is_measured_beside_plain_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    options = {"--networks": "small_cnn", "--images": 24, "--masks": 7, "--threads": 1, "--cache-gib": 1, "--json": out}
    options["--devices"] = "cpu"
    parts = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["onp.bench", "engine", *parts])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert not stop.value.code
    rows = json.loads(out.read_text())
    assert [(row["network"], row["device"], row["sequence"]) for row in rows] == [
        ("small_cnn", "cpu", name) for name in ("ppo", "added", "random")
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["engine_per_second"] / row["naive_per_second"])
        assert 0 <= row["largest_relative_deviation"] < 1e-4
        assert row["peak_bytes"] < 1 << 30 and row["remembered_per_second"] > 0
    printed = capsys.readouterr().out
    assert "PPO outside the engine" in printed and "bytes per second of a copy" in printed
