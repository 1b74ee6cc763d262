"""Fit the confidence of detection to networks of known truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.linear_model import LogisticRegression

from baselines_rnp.calibration import Calibration
from baselines_rnp.label_detection import LEAST_CONFIDENCE
from onp.checkpoints import read_json, write_json
from onp.commands import console
from onp.errors import ConfigError


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of `python -m onp.bench calibrate`."""

    records: Path
    """folder that `onp.bench detect --out` wrote"""
    out: Path
    """file for the calibration; baselines_rnp/calibration.json is the one that `onp.detect` reads"""


def run_calibrate(config: CalibrateConfig) -> None:
    """Fit the probability of a backdoor to the records of networks of known truth."""
    paths = sorted(config.records.glob("*.json"))
    try:
        records = [read_json(path) for path in paths]
        if cut := [path for path, record in zip(paths, records, strict=True) if record["masks_alone"]]:
            raise ConfigError(
                f"{cut[0]}: the calibration as it is kept other triggers from being looked for; "
                "give records that were made with --detection.recovery.conclusive 2"
            )
        record = {**fit_calibration(records), **leave_one_out(records)}
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--records {config.records}: a record lacks {error}; give what onp.bench detect wrote"
        ) from error
    write_json(config.out, record | {"networks": [path.stem for path in paths]})
    console.print(
        f"{record['clean']} clean and {record['backdoored']} backdoored networks; {record['false_alarms']} and "
        f"{record['misses']} are taken for the other kind where the fit leaves them out: {config.out}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def leave_one_out(records: list[dict[str, Any]]) -> dict[str, int]:
    """Clean and backdoored networks with a wrong verdict from a fit to all others; the only one of a kind stays in."""
    truth, wrong = [bool(record["backdoored"]) for record in records], [0, 0]
    for number, record in enumerate(records):
        if truth.count(truth[number]) == 1:
            continue
        fit = fit_calibration(records[:number] + records[number + 1 :])
        confidence = Calibration(fit["weight"], fit["intercept"])(record["strength"])
        wrong[truth[number]] += truth[number] != (confidence >= LEAST_CONFIDENCE)
    return {"false_alarms": wrong[False], "misses": wrong[True]}


def fit_calibration(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Logistic regression on the strength of the evidence, both classes weighing the same, towards Platt's targets.

    Platt (1999, section 2.2) aims at (n + 1) / (n + 2) for n examples of a class and not at 1, so that classes that
    a line separates do not end in certainty. Raises `ConfigError` where a class is missing.
    """
    truth = [bool(record["backdoored"]) for record in records]
    counts = {known: truth.count(known) for known in (False, True)}
    if not all(counts.values()):
        raise ConfigError(
            f"--records: {counts[False]} clean and {counts[True]} backdoored networks; a calibration needs both"
        )
    # Every network counts once as what it is, by Platt's target, and once as what it is not, by the rest.
    examples = [
        ([record["strength"]], known, label) for record, known in zip(records, truth, strict=True) for label in counts
    ]
    weights = [
        (counts[known] + 1 if label == known else 1) / (counts[known] + 2) / counts[known] * len(truth) / 2
        for _, known, label in examples
    ]
    fit = LogisticRegression(C=1e6, max_iter=10_000).fit(
        [values for values, _, _ in examples], [label for _, _, label in examples], weights
    )
    return {
        "weight": float(fit.coef_[0, 0]),
        "intercept": float(fit.intercept_[0]),
        "clean": counts[False],
        "backdoored": counts[True],
    }
