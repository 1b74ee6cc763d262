"""Detection measured: verdicts on known networks, and recovered triggers beside the true ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baselines_rnp.calibration import Calibration
from baselines_rnp.label_detection import LEAST_CONFIDENCE, find_evidence
from baselines_rnp.patch_recovery import recover_patches
from onp.attacks.triggers import load_trigger
from onp.bench.aggregates import spread, written
from onp.bench.patches import FIGURES, measure_patch
from onp.bench.records import RecordsConfig, make_records, open_suspect
from onp.bench.samples import draw_images, of_others
from onp.bench.suite import Suspect
from onp.bench.table_report import Lines, markdown_table, terminal_table
from onp.bench.verdicts import Verdict, detections
from onp.checkpoints import write_text
from onp.commands import console
from onp.config import DetectionConfig
from onp.judge import ALL_TO_ALL
from onp.verdict import finite


@dataclass(frozen=True)
class DetectBenchConfig(RecordsConfig):
    """Options of `python -m onp.bench detect`."""

    out: Path = Path("detection")
    """folder for a record of every network and seed; what is there is not measured again. And for detection.md"""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """what is made from clean images to tell"""


def run_detect_bench(config: DetectBenchConfig) -> None:
    """Verdict and recovered trigger for every network and seed, against the truth. The same command goes on."""
    records = make_records(config, measure_detection)
    calibration = Calibration.of_package()
    page = ["# Detection", ""]
    for title, lines in make_tables(records, calibration):
        console.print(terminal_table(title, *lines))
        page += [f"## {title}", "", *markdown_table(*lines), ""]
    for line in (told := summary(records, calibration)):
        console.print(line, highlight=False)
    path = config.out.expanduser() / "detection.md"
    write_text(path, "\n".join([*page, *told, ""]))
    console.print(f"These tables: {path}", soft_wrap=True)


def measure_detection(suspect: Suspect, config: DetectBenchConfig, seed: int) -> dict[str, Any]:
    """What clean images tell of one network, and how that compares with the truth."""
    inputs = open_suspect(suspect, config, seed)
    data = inputs.defence_data()
    evidence = find_evidence(inputs.model, data, config.detection, seed)
    record: dict[str, Any] = {
        "backdoored": suspect.trigger is not None,
        "target": None,
        "family": evidence.family,
        "masks_alone": evidence.masks_alone,
        "suspect": evidence.suspect if evidence.suspect is not None else ALL_TO_ALL,
        "strength": evidence.strength,
        "strengths": evidence.strengths,
        "mask_sizes": [finite(size) for size in evidence.mask.sizes],
        "warp_sizes": [finite(size) for size in evidence.warp.sizes] if evidence.warp is not None else None,
        "wave_sizes": [finite(size) for size in evidence.wave.sizes] if evidence.wave is not None else None,
        "agreement": evidence.warp.agreement if evidence.warp is not None else None,
        "untargeted_size": finite(evidence.untargeted.size) if evidence.untargeted is not None else None,
        "spread": evidence.untargeted.spread if evidence.untargeted is not None else None,
        "collapse": evidence.collapse,
    }
    if suspect.trigger is not None:
        trigger = load_trigger(suspect.trigger, data.input_shape, inputs.classes)
        test = of_others(draw_images(inputs, data, config.images, seed), trigger, inputs)
        patches = recover_patches(inputs.model, data, evidence, config.detection.recovery, seed)
        record["target"] = trigger.target
        record["patches"] = {
            source: measure_patch(inputs.model, test, patch, evidence.suspect, trigger)
            for source, patch in patches.items()
        }
    return record


def make_tables(records: list[dict[str, Any]], calibration: Calibration) -> list[tuple[str, Lines]]:
    """Verdicts, and what was measured with the triggers: a line a network, mean ± deviation over its seeds."""
    verdicts, patches, networks = [], [], dict[str, list[dict[str, Any]]]()
    for record in records:
        networks.setdefault(record["network"], []).append(record)
    for item in detections(_verdict(record, calibration) for record in records)[: len(networks)]:
        group = networks[item.name]
        figures = [item.truth, str(item.runs), written(item.probability), str(item.found), str(item.right)]
        if not group[0]["backdoored"]:
            verdicts.append([item.name, *figures, "-", "-"])
            continue
        families = "/".join(sorted({record["family"] for record in group}))
        collapsed = "-" if group[0]["target"] == ALL_TO_ALL else str(sum(map(_collapsed, group)))
        verdicts.append([item.name, *figures, families, collapsed])
        for source in ("network", "unlearned"):
            found = [record["patches"][source] for record in group if source in record["patches"]]
            if found:
                cells = (spread(patch[figure] for patch in found) for figure in FIGURES)
                patches.append([item.name, source, *map(written, cells)])
    columns = ("network", "truth", "seeds", "probability", "evidence", "right", "by", "collapse right")
    tables: list[tuple[str, Lines]] = [("Verdicts", (columns, verdicts))]
    if patches:
        title = "Recovered triggers, through the network and its unlearned copy"
        tables.append((title, (("network", "through", *FIGURES), patches)))
    return tables


def _collapsed(record: dict[str, Any]) -> bool:
    """Whether the unlearned copy gives the attacker's class most often."""
    return bool(record["collapse"].index(max(record["collapse"])) == record["target"])


def _verdict(record: dict[str, Any], calibration: Calibration) -> Verdict:
    confidence = calibration(record["strength"])
    found = record["suspect"] if confidence >= LEAST_CONFIDENCE else None
    return Verdict(record["network"], record["seed"], record["target"], confidence, found)


def summary(records: list[dict[str, Any]], calibration: Calibration) -> list[str]:
    """Label detection accuracy, misses and false alarms."""
    kinds = {item.name: item for item in detections(_verdict(record, calibration) for record in records)}
    lines = []
    if (clean := kinds.get("all clean")) is not None:
        lines.append(f"clean: {clean.found} false alarms of {clean.runs}")
    if (backdoored := kinds.get("all backdoored")) is None:
        return lines
    bad = [record for record in records if record["backdoored"]]
    one = [record for record in bad if record["target"] != ALL_TO_ALL]
    collapsed = sum(map(_collapsed, one))
    lines.append(
        f"backdoored: evidence for {backdoored.found} of {backdoored.runs}, with the right class for "
        f"{backdoored.right}; the class that the unlearned copy collapses to is right for {collapsed} of {len(one)}"
    )
    return lines
