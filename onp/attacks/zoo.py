"""A zoo of backdoored test models: trained by recipe, resumable, and refused where the backdoor does not work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onp.attacks.adversarial import perturb
from onp.attacks.augment import crop_and_flip
from onp.attacks.fitting import Fitting, fit
from onp.attacks.poisoning import ATTACKS, draw_poisoning
from onp.attacks.recipes import DATA, Recipe
from onp.attacks.triggers import Trigger
from onp.checkpoints import load_checkpoint, read_json, read_tensors, save_weights, write_json, write_tensors
from onp.data import Normalisation, balanced_order
from onp.datasets import GREY, TensorImages, labels_of, load_dataset
from onp.errors import ConfigError, DataError
from onp.judge import Measurement, measure
from onp.layout import fastest_layout
from onp.models import build_model, is_ours
from onp.seeding import seeded

LEAST_ASR = 0.90
"""attack success rate from which a backdoor counts as planted; all to all, of the clean accuracy, which bounds it"""
MOST_CA_LOST = 0.02
"""clean accuracy that a backdoor may cost against the clean twin"""
DEFENDERS_IMAGES = 500
"""first images of the seed's `balanced_order` that no entry is trained on: what `--defence-size 500` draws"""


@dataclass(frozen=True, eq=False)
class Images:
    """One data set in memory: training images of shape (n, channels, height, width), labels (n,), and a test set."""

    train: Tensor
    labels: Tensor
    test: TensorImages
    classes: int


@dataclass(eq=False)
class Zoo:
    """Entries in folders NAME-seedSEED under `root`."""

    root: Path
    folders: dict[str, str] = field(default_factory=dict)
    """image folders by name of the data; torchvision downloads what is not here"""
    download_root: Path = Path("~/.cache/onp")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Callable[[Recipe, int, int], None] = lambda recipe, epoch, epochs: None
    loaded: tuple[tuple[object, ...], Images] | None = None
    """the data in memory, and what it was loaded for"""

    def record(self, recipe: Recipe) -> dict[str, Any] | None:
        """What is known of a finished entry: recipe, figures and, where it is refused, why; None before.

        Raises `ConfigError` where the folder was made by another recipe.
        """
        folder = self.root / recipe.folder
        made_by = folder / "recipe.json"
        if made_by.exists() and read_json(made_by) != _plain(recipe):
            raise ConfigError(f"{folder} was made by another recipe; remove it, or give another --root")
        found = (folder / name for name in ("entry.json", "refused.json"))
        return next((read_json(path) for path in found if path.exists()), None)

    def export(self, recipe: Recipe, out: Path) -> Path:
        """Copy a made entry to a folder below `out`, its weights as float16; returns the folder.

        Raises `ConfigError` where there is none to copy.
        """
        record = self.record(recipe)
        if record is None or "refused" in record:
            raise ConfigError(f"{self.root / recipe.folder} holds no entry that counts as trained; make it first")
        source, folder = self.root / recipe.folder, out / recipe.folder
        folder.mkdir(parents=True, exist_ok=True)
        weights = read_tensors(source / "model.safetensors")
        halved = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        write_tensors(folder / "model.safetensors", halved)
        for path in source.glob("trigger*"):
            shutil.copy(path, folder)
        write_json(folder / "entry.json", {**record, "data": recipe.data})
        return folder

    def make(self, recipe: Recipe) -> dict[str, Any]:
        """Train an entry, and its clean twin before it, unless that is done; returns its `record`.

        `model.safetensors`, the trigger and, last, `entry.json` are written where the entry is accepted,
        `refused.json` where not.
        """
        if (record := self.record(recipe)) is not None:
            return record
        twin = self.make(recipe.twin()) if recipe.attack is not None else None
        if twin is not None and "refused" in twin:
            return self._finish(recipe, {"refused": f"its clean twin is refused: {twin['refused']}"})
        images = self._images(recipe)
        attack, shape = ATTACKS[recipe.attack] if recipe.attack is not None else None, tuple(images.train.shape[1:])
        trigger = attack.trigger(shape, recipe.target or 0) if attack is not None else None
        fitting = self._train(recipe, images, trigger)
        twin_ca = twin["ca"] if twin else None
        target = trigger.target if trigger else None
        model = fitting.model.to(memory_format=torch.contiguous_format)
        measured = measure(model, images.test, _normalisation(recipe), self.device, trigger, target)
        about: dict[str, Any] = {"data": self.folders.get(recipe.data, recipe.data), "seconds": fitting.seconds}
        about |= {"classes": images.classes, "image_size": DATA[recipe.data].image_size}
        figures = {**asdict(measured), "twin_ca": twin_ca, **about}
        if reason := refusal(recipe, measured, twin_ca):
            return self._finish(recipe, {**figures, "refused": reason})
        save_weights(model, self.root / recipe.folder / "model.safetensors")
        if trigger is not None:
            trigger.save(self.root / recipe.folder / "trigger.json")
        return self._finish(recipe, figures)

    def _train(self, recipe: Recipe, images: Images, trigger: Trigger | None) -> Fitting:
        """Train as an attacker would who is in charge: images are cropped and flipped first and triggered then.

        Clean-label attacks poison the same images all along, the others draw them anew for every batch.
        """
        train, labels, classes, normalise = images.train, images.labels, images.classes, _normalisation(recipe)
        poison, fixed = None, None
        if recipe.attack is not None and recipe.poison_rate is not None and trigger is not None:
            attack = ATTACKS[recipe.attack]
            poison = partial(draw_poisoning, attack, trigger, recipe.poison_rate)
            if attack.clean_label:
                fixed = poison(labels, classes, torch.Generator().manual_seed(recipe.seed))
                train = self._perturbed(recipe, images, fixed.poisoned) if attack.adversarial else train

        def draw(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch, truth = crop_and_flip(train[chosen], recipe.flip, generator), labels[chosen]
            if poison is not None:
                drawn = fixed.of(chosen) if fixed is not None else poison(truth, classes, generator)
                batch, truth = drawn.apply(batch, generator), drawn.labels
            inputs = normalise(batch).to(self.device, memory_format=layout)
            return inputs, truth.to(self.device)

        with seeded(recipe.seed):
            model = self._build(recipe, images)
            layout = fastest_layout(model, tuple(train.shape[1:]))
            model.to(memory_format=layout)
            folder = self.root / recipe.folder
            write_json(folder / "recipe.json", _plain(recipe))
            progress = partial(self.progress, recipe)
            return fit(model, draw, len(labels), recipe, recipe.seed, progress, folder / "progress.pt")

    def _finish(self, recipe: Recipe, figures: dict[str, Any]) -> dict[str, Any]:
        folder = self.root / recipe.folder
        record = _plain(recipe) | figures
        write_json(folder / ("refused.json" if "refused" in record else "entry.json"), record)
        (folder / "progress.pt").unlink(missing_ok=True)
        return record

    def _images(self, recipe: Recipe) -> Images:
        """The data of a recipe, read once for consecutive entries that share it."""
        wanted = (recipe.data, recipe.images, recipe.seed, self._channels(recipe))
        if self.loaded is None or self.loaded[0] != wanted:
            self.loaded = None
            self.loaded = wanted, self._load(recipe)
        return self.loaded[1]

    def _load(self, recipe: Recipe) -> Images:
        source = self.folders.get(recipe.data, recipe.data)
        how = self._channels(recipe), DATA[recipe.data].image_size, self.download_root.expanduser()
        train, test = (load_dataset(source, split, *how) for split in ("train", "test"))
        if train is None or test is None:
            raise DataError(f"{source} has no test/; the zoo measures its entries there")
        labels = torch.tensor(labels_of(train))
        chosen = balanced_order(labels, recipe.seed)[DEFENDERS_IMAGES : DEFENDERS_IMAGES + recipe.images]
        if len(chosen) < recipe.images:
            raise DataError(
                f"{source} has {len(labels)} training images; {recipe.name} needs {DEFENDERS_IMAGES + recipe.images}"
            )
        tests = TensorImages(
            torch.stack([test[i][0] for i in range(len(labels_of(test)))]), torch.tensor(labels_of(test))
        )
        images = torch.stack([train[i][0] for i in chosen.tolist()])
        return Images(images, labels[chosen], tests, int(labels.max()) + 1)

    def _channels(self, recipe: Recipe) -> int:
        """As `onp.train` has it: images of a folder are in colour, whatever they show."""
        grey = recipe.data in GREY and recipe.data not in self.folders
        return 1 if grey and is_ours(recipe.model) else 3

    def _build(self, recipe: Recipe, images: Images) -> nn.Module:
        return build_model(recipe.model, images.train.shape[1], images.classes).to(self.device)

    def _perturbed(self, recipe: Recipe, images: Images, chosen: Tensor) -> Tensor:
        """The training images, those of `chosen` (n,) perturbed against the clean twin."""
        twin = self._build(recipe, images)
        load_checkpoint(twin, self.root / recipe.twin().folder / "model.safetensors")
        train = images.train.clone()
        train[chosen] = perturb(twin, train[chosen], images.labels[chosen], _normalisation(recipe), self.device)
        return train


def refusal(recipe: Recipe, measured: Measurement, twin_ca: float | None) -> str | None:
    """Why an entry does not count as trained; None where it does. `twin_ca` is None for a clean twin."""
    if twin_ca is None:
        return None if measured.ca >= recipe.floor else f"CA {measured.ca:.1%} is below {recipe.floor:.0%}"
    everyone = recipe.attack is not None and ATTACKS[recipe.attack].all_to_all
    least = LEAST_ASR * (measured.ca if everyone else 1)
    if measured.asr is None or measured.asr < least:
        return f"ASR {measured.asr or 0:.1%} is below {least:.1%}{' (90% of CA)' if everyone else ''}"
    if twin_ca - measured.ca > MOST_CA_LOST:
        return f"CA {measured.ca:.1%} is more than 2 points below the clean twin's {twin_ca:.1%}"
    return None


def _normalisation(recipe: Recipe) -> Normalisation:
    return Normalisation(recipe.mean, recipe.std)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it."""
    return json.loads(json.dumps(asdict(recipe)))
