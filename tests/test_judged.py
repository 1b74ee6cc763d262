"""The judged networks of the zoo, stored as float16: they load, and are as accurate and as backdoored as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import extract
from torch.utils.data import Subset

from onp.attacks.recipes import SUITES
from onp.attacks.triggers import load_trigger
from onp.data import Normalisation
from onp.datasets import ImageDataset, load_dataset
from onp.inputs import load_model
from onp.judge import measure

ZOO = Path(__file__).parent / "zoo"
DATA = Path(__file__).parents[1].parent / "shared" / "data"
FILES = {"cifar10": "cifar10_jpeg", "gtsrb": "gtsrb32"}
IMAGES = 400

needs_images = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA}, with the images, is not here")


def entry(name: str) -> tuple[Path, dict[str, Any]]:
    folder = ZOO / f"{name}-seed0"
    return folder, json.loads((folder / "entry.json").read_text())


@pytest.fixture(scope="module", params=FILES)
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ImageDataset]:
    """Name of the data, and 400 test images, evenly spread."""
    folder, stem = tmp_path_factory.mktemp("images"), FILES[request.param]
    extract(DATA / f"{stem}.tar.gz", folder, "/test/")
    (folder / stem / "test").rename(folder / "train")  # labels follow the classes of train/
    everything = load_dataset(str(folder), "train", 3, None, folder)
    assert everything is not None
    count = len(everything)  # type: ignore[arg-type]
    return request.param, Subset(everything, [number * count // IMAGES for number in range(IMAGES)])


def test_every_judged_network_is_here_and_they_are_small() -> None:
    assert {path.name for path in ZOO.iterdir()} == {f"{name}-seed0" for name in SUITES["judged"]}
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) < 25e6


def test_the_judged_part_is_wide_enough() -> None:
    records = [entry(name)[1] for name in SUITES["judged"]]
    assert len(records) >= 8
    assert {"blended", "wanet", "label_consistent"} <= {record["attack"] for record in records}
    assert len({record["model"].partition("-")[0] for record in records}) >= 3
    assert len({record["data"] for record in records}) >= 2
    assert not set(SUITES["judged"]) & set(SUITES["development"])


@needs_images
def test_accuracy_and_attack_are_those_recorded(images: tuple[str, ImageDataset]) -> None:
    data, dataset = images
    names = [name for name in SUITES["judged"] if name.startswith(data)]
    assert names
    for name in names:
        folder, record = entry(name)
        trigger = load_trigger(folder / "trigger.json", (3, 32, 32), record["classes"])
        network = load_model(record["model"], folder / "model.safetensors", num_classes=record["classes"])
        measured = measure(
            network, dataset, Normalisation(tuple(record["mean"]), tuple(record["std"])), torch.device("cpu"),
            trigger, trigger.target,
        )  # fmt: skip
        # Three standard errors of 400 images, and a little for float16.
        for found, expected in ((measured.ca, record["ca"]), (measured.asr, record["asr"])):
            assert found == pytest.approx(expected, abs=3 * (expected * (1 - expected) / IMAGES) ** 0.5 + 0.005), name
