"""Detection measured: verdicts on known networks, recovered triggers, and triggered samples among clean ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from baselines_rnp.calibration import Calibration
from baselines_rnp.label_detection import LEAST_CONFIDENCE, Evidence, find_evidence
from baselines_rnp.patch_recovery import recover_patches
from baselines_rnp.sample_detection import strip, unlearned_agreement
from onp.attacks.triggers import Trigger, load_trigger
from onp.bench.aggregates import spread, written
from onp.bench.patches import FIGURES, measure_patch
from onp.bench.suite import Suspect, read_suites
from onp.bench.verdicts import Verdict, detections
from onp.checkpoints import read_json, sha256, write_json
from onp.commands import check_output, console
from onp.config import DetectionConfig
from onp.data import DefenceData
from onp.errors import ConfigError
from onp.inputs import InputConfig, Inputs, open_inputs
from onp.judge import ALL_TO_ALL, meant
from onp.sources import sources_sha256
from onp.verdict import finite

FALSE_ALARMS = 0.05
"""false positive rate at which the true positive rate of sample detection is read"""


@dataclass(frozen=True)
class DetectBenchConfig:
    """Options of `python -m onp.bench detect`."""

    models: tuple[Path, ...]
    """suites or entries, as for `onp.bench table`; a network without a trigger counts as clean"""
    seeds: tuple[int, ...] = (0,)
    """seeds of everything random"""
    out: Path = Path("detection")
    """folder for a record of every network and seed; what is there is not measured again"""
    images: int = 500
    """test images of other classes than the target's, that are taken once clean and once triggered"""
    folders: tuple[str, ...] = ()
    """where data lies that the networks' files only name, as cifar10=FOLDER gtsrb=FOLDER"""
    defence_size: int = InputConfig.defence_size
    """clean images that the defender has"""
    device: str = InputConfig.device
    """cpu, cuda, cuda:1, ... or auto (cuda where there is one)"""
    threads: int = InputConfig.threads
    """CPU threads for PyTorch; 0 leaves its default"""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """what is made from clean images to tell"""


def run_detect_bench(config: DetectBenchConfig) -> None:
    """Verdict, recovered trigger and sample detection for every network and seed. The same command goes on."""
    if config.images < 10:
        raise ConfigError(f"--images {config.images}: expected at least 10")
    out = check_output(config.out, "--out", folder=True)
    records = []
    for seed in config.seeds:
        for suspect in read_suites(config.models, config.folders):
            path = out / f"{suspect.name}-seed{seed}.json"
            if not path.exists():
                with console.status(f"{path.stem} ..."):
                    write_json(path, measure_detection(suspect, config, seed))
            records.append(_read(path, suspect, config))
    calibration = Calibration.of_package()
    for table in make_tables(records, calibration):
        console.print(table)
    for line in summary(records, calibration):
        console.print(line, highlight=False)


def _read(path: Path, suspect: Suspect, config: DetectBenchConfig) -> dict[str, Any]:
    record: dict[str, Any] = read_json(path)
    if record.get("subject") != _subject(suspect, config):
        raise ConfigError(f"{path} is of another network, options or version; remove it, or give another --out")
    return record


def _subject(suspect: Suspect, config: DetectBenchConfig) -> str:
    """What a record depends on."""
    files = [sha256(path) for path in (suspect.checkpoint, suspect.trigger) if path is not None]
    options = config.images, config.defence_size, config.threads, config.device, config.detection
    return repr((suspect, files, options, sources_sha256(), torch.__version__))


def measure_detection(suspect: Suspect, config: DetectBenchConfig, seed: int) -> dict[str, Any]:
    """What clean images tell of one network, and how that compares with the truth."""
    common = {name: getattr(config, name) for name in ("defence_size", "device", "threads")}
    values = {name: value for name, value in vars(suspect).items() if name not in ("name", "trigger")}
    inputs = open_inputs(InputConfig(**values, **common, seed=seed).resolved())
    data = inputs.defence_data()
    evidence = find_evidence(inputs.model, data, config.detection, seed)
    record: dict[str, Any] = {
        "network": suspect.name,
        "seed": seed,
        "backdoored": suspect.trigger is not None,
        "target": None,
        "subject": _subject(suspect, config),
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
        test = draw_images(inputs, data, trigger, config.images, seed)
        patches = recover_patches(inputs.model, data, evidence, config.detection.recovery, seed)
        record["target"] = trigger.target
        record["patches"] = {
            source: measure_patch(inputs.model, test, patch, evidence.suspect, trigger)
            for source, patch in patches.items()
        }
        record["samples"] = measure_samples(inputs, data, evidence, trigger, test.images, seed)
    return record


def draw_images(inputs: Inputs, data: DefenceData, trigger: Trigger, images: int, seed: int) -> DefenceData:
    """Up to `images` test images that the trigger is meant to take to another class, on the CPU."""
    dataset = inputs.dataset("test")
    if dataset is None:
        raise ConfigError(f"{inputs.config.data} has no test/ to take samples from")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]
    drawn = [dataset[number] for number in order[: 2 * images]]
    labels = torch.tensor([label for _, label in drawn])
    others = (meant(labels, trigger.target, inputs.classes) != labels).nonzero().flatten()[:images]
    if not len(others):
        raise ConfigError(f"{inputs.config.data}: no test image drawn is of another class than the trigger's; add some")
    return replace(data, images=torch.stack([drawn[int(number)][0] for number in others]), labels=labels[others])


def measure_samples(
    inputs: Inputs, data: DefenceData, evidence: Evidence, trigger: Trigger, clean: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    """AUROC, and TPR at 5 % FPR, of each score on test images: `clean` ones, and the same with the trigger."""
    samples = torch.cat([clean, trigger(clean)]).to(inputs.device)
    truth = torch.arange(len(samples)) >= len(clean)
    scores = {
        "unlearned": unlearned_agreement(inputs.model, evidence.unlearned, samples, data),
        "strip": strip(inputs.model, samples, data, seed),
    }
    return {name: rates(truth, score.cpu()) for name, score in scores.items()}


def rates(truth: Tensor, scores: Tensor) -> dict[str, float]:
    """AUROC and TPR at 5 % FPR of `scores` (n,) for `truth` (n,)."""
    wrong, right, _ = roc_curve(truth, scores)
    return {"auroc": float(roc_auc_score(truth, scores)), "tpr": float(right[wrong <= FALSE_ALARMS].max())}


def make_tables(records: list[dict[str, Any]], calibration: Calibration) -> list[Table]:
    """Verdicts, and what was measured with the triggers: a line a network, mean ± deviation over its seeds."""
    verdicts = _table("verdicts", ("truth", "seeds", "probability", "evidence", "right", "by", "collapse right"))
    patches = _table("recovered triggers, through the network and its unlearned copy", ("through", *FIGURES))
    samples = _table("triggered samples", ("AUROC", "TPR", "STRIP AUROC", "TPR"))
    networks: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        networks.setdefault(record["network"], []).append(record)
    for item in detections(_verdict(record, calibration) for record in records)[: len(networks)]:
        group = networks[item.name]
        figures = [item.truth, str(item.runs), written(item.probability), str(item.found), str(item.right)]
        if not group[0]["backdoored"]:
            verdicts.add_row(item.name, *figures, "-", "-")
            continue
        families = "/".join(sorted({record["family"] for record in group}))
        collapsed = "-" if group[0]["target"] == ALL_TO_ALL else str(sum(map(_collapsed, group)))
        verdicts.add_row(item.name, *figures, families, collapsed)
        rates = [(score, rate) for score in ("unlearned", "strip") for rate in ("auroc", "tpr")]
        cells = (spread(record["samples"][score][rate] for record in group) for score, rate in rates)
        samples.add_row(item.name, *map(written, cells))
        for source in ("network", "unlearned"):
            found = [record["patches"][source] for record in group if source in record["patches"]]
            if found:
                cells = (spread(patch[figure] for patch in found) for figure in FIGURES)
                patches.add_row(item.name, source, *map(written, cells))
    return [verdicts, patches, samples] if samples.rows else [verdicts]


def _collapsed(record: dict[str, Any]) -> bool:
    """Whether the unlearned copy gives the attacker's class most often."""
    return bool(record["collapse"].index(max(record["collapse"])) == record["target"])


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("network")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _verdict(record: dict[str, Any], calibration: Calibration) -> Verdict:
    confidence = calibration(record["strength"])
    found = record["suspect"] if confidence >= LEAST_CONFIDENCE else None
    return Verdict(record["network"], record["seed"], record["target"], confidence, found)


def summary(records: list[dict[str, Any]], calibration: Calibration) -> list[str]:
    """Label detection accuracy, misses and false alarms, and mean rates of sample detection."""
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
    for name in ("unlearned", "strip"):
        figures = [record["samples"][name] for record in bad]
        auroc, tpr = (mean(figure[rate] for figure in figures) for rate in ("auroc", "tpr"))
        lines.append(f"samples, {name}: mean AUROC {auroc:.3f}, mean TPR at 5 % FPR {tpr:.3f}")
    return lines
