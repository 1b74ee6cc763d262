"""`python -m onp.detect`: is a network backdoored, towards what, and by which samples; from clean images alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from baselines_rnp.label_detection import LEAST_CONFIDENCE, Calibration, Evidence, find_evidence
from baselines_rnp.sample_detection import unlearned_agreement
from onp.checkpoints import sha256, write_atomically, write_json
from onp.commands import console, run_command
from onp.config import DetectionConfig
from onp.data import DefenceData
from onp.errors import ConfigError, ModelError
from onp.inputs import InputConfig, Inputs, open_inputs
from onp.purify import check_network
from onp.samples import Samples, load_samples
from onp.suspicious_units import suspicious_units
from onp.units import UnitIndex, index_units

EVIDENCE = 3
"""exit code where there is evidence of a backdoor"""
SHOWN = 10
"""classes and samples in the terminal"""


@dataclass(frozen=True)
class DetectConfig(InputConfig):
    """Options of `python -m onp.detect`."""

    samples: Path | None = None
    """folder of images that may hold triggered ones; they are ranked, and change no verdict"""
    json: Path | None = None
    """file for verdict, scores per class and ranked samples"""
    html: Path | None = None
    """file for a page with pictures: recovered trigger, class scores, suspicious units"""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """what is made from clean images to tell"""


def detect(config: DetectConfig) -> int:
    """Say whether a network shows evidence of a backdoor. Exit code: 0 no evidence, 3 evidence, 2 error."""
    if config.checkpoint is None:
        raise ConfigError("no --checkpoint: give the weights of the network to look at")
    config = config.resolved()
    inputs = open_inputs(config)
    data = inputs.defence_data()
    check_network(inputs.model, data)
    samples = None
    if config.samples is not None:
        resize = config.image_size is not None or config.data == "gtsrb"
        samples = load_samples(config.samples, data.input_shape, resize)
    with console.status("") as status:
        evidence = find_evidence(inputs.model, data, config.detection, config.seed, lambda stage: status.update(stage))
    record = make_record(inputs, data, evidence, samples)
    if config.json is not None:
        write_json(config.json, record)
    show(record)
    if config.html is not None:
        from onp.detect_page import render  # draws, which a verdict does not need

        page = render(record, inputs, data, evidence, samples)
        write_atomically(config.html, lambda temporary: temporary.write_text(page))
        console.print(f"Page: {config.html}", soft_wrap=True)
    return EVIDENCE if record["verdict"] == "evidence" else 0


def make_record(inputs: Inputs, data: DefenceData, evidence: Evidence, samples: Samples | None) -> dict[str, Any]:
    """What `--json` holds."""
    confidence = Calibration.of_package()(evidence.outlier, evidence.agreement)
    found = confidence >= LEAST_CONFIDENCE
    config = inputs.config
    assert config.checkpoint is not None
    named = getattr(inputs.dataset("train"), "classes", None) or []
    names = [*named, *range(len(named), inputs.classes)]
    return {
        "verdict": "evidence" if found else "none",
        "target": evidence.trigger.target if found else None,
        "confidence": confidence,
        "suspect": evidence.trigger.target,
        "kind": evidence.family,
        "outliers": evidence.outliers,
        "agreement": evidence.agreement,
        "classes": [
            {"class": number, "name": str(name), "mask": _finite(mask), "warp": _finite(warp), "collapse": collapse}
            for number, (name, mask, warp, collapse) in enumerate(
                zip(names, evidence.mask.sizes, evidence.warp.sizes, evidence.collapse, strict=True)
            )
        ],
        "suspicious_units": _units(inputs, data, evidence) if found else [],
        "samples": _ranked(inputs, data, evidence, samples) if samples is not None else None,
        "model": config.model,
        "checkpoint": config.checkpoint.name,
        "checkpoint_sha256": sha256(config.checkpoint),
        "defence_images": len(data),
        "seed": config.seed,
    }


def _finite(size: float) -> float | None:
    return size if size < float("inf") else None


def _units(inputs: Inputs, data: DefenceData, evidence: Evidence) -> list[str]:
    """Names of the units that carry the recovered trigger; none where the network cannot be traced."""
    try:
        index: UnitIndex = index_units(inputs.model, data.input_shape)
    except ModelError:
        return []
    trigger = evidence.trigger
    return [index.name(unit) for unit in suspicious_units(inputs.model, index, data, trigger, trigger.target)]


def _ranked(inputs: Inputs, data: DefenceData, evidence: Evidence, samples: Samples) -> list[dict[str, Any]]:
    """The samples, the most suspicious first; `percentile` is the fraction of clean images with a lower score."""
    scores, clean = (
        unlearned_agreement(inputs.model, evidence.unlearned, images.to(inputs.device), data).cpu()
        for images in (samples.images, data.images)
    )
    return [
        {
            "path": str(samples.paths[i]),
            "score": float(scores[i]),
            "percentile": float((clean < scores[i]).float().mean()),
        }
        for i in scores.argsort(descending=True, stable=True).tolist()
    ]


def show(record: dict[str, Any]) -> None:
    """The verdict and the most suspicious classes and samples, in the terminal."""
    console.print(headline(record), style="bold", soft_wrap=True, highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class", no_wrap=True)
    for name in ("mask, pixels", "warp, pixels", "collapse"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in by_suspicion(record)[:SHOWN]:
        sizes = (f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("mask", "warp"))
        label = f"{row['class']} {row['name']}" if row["name"] != str(row["class"]) else row["name"]
        table.add_row(label, *sizes, f"{row['collapse']:.0%}")
    console.print(table)
    for sample in (record["samples"] or [])[:SHOWN]:
        console.print(
            f"  {sample['score']:.3f}  above {sample['percentile']:.0%} of the clean images  {sample['path']}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip


def by_suspicion(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Classes, that with the smallest trigger of the telling kind first."""
    return sorted(record["classes"], key=lambda row: (row[record["kind"]] is None, row[record["kind"]]))


def headline(record: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    confidence = f"probability of a backdoor {record['confidence']:.2f}"
    if record["verdict"] == "none":
        return f"No evidence of a backdoor ({confidence}). That is no proof: all-to-all attacks leave none here."
    name = record["classes"][record["target"]]["name"]
    named = f" ({name})" if name != str(record["target"]) else ""
    return f"Evidence of a backdoor towards class {record['target']}{named}, by a {record['kind']} ({confidence})."


if __name__ == "__main__":
    run_command(DetectConfig, detect, "onp.detect")
