"""`python -m onp.zoo`: make the backdoored test models of the zoo, and list them."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from onp.attacks.recipes import Recipe, expand
from onp.attacks.zoo import Zoo
from onp.commands import check_output, console, run_command
from onp.datasets import named_folders
from onp.errors import ConfigError
from onp.inputs import torch_device, use_threads
from onp.paths import real_path
from onp.seeding import check_seed


@dataclass(frozen=True)
class ZooConfig:
    """Options of `python -m onp.zoo`."""

    job: Annotated[Literal["list", "make", "export"], tyro.conf.Positional]
    """list entries with their recipes and figures, train those that are not there yet, or copy them as float16"""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """entries such as cifar10-preact_resnet18-w16-wanet (data, network, attack; clean for a clean twin), or the
    suites development, judged and calibration; list shows all three by default"""
    seed: int = 0
    """seed of everything random, and part of an entry's identity"""
    images: int | None = None
    """train on so many images instead of the recipe's, which is made for two CPU cores; a multiple of 128"""
    epochs: int | None = None
    """train for so many epochs instead of the recipe's"""
    folders: tuple[str, ...] = ()
    """where data lies, as cifar10=FOLDER gtsrb=FOLDER with train/CLASS/IMAGE and test/CLASS/IMAGE in each;
    downloaded by torchvision by default"""
    root: Path = Path("~/.cache/onp/zoo")
    """folder of the zoo"""
    out: Path | None = None
    """folder that export copies to"""
    download_root: Path = Path("~/.cache/onp")
    """where torchvision keeps what it downloads"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads for PyTorch; 0 leaves its default"""


def zoo(config: ZooConfig) -> int:
    """Make backdoored test models by fixed recipes, beside clean twins. The same command goes on where it stopped."""
    check_seed(config.seed)
    use_threads(config.threads)
    if config.job != "list" and not config.names:
        raise ConfigError(f"{config.job}: name entries or suites; `python -m onp.zoo list` shows them")
    if (config.job == "export") != (config.out is not None):
        raise ConfigError(f"{config.job}: --out goes with export, and export needs it")
    root = real_path(config.root, "--root")
    if config.job == "make":
        check_output(root, "--root", folder=True)
    out = check_output(config.out, "--out", folder=True) if config.out is not None else None
    animals = Zoo(root, named_folders(config.folders), config.download_root, torch_device(config.device), _Progress())
    longer = {name: value for name in ("images", "epochs") if (value := getattr(config, name)) is not None}
    recipes = [replace(recipe, **longer) for recipe in expand(config.names, config.seed)]
    if out is not None:
        for recipe in recipes:
            console.print(str(animals.export(recipe, out)), soft_wrap=True)
    if config.job == "make":
        for recipe in recipes:
            _say(recipe, animals.make(recipe), root)
    records = [_found(animals, recipe) for recipe in recipes]
    console.print(_table(recipes, records))
    return int(config.job == "make" and any(record is None or "refused" in record for record in records))


def _found(animals: Zoo, recipe: Recipe) -> dict[str, Any] | None:
    """What is known of an entry, whatever recipe made it."""
    try:
        return animals.record(recipe)
    except ConfigError:
        return {"state": "other recipe"}


class _Progress:
    """A line per epoch."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, recipe: Recipe, epoch: int, epochs: int) -> None:
        now = time.monotonic()
        console.print(f"{recipe.folder}: epoch {epoch + 1} of {epochs}, {now - self.last:.0f} s since the last line")
        self.last = now


def _say(recipe: Recipe, record: dict[str, Any], root: Path) -> None:
    if "refused" in record:
        console.print(f"{recipe.folder} is REFUSED: {record['refused']}", soft_wrap=True)
        return
    weights, trigger = (shlex.quote(str(root / recipe.folder / name)) for name in ("model.safetensors", "trigger.json"))
    options = f"--model {recipe.model} --checkpoint {weights} --seed {recipe.seed}"
    if recipe.attack is not None:
        options += f" --trigger {trigger}"
    for name, values in (("mean", recipe.mean), ("std", recipe.std)):
        options += f" --{name} {' '.join(map(str, values))}" if values else ""
    options += f" --image-size {record['image_size']}" if record.get("image_size") else ""
    data = shlex.quote(str(record["data"]))
    console.print(f"{recipe.folder} is made; python -m onp.train --data {data} {options}", soft_wrap=True)


def _table(recipes: list[Recipe], records: list[dict[str, Any] | None]) -> Table:
    table = Table(title=f"seed {recipes[0].seed}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("entry", no_wrap=True)
    for name in ("CA", "twin", "ASR", "min"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for recipe, record in zip(recipes, records, strict=True):
        known = record or {}
        figures = [f"{100 * known[key]:.1f}" if known.get(key) is not None else "-" for key in ("ca", "twin_ca", "asr")]
        minutes = f"{known['seconds'] / 60:.1f}" if "seconds" in known else "-"
        state = "-" if record is None else "refused" if "refused" in known else known.get("state", "made")
        table.add_row(recipe.name, *figures, minutes, state)
    return table


if __name__ == "__main__":
    run_command(ZooConfig, zoo, "onp.zoo")
