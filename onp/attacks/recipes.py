"""What the zoo holds: the recipe of every entry, fixed by its name, DATA-NETWORK-ATTACK, and its seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from onp.attacks.fitting import FitConfig
from onp.attacks.poisoning import ATTACKS, AttackName
from onp.errors import ConfigError

CLEAN: Literal["clean"] = "clean"


@dataclass(frozen=True)
class DataRecipe:
    """How networks are trained on a data set."""

    classes: int
    images: int
    """training images, in whole batches: oneDNN's channels-last backward pass can crash on odd ones"""
    epochs: int
    flip: bool
    """whether a mirrored image still is of its class"""
    floor: float
    """clean accuracy under which a network counts as not trained"""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int | None = None
    """what images are resized to, for networks made for 32 x 32"""


DATA = {
    "cifar10": DataRecipe(10, 24_960, 10, True, 0.70, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "gtsrb": DataRecipe(43, 19_968, 6, False, 0.85, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "fashion_mnist": DataRecipe(10, 24_960, 4, True, 0.80, image_size=32),
    "digits": DataRecipe(10, 768, 12, False, 0.90),
}
FEWER_IMAGES = {"small_vgg": 18_048, "cifar_mobilenet_v2": 14_080}
"""training images of networks that take longer, whatever their width"""
POISON: dict[AttackName, tuple[float, int]] = {
    "badnets": (0.1, 0),
    "blended": (0.1, 1),
    "sig": (0.5, 2),
    "trojan": (0.1, 3),
    "l0": (0.1, 4),
    "l2": (0.1, 5),
    "wanet": (0.06, 6),
    "dynamic": (0.1, 7),
    "label_consistent": (0.6, 8),
    "all_to_all": (0.3, 0),
}
"""poisoned fraction of the poisonable images (clean labels: of the target class), and the target for seed 0"""
LEARNING_RATE = 0.1
BATCH_SIZE = 128

SUITES = {
    "development": (
        "cifar10-wide_resnet16_1-blended",
        "cifar10-wide_resnet16_1-wanet",
        "cifar10-preact_resnet18-w16-badnets",
        "gtsrb-cifar_vgg16_bn-w16-trojan",
        "gtsrb-cifar_vgg16_bn-w16-l2",
        "gtsrb-cifar_vgg16_bn-w16-wanet",
        "cifar10-wide_resnet16_1-sig",
        "cifar10-small_vgg-l0",
    ),
    "judged": (
        "cifar10-cifar_resnet18-w16-blended",
        "cifar10-preact_resnet18-w16-wanet",
        "gtsrb-preact_resnet18-w16-wanet",
        "cifar10-preact_resnet18-w16-label_consistent",
        "gtsrb-cifar_mobilenet_v2-w0.5-badnets",
        "cifar10-cifar_vgg16_bn-w16-dynamic",
        "gtsrb-cifar_resnet18-w16-l2",
        "gtsrb-wide_resnet16_1-all_to_all",
        "gtsrb-wide_resnet16_1-trojan",
    ),
    "calibration": (
        "digits-small_cnn-clean",
        "digits-wide_resnet16_1-clean",
        "digits-preact_resnet18-w16-clean",
        "digits-small_cnn-badnets",
        "digits-small_cnn-l2",
        "digits-small_cnn-all_to_all",
        "digits-wide_resnet16_1-blended",
        "digits-preact_resnet18-w16-l0",
        "digits-preact_resnet18-w16-trojan",
        "digits-preact_resnet18-w16-all_to_all",
    ),
}
"""names that stand for several entries: to develop a defence with, to judge it on, and to calibrate its confidence
(docs/detection.md names the seeds of these)"""


@dataclass(frozen=True, kw_only=True)
class Recipe(FitConfig):
    """Everything that decides an entry's weights, but for the images themselves."""

    name: str
    seed: int
    data: str
    model: str
    attack: AttackName | None
    """None for a clean twin"""
    images: int
    poison_rate: float | None = None
    target: int | None = None
    flip: bool
    floor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1 or self.images % self.batch_size:
            raise ConfigError(f"images {self.images}: expected a multiple of {self.batch_size}, the size of a batch")

    @property
    def folder(self) -> str:
        return f"{self.name}-seed{self.seed}"

    def twin(self) -> Recipe:
        """The same network, trained alike on clean images."""
        clean = make_recipe(f"{self.data}-{self.model}-{CLEAN}", self.seed)
        return replace(clean, images=self.images, epochs=self.epochs)


def make_recipe(name: str, seed: int) -> Recipe:
    """The recipe of an entry; raises `ConfigError` for a name that is not DATA-NETWORK-ATTACK.

    The target moves on by one class with each seed.
    """
    data, _, rest = name.partition("-")
    model, _, attack = rest.rpartition("-")
    if data not in DATA or not model or attack not in (*ATTACKS, CLEAN):
        raise ConfigError(
            f"zoo entry {name!r}: expected a suite ({', '.join(SUITES)}) or DATA-NETWORK-ATTACK, with data of "
            f"{', '.join(DATA)}, a network that --model knows and an attack of {', '.join((*ATTACKS, CLEAN))}"
        )
    known = DATA[data]
    rate, target = (None, None) if attack == CLEAN else POISON[attack]
    return Recipe(
        epochs=known.epochs,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        name=name,
        seed=seed,
        data=data,
        model=model,
        attack=None if attack == CLEAN else attack,
        images=min(known.images, FEWER_IMAGES.get(model.partition("-w")[0], known.images)),
        poison_rate=rate,
        target=None if target is None else (target + seed) % known.classes,
        flip=known.flip,
        floor=known.floor,
        mean=known.mean,
        std=known.std,
    )


def expand(names: tuple[str, ...], seed: int) -> list[Recipe]:
    """The recipes of entries and suites, each once; of everything in the suites without names."""
    entries = [entry for name in names or SUITES for entry in SUITES.get(name, (name,))]
    return [make_recipe(entry, seed) for entry in dict.fromkeys(entries)]
