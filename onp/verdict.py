"""The verdict on a network: evidence and ranked samples as a record, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from baselines_rnp.label_detection import Evidence
from baselines_rnp.patch_recovery import Source, success
from baselines_rnp.sample_detection import unlearned_log_odds
from onp.checkpoints import read_json, sha256
from onp.data import DefenceData
from onp.errors import FileError, ModelError
from onp.inputs import Inputs
from onp.samples import Samples
from onp.suspicious_units import suspicious_units
from onp.trigger_recovery import Patch
from onp.units import index_units

UNITS = {"mask": "pixels", "warp": "pixels", "wave": "norm"}
"""what sizes are given in, by the families of triggers with a target"""
BORDERLINE = (0.3, 0.8)
"""probabilities that another seed may well turn round"""


def make_verdict(inputs: Inputs, evidence: Evidence) -> dict[str, Any]:
    """What the evidence says: verdict, target (None: none, or no single one), confidence, scores per class."""
    named = getattr(inputs.train, "classes", None) or []
    names = [*named, *range(len(named), inputs.classes)]
    suspect = evidence.suspect
    warps, waves = (
        found.sizes if found is not None else (inf,) * inputs.classes for found in (evidence.warp, evidence.wave)
    )
    return {
        "verdict": "evidence" if evidence.found else "none",
        "target": suspect if evidence.found else None,
        "confidence": evidence.confidence,
        "suspect": suspect,
        "kind": evidence.family,
        "masks_alone": evidence.masks_alone,
        "outliers": evidence.outliers,
        "agreement": evidence.warp.agreement if evidence.warp is not None else None,
        "untargeted_mask": finite(evidence.untargeted.size) if evidence.untargeted is not None else None,
        "spread": evidence.untargeted.spread if evidence.untargeted is not None else None,
        "strength": evidence.strength,
        "clean_accuracy": evidence.clean_accuracy,
        "classes": [
            {
                "class": number,
                "name": str(name),
                "mask": finite(mask),
                "warp": finite(warp),
                "wave": finite(wave),
                "collapse": collapse,
            }
            for number, (name, mask, warp, wave, collapse) in enumerate(
                zip(names, evidence.mask.sizes, warps, waves, evidence.collapse, strict=True)
            )
        ],
    }


def make_record(
    inputs: Inputs, data: DefenceData, evidence: Evidence, patches: Mapping[Source, Patch], samples: Samples | None
) -> dict[str, Any]:
    """What `--json` holds."""
    config = inputs.config
    assert config.checkpoint is not None
    return {
        **make_verdict(inputs, evidence),
        "recovered": {
            source: {
                "pixels": float(patch.mask.sum()) or None,
                "success": success(inputs.model, data, patch, evidence.suspect),
            }
            for source, patch in patches.items()
        },
        "suspicious_units": _units(inputs, data, evidence) if evidence.found else [],
        "samples": _ranked(inputs, data, evidence, samples) if samples is not None else None,
        "model": config.model,
        "checkpoint": config.checkpoint.name,
        "checkpoint_sha256": sha256(config.checkpoint),
        "defence_images": len(data),
        "seed": config.seed,
    }


def finite(size: float) -> float | None:
    """A size as JSON has it: null where no trigger worked, or none was looked for."""
    return size if size < float("inf") else None


def _units(inputs: Inputs, data: DefenceData, evidence: Evidence) -> list[str]:
    """Names of the units that carry the recovered trigger; none where the network cannot be traced."""
    try:
        index = index_units(inputs.model, data.input_shape)
        units = suspicious_units(inputs.model, index, data, evidence.trigger, evidence.suspect)
    except ModelError:
        return []
    return [index.name(unit) for unit in units]


def _ranked(inputs: Inputs, data: DefenceData, evidence: Evidence, samples: Samples) -> list[dict[str, Any]]:
    """The samples, the most suspicious first; `percentile` is the fraction of clean images with a lower score."""
    scores, clean = (
        unlearned_log_odds(inputs.model, evidence.unlearned, images.to(inputs.device), data).cpu()
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


def by_suspicion(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Classes, that with the smallest trigger of the telling kind first; masks, where no class is the target."""
    kind = record["kind"] if record["kind"] in UNITS else "mask"
    return sorted(record["classes"], key=lambda row: (row[kind] is None, row[kind]))


def units_of(record: dict[str, Any]) -> dict[str, str]:
    """`UNITS` of the families that were looked for."""
    return {"mask": UNITS["mask"]} if record["masks_alone"] else UNITS


def headline(record: dict[str, Any]) -> str:
    """The verdict in a sentence, and where it might have come out otherwise in another."""
    confidence = f"probability of a backdoor {percent(record['confidence'])}"
    if record["verdict"] == "none":
        said = f"No evidence of a backdoor ({confidence}). That is no proof that there is none."
    elif record["target"] is None:
        said = f"Evidence of an all-to-all backdoor: a mask that sends every class to another ({confidence})."
    else:
        suspect = label(record["classes"][record["target"]])
        said = f"Evidence of a backdoor towards class {suspect}, by a {record['kind']} ({confidence})."
    if BORDERLINE[0] <= record["confidence"] <= BORDERLINE[1]:
        said += " A borderline case: ask again with other seeds and more images."
    return said


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict of a run; raises `FileError` where the file holds none."""
    record = read_json(path)
    try:
        headline(record)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise FileError(f"{path} holds no verdict; restore it, or begin the run anew in another folder") from error
    assert isinstance(record, dict)
    return record


def percent(probability: float) -> str:
    """A probability to read: never 0 or 100 %, which clean images cannot tell."""
    rounded = round(100 * probability)
    return "< 1 %" if rounded < 1 else "> 99 %" if rounded > 99 else f"{rounded} %"


def label(row: dict[str, Any]) -> str:
    """The number of a class, and its name where that says more."""
    number, name = str(row["class"]), row["name"]
    return number if name.lstrip("0") == number.lstrip("0") else f"{number} ({name})"
