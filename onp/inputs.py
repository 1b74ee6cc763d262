"""What the commands share: options that name a network and its data, and how they become objects."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import Subset

from onp.checkpoints import load_checkpoint
from onp.checks import check_logits
from onp.data import DefenceData, Normalisation, balanced_order
from onp.datasets import (
    GREY,
    NAMED_DATA,
    ImageDataset,
    Split,
    Thinned,
    class_count,
    draw_defence_data,
    labels_of,
    load_dataset,
)
from onp.errors import ConfigError, DataError, MisfitError, first_line, lacks_memory
from onp.models import build_model, is_ours
from onp.paths import real_path
from onp.seeding import check_seed

MOST_CLASSES, MOST_IMAGES, LARGEST_SIDE, MOST_THREADS = 100_000, 10**9, 4096, 1024
KINDS = {"model": str, "data": str, "device": str, "defence_size": int, "seed": int, "threads": int}
"""types of options as a run records them"""


@dataclass(frozen=True)
class InputConfig:
    """Which network, which images."""

    model: str = "small_cnn"
    """registered network (small_cnn, small_vgg, wide_resnet16_1, cifar_resnet18, preact_resnet18, cifar_vgg16_bn,
    cifar_mobilenet_v2; the last four also with a width, as in cifar_resnet18-w16; torchvision's classifiers), or
    path/to/file.py:function; the function is your code and is executed: no arguments, returns a module giving logits"""
    checkpoint: Path | None = None
    """weights: safetensors, or a PyTorch file of plain weights"""
    data: str = "digits"
    """folder that holds train/CLASS/IMAGE and perhaps test/CLASS/IMAGE, or one of digits (bundled), cifar10,
    fashion_mnist, gtsrb (downloaded by torchvision)"""
    defence_size: int = 500
    """clean images that the defender has, drawn from train/, equally many per class as far as they go"""
    test_size: int | None = None
    """test images to judge on, evenly drawn; all by default"""
    mean: tuple[float, ...] = ()
    """per-channel mean of the input normalisation; none by default"""
    std: tuple[float, ...] = ()
    """per-channel standard deviation of the input normalisation"""
    image_size: int | None = None
    """resize images to this height and width"""
    num_classes: int | None = None
    """outputs of a registered network; the number of classes in train/ by default"""
    channels: int | None = None
    """channels of the images: 1 reads them as grey; 3 by default, and for digits, fashion_mnist and a network of your
    own what its first convolution takes"""
    download_root: Path = Path("~/.cache/onp")
    """where torchvision keeps what it downloads"""
    seed: int = 0
    """seed of everything random"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ... or auto (cuda where there is one)"""
    threads: int = 0
    """CPU threads for PyTorch; 0 leaves its default"""

    def resolved(self) -> Self:
        """The same with absolute paths, the device chosen and the threads counted: what a run records."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Path):
                changes[item.name] = real_path(value, f"--{item.name.replace('_', '-')}")
        if self.data not in NAMED_DATA:
            changes["data"] = str(real_path(self.data, "--data"))
        path, colon, function = self.model.rpartition(":")
        if colon:
            changes["model"] = f"{real_path(path, '--model')}:{function}"
        if self.device == "auto":
            changes["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        changes["threads"] = self.threads or torch.get_num_threads()
        return replace(self, **changes)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> InputConfig:
        """The options as a run's `config.json` records them; raises `ConfigError` for what cannot be one."""
        names = {item.name for item in fields(InputConfig)}
        values = {name: value for name, value in record.items() if name in names}
        try:
            for name in ("checkpoint", "download_root"):
                values[name] = Path(values[name]) if values.get(name) else None
            for name in ("mean", "std"):
                values[name] = tuple(map(float, values.get(name, ())))
            for name, kind in KINDS.items():
                if name in values and type(values[name]) is not kind:
                    raise TypeError(f"{name} is {values[name]!r}")
            return InputConfig(**values)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"the recorded options cannot be read ({error}); restore config.json") from error

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation(self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A network with its weights, and access to its images."""

    config: InputConfig
    model: nn.Module
    channels: int
    classes: int
    """outputs of the network"""
    image_shape: tuple[int, ...]
    """(channels, height, width) of the training images"""
    train: ImageDataset
    """the training images"""

    def dataset(self, split: Split) -> ImageDataset | None:
        """The images of a split, of test/ at most `test_size`; None where a folder has none."""
        config = self.config
        if split == "train":
            return self.train
        dataset = load_dataset(config.data, split, self.channels, config.image_size, config.download_root)
        if dataset is None or config.test_size is None:
            return dataset
        return Thinned(dataset, config.test_size)

    def defence_data(self) -> DefenceData:
        """The clean images that the defender has."""
        config = self.config
        data = draw_defence_data(self.train, config.defence_size, self.classes, config.normalisation, config.seed)
        return data.to(self.device)

    def attacker_dataset(self) -> ImageDataset:
        """The training images that `defence_data` leaves: what a test model of ours is trained on."""
        labels = labels_of(self.train)
        order = balanced_order(torch.tensor(labels), self.config.seed)[self.config.defence_size :]
        if not len(order):
            raise DataError(
                f"--defence-size {self.config.defence_size} leaves no training image "
                f"of {len(labels)} to make a test model with; lower it"
            )
        return Subset(self.train, order.tolist())

    @property
    def device(self) -> torch.device:
        return torch_device(self.config.device)


def use_threads(threads: int) -> None:
    """Have PyTorch use so many CPU threads, or its default for 0; raises `ConfigError` for an impossible number."""
    if not 0 <= threads <= MOST_THREADS:
        raise ConfigError(f"--threads {threads}: expected 0 (PyTorch's default) to {MOST_THREADS}")
    if threads:
        torch.set_num_threads(threads)


def torch_device(name: str) -> torch.device:
    """The named device; raises `ConfigError` where PyTorch does not have it."""
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available here ({first_line(error)}); use cpu") from error


def load_model(name: str, checkpoint: str | Path, num_classes: int = 10, channels: int = 3) -> nn.Module:
    """A registered network, or `path/to/file.py:function`, in eval mode, with weights read safely from a file.

    Raises `MisfitError` where they are of another network, other `num_classes` or images of other `channels`.
    """
    model = build_model(name, channels, num_classes)
    try:
        load_checkpoint(model, Path(checkpoint))
    except MisfitError as error:
        raise MisfitError(f"{error}; {name} was built with num_classes={num_classes}, channels={channels}") from error
    return model.eval()


def load_defence_data(
    folder: str | Path,
    size: int = 500,
    seed: int = 0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    image_size: int | None = None,
    channels: int | None = None,
) -> DefenceData:
    """Draw `size` clean images from `folder`/train/CLASS/IMAGE, equally many per class as far as they go.

    `folder` may be one of `NAMED_DATA` too; `channels` are 1 for its grey ones and 3 for all else, by default.
    """
    channels = channels or (1 if folder in GREY else 3)
    dataset = load_dataset(str(folder), "train", channels, image_size, Path("~/.cache/onp").expanduser())
    assert dataset is not None
    return draw_defence_data(dataset, size, class_count(dataset), Normalisation(mean, std), seed)


def open_inputs(config: InputConfig) -> Inputs:
    """Build the network, load its weights strictly, and check that there are images to train on."""
    check_seed(config.seed)
    use_threads(config.threads)
    for name, most in (("image_size", LARGEST_SIDE), ("num_classes", MOST_CLASSES), ("test_size", MOST_IMAGES)):
        if (value := getattr(config, name)) is not None and not (type(value) is int and 1 <= value <= most):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 to {most}")
    if config.channels not in (None, 1, 3):
        raise ConfigError(f"--channels {config.channels}: expected 1 (grey) or 3")
    device = torch_device(config.device)
    channels = _expected_channels(config)
    train = load_dataset(config.data, "train", channels, config.image_size, config.download_root)
    assert train is not None
    classes = class_count(train)
    model = build_model(config.model, channels, config.num_classes or classes)
    if config.checkpoint is not None:
        try:
            load_checkpoint(model, config.checkpoint)
        except MisfitError as error:
            built = f"--model {config.model} was built for {config.num_classes or classes} classes, {channels} channels"
            hint = "check it, --num-classes and --channels, and that train/ has a folder for every class, empty or not"
            raise MisfitError(f"{error}; {built}: {hint}") from error
    shape = tuple(train[0][0].shape)
    outputs = _outputs(model, shape)
    if classes > outputs:
        raise DataError(
            f"{config.data} has {classes} classes, so labels up to {classes - 1}; the network has {outputs} outputs; "
            "check --model and --num-classes, or take folders out"
        )
    return Inputs(config, model.to(device).eval(), channels, outputs, shape, train)


def _expected_channels(config: InputConfig) -> int:
    """Input channels of the network: a user's own network tells, the others follow the data, but for `channels`."""
    if config.channels is not None:
        return config.channels
    if ":" in config.model:
        model = build_model(config.model, 3, 1)
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        return first.in_channels if first is not None else 3
    return 1 if config.data in GREY and is_ours(config.model) else 3


def _outputs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many classes `model` knows, asked with two black images."""
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *shape))
    except Exception as error:
        if lacks_memory(error):
            raise
        raise DataError(
            f"{type(model).__name__} does not take images of shape {shape} "
            f"({first_line(error)}); check --model, --data and --image-size"
        ) from error
    check_logits(model, logits, images=2)
    return int(logits.shape[1])
