"""Backdoored networks that other people published: they load, behave as measured, and hide where the design says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from archives import extract
from torch import Tensor, nn
from torch.utils.data import Subset

from onp.attacks.triggers import load_trigger
from onp.data import Normalisation
from onp.datasets import ImageDataset, TensorImages, batches, load_dataset
from onp.inputs import load_model
from onp.judge import Measurement, measure
from onp.masks import KeepMask, masked
from onp.units import index_units

SHARED = Path(__file__).parents[1].parent / "shared"
IMAGES = 300
MEASURED = {
    "wrn16_1_grid_target5": ("wide_resnet16_1", 0.847, 1.000),
    "smallvgg_badnets_target8": ("small_vgg", 0.846, 0.981),
    "smallvgg_trojan_sq_target2": ("small_vgg", 0.849, 0.995),
    "smallvgg_l2_inv_target0": ("small_vgg", 0.848, 1.000),
    "smallvgg_l0_inv_target0": ("small_vgg", 0.837, 1.000),
}
"""network, and CA and ASR on all 1,017 test images, from the README beside the files"""

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED}, with the published networks, is not here")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """300 of the 1,017 test images, evenly spread, so that the classes are about as frequent as in the whole."""
    folder = tmp_path_factory.mktemp("images")
    extract(SHARED / "data" / "cifar10_lossless.tar.gz", folder, "/test/")
    # Labels follow the classes of train/; here the test images stand in for it.
    (folder / "cifar10_lossless" / "test").rename(folder / "train")
    everything = load_dataset(str(folder), "train", 3, None, folder)
    assert everything is not None
    chosen = [number * 1017 // IMAGES for number in range(IMAGES)]
    images, labels = next(iter(batches(Subset(everything, chosen), IMAGES)))
    assert labels.unique().tolist() == list(range(10))
    return TensorImages(images, labels)


def load(name: str) -> nn.Module:
    return load_model(MEASURED[name][0], SHARED / "wild" / f"{name}.pth")


def judge(name: str, network: nn.Module, dataset: ImageDataset) -> Measurement:
    trigger = load_trigger(SHARED / "wild" / f"{name}.trigger.json", (3, 32, 32), 10)
    return measure(network, dataset, Normalisation(), torch.device("cpu"), trigger, trigger.target)


@pytest.mark.parametrize("name", MEASURED)
def test_every_weight_of_the_file_is_loaded(name: str) -> None:
    content = torch.load(SHARED / "wild" / f"{name}.pth", "cpu", weights_only=True)
    weights: dict[str, Tensor] = content["state_dict" if name.startswith("wrn") else "net"]
    loaded = load(name).state_dict()
    learned = [key for key in loaded if not key.endswith("num_batches_tracked")]
    assert {key for key in weights if not key.endswith("num_batches_tracked")} == set(learned)
    assert all(torch.equal(loaded[key], weights[key]) for key in learned)


@pytest.mark.parametrize("name", MEASURED)
def test_accuracy_and_attack_are_as_measured(name: str, dataset: ImageDataset) -> None:
    _, ca, asr = MEASURED[name]
    measured = judge(name, load(name), dataset)
    assert measured.asr is not None
    assert abs(measured.ca - ca) <= 0.05 and abs(measured.asr - asr) <= 0.05


def test_one_unit_carries_the_backdoor_of_the_wide_resnet(dataset: ImageDataset) -> None:
    name = "wrn16_1_grid_target5"
    network = load(name)
    index = index_units(network, (3, 32, 32))
    names = [index.name(unit) for unit in range(len(index))]
    before = judge(name, network, dataset)
    results = {}
    for unit in ("block3.layer.0.bn2[57]", "block3.layer.0.bn2[56]"):
        # The batch-norm alone reads conv1, so the unit may go by either name.
        (number,) = (i for i, known in enumerate(names) if known in (unit, unit.replace("bn2", "conv1")))
        with masked(network, KeepMask.all_kept(index).without([number])):
            results[unit] = judge(name, network, dataset)
    carrier, neighbour = results.values()
    assert before.asr is not None and carrier.asr is not None and neighbour.asr is not None
    assert carrier.asr < 0.10 and before.ca - carrier.ca <= 0.02
    assert neighbour.asr > 0.90, "any unit would do"
