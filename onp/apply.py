"""`python -m onp.apply`: a saved mask applied to a checkpoint, as files that deploy."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.table import Table
from torch import nn

from baselines_rnp.label_detection import clean_accuracy
from onp.checkpoints import load_checkpoint, read_json, save_weights, sha256, write_json
from onp.commands import console, run_command
from onp.data import DefenceData
from onp.errors import ConfigError, ModelError
from onp.export import export_onnx, export_program, require_onnx
from onp.inputs import InputConfig, open_inputs
from onp.logits import logits_of
from onp.masks import KeepMask, apply_mask
from onp.paths import real_path
from onp.run_folder import RunFolder, patient
from onp.shrinking import Shrunk, load_shrunk, multiply_adds, parameter_count, same, save_shrunk, shrink
from onp.units import UnitIndex, index_units

Format = Literal["safetensors", "shrunk", "export", "onnx"]
FILES: dict[Format, str] = {
    "safetensors": "purified.safetensors",
    "shrunk": "shrunk.safetensors",
    "export": "program.pt2",
    "onnx": "model.onnx",
}
REASONS = 10
"""layers, and units of one, that are shown of those kept as zeros"""


@dataclass(frozen=True)
class ApplyConfig(InputConfig):
    """Options of `python -m onp.apply`."""

    run: Path | None = None
    """folder of a run of onp.train: its network, mask (ONP's), images and their settings; --checkpoint and --data where
    they have been moved. Without it, name them all"""
    mask: Path | None = None
    """keep mask (masks/METHOD.json of a run)"""
    checkpoint: Path | None = None
    """weights of the network that the mask was made for: safetensors, or a PyTorch file of plain weights"""
    data: str = ""
    """as for onp.train; every file is checked on the clean images that the options draw from train/"""
    device: tyro.conf.Suppress[str] = "cpu"
    """where the files are checked; a GPU would round otherwise"""
    out: Path = Path("deploy")
    """folder for the files, new or empty; it appears when every file is in it and checked"""
    formats: tuple[Format, ...] = tuple(FILES)
    """safetensors: purified.safetensors, the original keys and shapes with zeros for what is pruned. shrunk:
    shrunk.safetensors and shrunk.json, what can be removed gone, for onp.load_shrunk. export: program.pt2, and onnx:
    model.onnx, both of the smaller network behind its input normalisation, so that they take images in [0, 1]"""


def apply(config: ApplyConfig) -> int:
    """Apply a saved mask to a checkpoint, and write the result as files that deploy. Exit code 1: a file is missing."""
    config = _complete(config)
    assert config.checkpoint is not None and config.mask is not None
    if "onnx" in config.formats:
        require_onnx()
    _check_origin(config.mask, config.checkpoint)
    with _appearing(config.out) as folder:
        inputs = open_inputs(config)
        data = inputs.defence_data()
        mask = KeepMask.load(index_units(inputs.model, data.input_shape), config.mask)
        purified = copy.deepcopy(inputs.model)
        apply_mask(purified, mask)
        shrunk = shrink(inputs.model, mask, data.inputs)
        files = dict[str, dict[str, Any]]()
        for kind in config.formats:
            path = folder / FILES[kind]
            console.print(f"Writing {path.name} ...", style="dim", highlight=False)
            try:
                deviation = _write(kind, path, inputs.model, purified, shrunk, data)
            except ModelError as error:  # the others may do
                files[path.name] = {"error": str(error)}
                continue
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "deviation": deviation}
        record = {
            "model": Path(config.model).name,
            "checkpoint_sha256": sha256(config.checkpoint),
            "mask_sha256": sha256(config.mask),
            "mean": config.mean,
            "std": config.std,
            "input_shape": data.input_shape,
            "images": len(data),
            "accuracy": [clean_accuracy(network, data) for network in (inputs.model, purified)],
            "units": len(mask.index),
            "units_pruned": mask.units_pruned,
            "units_removed": len(shrunk.removed),
            "removed": _by_layer(mask.index, dict.fromkeys(shrunk.removed, "")),
            "kept_as_zeros": _by_layer(mask.index, shrunk.kept_as_zeros),
            "parameters": [parameter_count(network) for network in (inputs.model, shrunk.model)],
            "multiply_adds": [multiply_adds(network, data.input_shape) for network in (inputs.model, shrunk.model)],
            "files": files,
            "versions": {"torch": torch.__version__},
        }
        write_json(folder / "deploy.json", record)
    _show(record, config.out)
    return 1 if any("error" in file for file in files.values()) else 0


def _complete(config: ApplyConfig) -> ApplyConfig:
    """The options with what a run knows filled in; raises `ConfigError` where some are missing, or given twice."""
    if config.run is None:
        if missing := [f"--{name}" for name in ("checkpoint", "mask", "data") if not getattr(config, name)]:
            raise ConfigError(f"no {', '.join(missing)}: give --run, or all of --checkpoint, --mask and --data")
        return config.resolved()
    names = {item.name: item.default for item in fields(InputConfig)}
    for name in ("checkpoint", "data", "threads", "device"):  # may be given, or are of this machine
        del names[name]
    if twice := [name for name, default in names.items() if getattr(config, name) != default]:
        raise ConfigError(f"--run knows {', '.join(twice)}; leave that out, or --run")
    folder = RunFolder(real_path(config.run, "--run"))
    of_run = patient(InputConfig.from_record(folder.options()), folder)
    return replace(
        config,
        **{name: getattr(of_run, name) for name in names},
        checkpoint=config.checkpoint or of_run.checkpoint,
        data=config.data or of_run.data,
        mask=config.mask or folder.file("masks", "onp.json"),
    ).resolved()


def _check_origin(mask: Path, checkpoint: Path) -> None:
    """Raise `ConfigError` where the mask lies in a run that purified another file: its units would fit all the same."""
    report = mask.parent.parent / "report.json"
    record = read_json(report) if mask.parent.name == "masks" and report.is_file() else None
    made_for = record.get("checkpoint_sha256") if isinstance(record, dict) else None
    if made_for is not None and checkpoint.is_file() and made_for != sha256(checkpoint):
        raise ConfigError(
            f"{mask} was made for another checkpoint than {checkpoint} (its SHA-256 is in {report}); "
            "give that one, or, where the weights are the same, a copy of the mask outside the run"
        )


def _write(
    kind: Format, path: Path, original: nn.Module, purified: nn.Module, shrunk: Shrunk, data: DefenceData
) -> float:
    """Write one file; returns the deviation of what is read back from the masked network, `purified`."""
    expected = logits_of(purified, data.inputs)
    if kind == "export":
        return export_program(shrunk.model, data.images, path, data.normalise, expected)
    if kind == "onnx":
        return export_onnx(shrunk.model, data.images, path, data.normalise, expected)
    if kind == "shrunk":
        save_shrunk(shrunk, path)
        reread = load_shrunk(original, path)
    else:
        save_weights(purified, path)
        reread = copy.deepcopy(original)
        load_checkpoint(reread, path)
    return same(path.name, logits_of(reread, data.inputs), expected)


def _by_layer(index: UnitIndex, units: dict[int, str]) -> list[dict[str, Any]]:
    """Units of one layer and reason together."""
    together: dict[tuple[str, str], list[int]] = {}
    for unit, reason in units.items():
        layer = index.layers[int(index.layer_of[unit])]
        together.setdefault((layer.name, reason), []).append(unit - layer.offset)
    return [
        {"layer": name, "units": members} | ({"reason": reason} if reason else {})
        for (name, reason), members in together.items()
    ]


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out`, new or empty so far, when the block has gone well."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not empty; give a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); give another") from error
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(record: dict[str, Any], out: Path) -> None:
    removed, pruned = record["units_removed"], record["units_pruned"]
    console.print(f"{pruned} of {record['units']} units pruned: {removed} removed, {pruned - removed} kept as zeros")
    zeros = record["kept_as_zeros"]
    for entry in zeros[:REASONS]:
        numbers = ", ".join(map(str, entry["units"][:REASONS])) + (", ..." if len(entry["units"]) > REASONS else "")
        line = f"  {entry['layer']} [{numbers}]: {entry['reason']}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    if len(zeros) > REASONS:
        console.print(f"  ... and {len(zeros) - REASONS} more in deploy.json", style="dim")
    before, after = record["accuracy"]
    console.print(
        f"accuracy on {record['images']} clean images: {before:.1%} before, {after:.1%} after (if that is low, check "
        "--mean, --std and --image-size: program.pt2 and model.onnx hold them)",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    for name in ("parameters", "multiply_adds"):
        before, after = record[name]
        console.print(f"{name.replace('_', '-')}: {before:,} before, {after:,} after ({after / before - 1:+.1%})")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("deviation", justify="right")
    for name, file in record["files"].items():
        if "error" not in file:
            table.add_row(name, f"{file['bytes']:,}", f"{file['deviation']:.1e}")
    console.print(table)
    for file in record["files"].values():
        if "error" in file:
            console.print(f"not written: {file['error']}", style="red", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"deviation: largest difference of logits from the masked network's, over the largest logit, "
        f"on {record['images']} clean images\n{out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(ApplyConfig, apply, "onp.apply")
