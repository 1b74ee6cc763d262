"""`python -m onp.detect`: is a network backdoored, towards what, and by which samples; from clean images alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from baselines_rnp.label_detection import find_evidence
from baselines_rnp.patch_recovery import Source, recover_patches
from onp.checkpoints import write_atomically, write_json, write_text
from onp.commands import check_output, console, run_command
from onp.config import DetectionConfig
from onp.errors import ConfigError
from onp.images import picture_of
from onp.inputs import InputConfig, open_inputs
from onp.samples import load_samples
from onp.trigger_recovery import Patch
from onp.verdict import by_suspicion, headline, label, make_record, units_of

EVIDENCE = 3
"""exit code where there is evidence of a backdoor"""
SOURCES: dict[Source, str] = {"network": "the network", "unlearned": "its unlearned copy"}
"""what masks are recovered through, in words"""
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
    """file for a page with pictures: recovered triggers, class scores, suspicious units"""
    triggers: Path | None = None
    """folder for masks and patterns, as PNG, recovered from the network and through its unlearned copy"""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """what is made from clean images to tell"""


def detect(config: DetectConfig) -> int:
    """Say whether a network shows evidence of a backdoor. Exit code: 0 no evidence, 3 evidence, 2 error."""
    config = config.resolved()
    if config.checkpoint is None:
        raise ConfigError("no --checkpoint: give the weights of the network to look at")
    outputs = {name: path for name in ("json", "html", "triggers") if (path := getattr(config, name)) is not None}
    outputs = {name: check_output(path, f"--{name}", folder=name == "triggers") for name, path in outputs.items()}
    code, colon, _ = config.model.rpartition(":")
    _check_apart({"checkpoint": config.checkpoint, **({"model": Path(code)} if colon else {}), **outputs})
    config = replace(config, **outputs)
    inputs = open_inputs(config)
    data = inputs.defence_data()
    samples = None
    if config.samples is not None:
        resize = config.image_size is not None or config.data == "gtsrb"
        samples = load_samples(config.samples, data.input_shape, resize)
    with console.status("") as status:
        evidence = find_evidence(inputs.model, data, config.detection, config.seed, lambda stage: status.update(stage))
        status.update("recovering the trigger through the unlearned copy")
        patches = recover_patches(inputs.model, data, evidence, config.detection.recovery, config.seed)
    record = make_record(inputs, data, evidence, patches, samples)
    if config.json is not None:
        write_json(config.json, record)
    show(record)
    if config.triggers is not None:
        for source in SOURCES:
            _save_pictures(config.triggers, source, patches.get(source))
        console.print(f"Recovered triggers: {config.triggers}", soft_wrap=True)
    if config.html is not None:
        from onp.detect_page import render  # draws, which a verdict does not need

        page = render(record, inputs, data, evidence, patches, samples)
        write_text(config.html, page)
        console.print(f"Page: {config.html}", soft_wrap=True)
    return EVIDENCE if record["verdict"] == "evidence" else 0


def _check_apart(paths: dict[str, Path]) -> None:
    """Raise `ConfigError` where one file is named twice."""
    for (name, path), (other, same) in combinations(paths.items(), 2):
        if path.resolve() == same.resolve():
            raise ConfigError(f"--{name} and --{other} are the same file, {path}; give each its own")


def _save_pictures(folder: Path, source: Source, patch: Patch | None) -> None:
    """Write the pictures of a patch; without one, those of an earlier verdict go."""
    for name in ("mask", "pattern"):
        path = folder / f"{source}_{name}.png"
        if patch is None:
            path.unlink(missing_ok=True)
            continue
        save = partial(picture_of(getattr(patch, name)).save, format="PNG")
        write_atomically(path, save)


def show(record: dict[str, Any]) -> None:
    """The verdict and the most suspicious classes and samples, in the terminal."""
    console.print(headline(record), style="bold", soft_wrap=True, highlight=False)
    console.print(
        f"Accuracy on the {record['defence_images']} clean images: {record['clean_accuracy']:.1%}. If you expect more, "
        "--mean, --std or the order of the classes is wrong.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    classes = by_suspicion(record)
    console.print(
        f"{min(SHOWN, len(classes))} of {len(classes)} classes: the smallest trigger that leads there, and how many "
        "images the unlearned copy gives the class (collapse)",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class", no_wrap=True)
    units = units_of(record)
    for name in (*(f"{name}, {unit}" for name, unit in units.items()), "collapse"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in classes[:SHOWN]:
        sizes = (f"{row[name]:.2f}" if row[name] is not None else "-" for name in units)
        table.add_row(label(row), *sizes, f"{row['collapse']:.0%}")
    console.print(table)
    if record["masks_alone"]:
        console.print("The masks say enough: nothing else was looked for.")
    size = record["untargeted_mask"]
    if size is not None:
        console.print(
            f"Mask without a target: {size:.2f} pixels, spread {record['spread']:.2f} (1: each class to its own)",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    for source, found in record["recovered"].items() if record["verdict"] == "evidence" else ():
        told = "none that works"
        if found["pixels"] is not None:
            told = f"{found['pixels']:.2f} pixels, fools the network on {found['success']:.0%} of the clean images"
            told += " at twice its strength"
        console.print(f"Mask recovered through {SOURCES[source]}: {told}", soft_wrap=True, highlight=False)
    samples = record["samples"] or []
    if samples:
        console.print(
            f"{min(SHOWN, len(samples))} of {len(samples)} samples: how sure the unlearned copy still is of the "
            "network's answer (log-odds), beside the clean images",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    for sample in samples[:SHOWN]:
        console.print(
            f"  {sample['score']:7.1f}  above {sample['percentile']:.0%} of the clean images  {sample['path']}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip


if __name__ == "__main__":
    run_command(DetectConfig, detect, "onp.detect")
