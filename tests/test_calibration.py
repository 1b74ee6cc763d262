"""The confidence: its fit, what it is fitted to, and what the package holds."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from baselines_rnp.calibration import Calibration
from onp.bench.calibrate import CalibrateConfig, fit_calibration, leave_one_out, run_calibrate
from onp.errors import ConfigError, FileError, OnpError


def test_the_fit_reaches_platts_targets() -> None:
    """Three clean networks where nothing stands out, two backdoored ones alike: 1 / 5 and 3 / 4 are best."""
    clean, bad = {"backdoored": False, "strength": 0.0}, {"backdoored": True, "strength": 1.0}
    record = fit_calibration([clean, clean, clean, bad, bad])
    assert (record["clean"], record["backdoored"]) == (3, 2)
    calibration = Calibration(record["weight"], record["intercept"])
    assert calibration(0.0) == pytest.approx(1 / 5, abs=1e-3)
    assert calibration(1.0) == pytest.approx(3 / 4, abs=1e-3)
    with pytest.raises(ConfigError, match="3 clean and 0 backdoored"):
        fit_calibration([clean] * 3)


def test_leaving_one_out_counts_wrong_verdicts() -> None:
    """A clean network like the backdoored ones and a backdoored one like the clean ones are taken for the others."""
    clean, bad = {"backdoored": False, "strength": 0.0}, {"backdoored": True, "strength": 1.0}
    assert leave_one_out([clean] * 3 + [bad] * 3) == {"false_alarms": 0, "misses": 0}
    odd = [{**clean, "strength": 1.1}, {**bad, "strength": -0.1}, {**bad, "strength": -0.2}]
    assert leave_one_out([clean] * 8 + [bad] * 8 + odd) == {"false_alarms": 1, "misses": 2}
    assert leave_one_out([clean, bad]) == {"false_alarms": 0, "misses": 0}, "none can be left out"


@pytest.mark.parametrize(("text", "error"), [("{", FileError), ("{}", ConfigError), ("[]", ConfigError)])
def test_broken_records_fit_nothing(tmp_path: Path, text: str, error: type[OnpError]) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(error, match=r"a\.json|lacks"):
        run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_records_that_the_last_calibration_cut_short_fit_nothing(tmp_path: Path) -> None:
    for name, alone in (("a", False), ("b", True)):
        record = {"backdoored": alone, "strength": float(alone), "masks_alone": alone}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"b\.json.*conclusive 2"):
        run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out.json"))
    (tmp_path / "b.json").write_text(json.dumps({**record, "masks_alone": False}))
    run_calibrate(CalibrateConfig(tmp_path, tmp_path / "out" / "fit.json"))
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["weight"] > 0


def test_the_calibration_of_the_package_says_how_it_was_made() -> None:
    record = json.loads(resources.files("baselines_rnp").joinpath("calibration.json").read_text())
    clean = [name for name in record["networks"] if "-clean-" in name]
    assert record["clean"] == len(clean) >= 20
    assert record["backdoored"] == len(record["networks"]) - len(clean) > 0
    assert all(name.startswith("digits-") for name in record["networks"]), "what it is tested on is none of it"
    assert Calibration.of_package()(2.0) > 0.5 > Calibration.of_package()(0.0)
