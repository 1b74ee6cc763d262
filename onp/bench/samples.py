"""Triggered samples among clean ones: how well the unlearned copy and STRIP tell them apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from baselines_rnp.sample_detection import strip, unlearned_log_odds
from baselines_rnp.unlearn import unlearn
from onp.attacks.triggers import Trigger, load_trigger
from onp.bench.aggregates import spread, written
from onp.bench.records import RecordsConfig, make_records, open_suspect
from onp.bench.suite import Suspect
from onp.bench.table_report import markdown_table, terminal_table
from onp.checkpoints import write_text
from onp.commands import console
from onp.config import DetectionConfig, UnlearnConfig
from onp.data import DefenceData
from onp.errors import ConfigError
from onp.inputs import Inputs
from onp.judge import meant
from onp.logits import logits_of

FALSE_ALARMS = 0.05
"""false positive rate at which the true positive rate is read"""
COLUMNS = {
    ("unlearned", "auroc"): "copy: AUROC",
    ("unlearned", "tpr"): "TPR",
    ("strip", "auroc"): "STRIP: AUROC",
    ("strip", "tpr"): "TPR",
    ("copy", "triggered"): "kept: ASR",
    ("copy", "clean"): "untriggered",
}
"""by part and figure of a record, the title; the last two: of images of other classes, triggered and not, the fraction
that the unlearned copy gives the class meant by the attacker"""


@dataclass(frozen=True)
class SamplesConfig(RecordsConfig):
    """Options of `python -m onp.bench samples`."""

    out: Path = Path("samples")
    """folder for a record of every network and seed; what is there is not measured again"""
    unlearn: UnlearnConfig = field(default_factory=lambda: DetectionConfig().unlearn)
    """how the unlearned copy is made"""


def run_samples(config: SamplesConfig) -> None:
    """Area under ROC, and true positive rate at 5 % false alarms, by network and score. The same command goes on."""
    records = make_records(config, measure_samples, backdoored=True)
    names = dict.fromkeys(record["network"] for record in records)
    groups = {name: [record for record in records if record["network"] == name] for name in names}
    groups[f"all {len(records)} runs"] = records
    rows = []
    for name, group in groups.items():
        figures = [spread(record[part][figure] for record in group) for part, figure in COLUMNS]
        rows.append([name, str(len(group)), *map(written, figures)])
    heading = ("network", "runs", *COLUMNS.values())
    means = ([cell.partition(" ±")[0] for cell in row] for row in rows)  # a narrow terminal has no room for more
    console.print(terminal_table("Triggered samples, means", heading, means))
    path = config.out.expanduser() / "samples.md"
    write_text(path, "\n".join(["# Triggered samples", "", *markdown_table(heading, rows), ""]))
    console.print(f"With deviations: {path}", soft_wrap=True)


def measure_samples(suspect: Suspect, config: SamplesConfig, seed: int) -> dict[str, dict[str, float]]:
    """Rates of both scores on test images: clean ones of all classes, and triggered ones of others.

    Beside them, under `copy`, what the unlearned copy has kept of the backdoor (see `COLUMNS`).
    """
    assert suspect.trigger is not None
    inputs = open_suspect(suspect, config, seed)
    data = inputs.defence_data()
    trigger = load_trigger(suspect.trigger, data.input_shape, inputs.classes)
    unlearned = unlearn(inputs.model, data, config.unlearn, seed).model
    clean = draw_images(inputs, data, config.images, seed)
    others = of_others(clean, trigger, inputs)
    triggered, goals = trigger(others.images), meant(others.labels, trigger.target, inputs.classes)
    samples = torch.cat([clean.images, triggered]).to(inputs.device)
    truth = torch.arange(len(samples)) >= len(clean)
    scores = {
        "unlearned": unlearned_log_odds(inputs.model, unlearned, samples, data),
        "strip": strip(inputs.model, samples, data, seed),
    }
    kept = {}
    for name, images in (("triggered", triggered), ("clean", others.images)):
        given = logits_of(unlearned, data.normalise(images.to(inputs.device))).argmax(1).cpu()
        kept[name] = float((given == goals).float().mean())
    return {**{name: rates(truth, score.cpu()) for name, score in scores.items()}, "copy": kept}


def draw_images(inputs: Inputs, data: DefenceData, images: int, seed: int) -> DefenceData:
    """Up to `images` test images, on the CPU."""
    dataset = inputs.dataset("test")
    if dataset is None:
        raise ConfigError(f"{inputs.config.data} has no test/ to take samples from")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:images]  # type: ignore[arg-type]
    drawn = [dataset[number] for number in order.tolist()]
    labels = torch.tensor([label for _, label in drawn])
    return replace(data, images=torch.stack([image for image, _ in drawn]), labels=labels)


def of_others(test: DefenceData, trigger: Trigger, inputs: Inputs) -> DefenceData:
    """Those that the trigger is meant to take to another class."""
    others = meant(test.labels, trigger.target, inputs.classes) != test.labels
    if not bool(others.any()):
        raise ConfigError(f"{inputs.config.data}: no test image drawn is of another class than the trigger's; add some")
    return replace(test, images=test.images[others], labels=test.labels[others])


def rates(truth: Tensor, scores: Tensor) -> dict[str, float]:
    """AUROC and TPR at 5 % FPR of `scores` (n,) for `truth` (n,)."""
    wrong, right, _ = roc_curve(truth, scores)
    return {"auroc": float(roc_auc_score(truth, scores)), "tpr": float(right[wrong <= FALSE_ALARMS].max())}
