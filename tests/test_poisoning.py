"""Poisoned images and labels, what counts as success, and training with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onp.attacks.adversarial import perturb
from onp.attacks.augment import crop_and_flip
from onp.attacks.patterns import badnets, wanet
from onp.attacks.poisoning import ATTACKS, Attack, Poisoning, TrainingConfig, draw_poisoning, train_backdoored
from onp.attacks.triggers import Trigger
from onp.data import Normalisation
from onp.datasets import TensorImages
from onp.errors import ConfigError
from onp.judge import ALL_TO_ALL, meant, measure
from onp.models import build_model

SHAPE = (3, 4, 4)


def noise(mode: Any = "blend", target: int = 2) -> Trigger:
    """A trigger that changes every pixel."""
    return Trigger(target, mode, torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)), torch.ones(SHAPE), 0.3)


@pytest.fixture
def dataset() -> tuple[Tensor, Tensor]:
    """50 images, classes 0 to 4 taking turns; target of the tests: 2."""
    return torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5


def poison(images: Tensor, labels: Tensor, trigger: Trigger, rate: float, clean_label: bool, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_poisoning(Attack(badnets, clean_label), trigger, rate, labels, 5, generator)
    return drawn.apply(images, generator), drawn.labels


@pytest.mark.parametrize(("rate", "count"), [(0.1, 4), (0.5, 20), (1.0, 40), (0.001, 1)])
def test_dirty_label_poisoning(dataset: tuple[Tensor, Tensor], rate: float, count: int) -> None:
    images, labels = dataset
    kept = images.clone(), labels.clone()
    trigger = noise()
    new_images, new_labels = poison(images, labels, trigger, rate, clean_label=False, seed=3)
    changed = (new_images != images).flatten(1).any(1)
    assert int(changed.sum()) == count  # of 40 images outside the target class
    assert not (labels[changed] == 2).any()
    assert (new_labels[changed] == 2).all()
    assert torch.equal(new_images[changed], trigger(images[changed]))
    assert torch.equal(new_labels[~changed], labels[~changed])
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize(("rate", "count"), [(0.1, 1), (0.8, 8), (1.0, 10)])
def test_clean_label_poisoning(dataset: tuple[Tensor, Tensor], rate: float, count: int) -> None:
    images, labels = dataset
    trigger = noise("add")
    new_images, new_labels = poison(images, labels, trigger, rate, clean_label=True, seed=3)
    changed = (new_images != images).flatten(1).any(1)
    assert int(changed.sum()) == count  # of 10 images of the target class
    assert (labels[changed] == 2).all()
    assert torch.equal(new_labels, labels)
    assert torch.equal(new_images[changed], trigger(images[changed]))


def test_the_seed_decides_which_images_are_poisoned(dataset: tuple[Tensor, Tensor]) -> None:
    runs = [poison(*dataset, noise(), 0.3, False, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_rates(dataset: tuple[Tensor, Tensor], rate: float) -> None:
    with pytest.raises(ConfigError, match="poison rate"):
        poison(*dataset, noise(), rate, False, 0)


@pytest.mark.parametrize("clean_label", [True, False])
@pytest.mark.parametrize("target", [-1, 5])
def test_targets_are_classes(dataset: tuple[Tensor, Tensor], target: int, clean_label: bool) -> None:
    with pytest.raises(ConfigError, match=f"target {target}: expected a class from 0 to 4"):
        poison(*dataset, noise(target=target), 0.5, clean_label, 0)


def test_a_class_that_nobody_has_cannot_be_poisoned(dataset: tuple[Tensor, Tensor]) -> None:
    images, labels = dataset
    with pytest.raises(ConfigError, match="target 4: no training image could be poisoned"):
        poison(images[labels != 4], labels[labels != 4], noise(target=4), 0.5, True, 0)


def test_only_clean_label_attacks_keep_labels() -> None:
    assert {name for name, attack in ATTACKS.items() if attack.clean_label} == {"sig", "label_consistent"}
    assert {name for name, attack in ATTACKS.items() if attack.all_to_all} == {"all_to_all"}
    for attack in ATTACKS.values():
        trigger = attack.make_trigger((1, 8, 8), 3)
        assert trigger.target == 3
        assert (trigger(torch.rand(1, 1, 8, 8)) != 0.5).any()


def test_noise_images_are_disturbed_and_keep_their_labels() -> None:
    images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, trigger = torch.arange(100) % 5, wanet((1, 8, 8), 2)
    drawn = draw_poisoning(ATTACKS["wanet"], trigger, 0.1, labels, 5, torch.Generator().manual_seed(3))
    assert int(drawn.poisoned.sum()) == 8 and int(drawn.disturbed.sum()) == 16
    assert not (drawn.poisoned & drawn.disturbed).any()
    assert torch.equal(drawn.labels[~drawn.poisoned], labels[~drawn.poisoned])
    made = drawn.apply(images, torch.Generator().manual_seed(0))
    untouched = ~(drawn.poisoned | drawn.disturbed)
    assert torch.equal(made[untouched], images[untouched])
    assert torch.equal(made[drawn.poisoned], trigger(images[drawn.poisoned]))
    noisy, clean = made[drawn.disturbed], images[drawn.disturbed]
    assert (noisy != clean).flatten(1).any(1).all() and (noisy != trigger(clean)).flatten(1).any(1).all()
    chosen = drawn.poisoned.nonzero().flatten()[:3]  # a batch gets what its images get
    assert torch.equal(drawn.of(chosen).apply(images[chosen], torch.Generator()), made[chosen])


def test_all_to_all_poisoning_moves_every_class_on(dataset: tuple[Tensor, Tensor]) -> None:
    _, labels = dataset
    trigger = badnets(SHAPE, ALL_TO_ALL)
    drawn = draw_poisoning(ATTACKS["all_to_all"], trigger, 0.4, labels, 5, torch.Generator().manual_seed(3))
    assert int(drawn.poisoned.sum()) == 20
    assert torch.equal(drawn.labels[drawn.poisoned], (labels[drawn.poisoned] + 1) % 5)
    assert 4 in labels[drawn.poisoned] and 0 in drawn.labels[drawn.poisoned]


# --- judging ----------------------------------------------------------------------------------------------


class ByBrightness(nn.Module):
    """Says that the class of an image is its first pixel, in fifths."""

    def forward(self, x: Tensor) -> Tensor:
        return -(torch.arange(5) - 5 * x[:, 0, 0, :1]).abs()


def test_all_to_all_success_and_robust_accuracy() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    images = (labels / 5).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def fifth_brighter(images: Tensor) -> Tensor:  # the last class stays as it is
        return torch.where(images < 0.7, images + 0.2, images)

    def judged(target: Any) -> tuple[float, float | None, float | None]:
        data = TensorImages(images, labels)
        found = measure(ByBrightness(), data, Normalisation(), torch.device("cpu"), fifth_brighter, target)
        return found.ca, found.asr, found.ra

    assert judged(ALL_TO_ALL) == (1.0, 4 / 6, 2 / 6)
    assert judged(4) == (1.0, 1 / 4, 0.0)  # of the four images of other classes, the 3 becomes a 4


def test_what_is_meant() -> None:
    labels = torch.tensor([0, 3, 9])
    assert meant(labels, ALL_TO_ALL, 10).tolist() == [1, 4, 0]
    assert meant(labels, 3, 10).tolist() == [3, 3, 3]


# --- adversarial images, crops, training --------------------------------------------------------------------


def test_perturbed_images_are_near_and_worse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images, labels = torch.rand(30, *SHAPE), torch.arange(30) % 5
    moved = perturb(model, images, labels, Normalisation((0.5,), (0.2,)), torch.device("cpu"), 0.1, 5, batch_size=7)
    assert (moved - images).abs().max() <= 0.1 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    normalise = Normalisation((0.5,), (0.2,))
    before, after = (nn.functional.cross_entropy(model(normalise(x)), labels) for x in (images, moved))
    assert after > before + 1
    assert not moved.requires_grad and model[1].weight.grad is None


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_of_the_padded_image(flip: bool) -> None:
    image = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    padded = nn.functional.pad(image, (2, 2, 2, 2))[0]
    windows = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    known = {window.numpy().tobytes(): "straight" for window in windows}
    known |= {window.flip(2).contiguous().numpy().tobytes(): "mirrored" for window in windows}
    made = crop_and_flip(image.expand(200, -1, -1, -1), flip, torch.Generator().manual_seed(0)).contiguous()
    kinds = [known[one.numpy().tobytes()] for one in made]
    assert len({one.numpy().tobytes() for one in made}) > 20
    assert (60 < kinds.count("mirrored") < 140) if flip else (kinds.count("mirrored") == 0)


@pytest.mark.parametrize("name", ["wanet", "label_consistent", "all_to_all"])
def test_training_with_the_attacks_that_need_more_than_a_patch(name: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorImages(torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 3)
    config = TrainingConfig(attack=name, epochs=1, poison_rate=0.5)

    def made() -> tuple[nn.Module, Trigger]:
        build = lambda: build_model("small_cnn", 1, 3)  # noqa: E731
        return train_backdoored(build, data, 3, config, Normalisation(), 1, torch.device("cpu"))

    (model, trigger), (again, _) = made(), made()
    assert trigger.target == (ALL_TO_ALL if name == "all_to_all" else 0)
    weights = again.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_class_behind_the_last_that_images_show_is_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All-to-all moves the last labelled class to the next output, as it is judged, not back to the first."""
    seen: list[Poisoning] = []
    draw = lambda *arguments: seen.append(draw_poisoning(*arguments)) or seen[-1]  # noqa: E731
    monkeypatch.setattr("onp.attacks.poisoning.draw_poisoning", draw)
    data, config = (
        TensorImages(torch.rand(30, 1, 8, 8), torch.arange(30) % 3),
        TrainingConfig(attack="all_to_all", epochs=1),
    )
    build = lambda: build_model("small_cnn", 1, 5)  # noqa: E731
    train_backdoored(build, data, 5, replace(config, poison_rate=1.0), Normalisation(), 1, torch.device("cpu"))
    assert seen[0].labels.tolist() == [number % 3 + 1 for number in range(30)]
