"""RNP (arXiv 2305.14876) against computations written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from archives import extract
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import TinyNet

from baselines_rnp.recover import RecoverConfig, recover
from baselines_rnp.rnp import THRESHOLDS, RNPConfig, choose_threshold, run_rnp, threshold_masks
from baselines_rnp.unlearn import unlearn
from onp.checkpoints import load_checkpoint
from onp.config import UnlearnConfig
from onp.data import DefenceData, Normalisation
from onp.datasets import draw_defence_data, load_dataset
from onp.errors import ModelError
from onp.masks import masked
from onp.models import build_model
from onp.units import UnitIndex, index_units

SHARED = Path(__file__).parents[1].parent / "shared"
WILD = SHARED / "wild" / "wrn16_1_grid_target5.pth"
ARCHIVE = SHARED / "data" / "cifar10_lossless.tar.gz"


def tiny_data(size: int = 24) -> DefenceData:
    """Images that flipping leaves alone, and too small (4 x 4) to be cropped: augmentation changes nothing."""
    half = torch.rand(size, 1, 4, 2, generator=torch.Generator().manual_seed(1))
    images = torch.cat([half, half.flip(3)], 3)
    labels = (images.mean((1, 2, 3)) * 30).long() % 3
    return DefenceData(images, labels, 3, Normalisation((0.4,), (0.3,)))


@pytest.fixture
def tiny() -> tuple[TinyNet, UnitIndex]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        nn.init.uniform_(model.bn.weight, 0.5, 1.5)
        nn.init.uniform_(model.bn.bias, -0.5, 0.5)
    return model.eval(), index_units(model, (1, 4, 4))


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], two[key]) for key in one)


# --- recover --------------------------------------------------------------------------------------------


def recovered_by_hand(model: TinyNet, data: DefenceData, rate: float, momentum: float, steps: int) -> Tensor:
    """Full-batch recovery (loss x 0.2) with batch-norm written out; only gamma is masked."""
    mask, velocity = torch.ones(6), torch.zeros(6)
    x = model.conv((data.images - 0.4) / 0.3).detach()
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (var + model.bn.eps).sqrt()
    for _ in range(steps):
        mask.requires_grad_()
        h = x * (model.bn.weight * mask).view(1, -1, 1, 1) + model.bn.bias.view(1, -1, 1, 1)
        logits = model.fc(model.hidden(h.clamp(min=0).mean((2, 3))))
        loss = -0.2 * logits.log_softmax(1)[torch.arange(len(data)), data.labels].mean()
        (gradient,) = torch.autograd.grad(loss, mask)
        velocity = momentum * velocity + gradient
        mask = (mask.detach() - rate * velocity).clamp(0, 1)
    return mask


@pytest.mark.parametrize(("rate", "momentum", "steps"), [(0.2, 0.9, 1), (5.0, 0.9, 1), (3.0, 0.9, 6), (40.0, 0.0, 3)])
def test_recovery_equals_gradient_descent_on_gamma_times_mask(
    tiny: tuple[TinyNet, UnitIndex], rate: float, momentum: float, steps: int
) -> None:
    model, index = tiny
    data = tiny_data()
    config = RecoverConfig(rate, momentum, loss_weight=0.2, epochs=steps, batch_size=64)
    values = recover(model, index, data, config, seed=3)
    expected = recovered_by_hand(model, data, rate, momentum, steps)
    assert values.dtype == torch.float32 and values.shape == (9,) and not values.requires_grad
    assert torch.allclose(values[index.batch_norm_units], expected, atol=1e-5)
    assert torch.equal(values[~index.batch_norm_units], torch.ones(3))
    assert bool((expected < 1).any())


def test_masks_stay_between_0_and_1(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    values = recover(model, index, tiny_data(), RecoverConfig(learning_rate=500.0, epochs=3), seed=0)
    assert 0 == values.min() < values.max() == 1


def test_recovery_leaves_the_unlearned_network_alone(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    before = state(model)
    recover(model, index, tiny_data(), RecoverConfig(), seed=0)
    assert same(before, model.state_dict()) and not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_recovery_follows_its_seed_and_not_the_global_one(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    config = RecoverConfig(learning_rate=2.0, epochs=2, batch_size=8)
    generator_state = torch.get_rng_state()
    first = recover(model, index, tiny_data(), config, seed=5)
    assert torch.equal(generator_state, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(first, recover(model, index, tiny_data(), config, seed=5))
    assert not torch.equal(first, recover(model, index, tiny_data(), config, seed=6))


def test_a_broken_unlearned_network_is_an_error(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    nn.init.constant_(model.fc.weight, torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        recover(model, index, tiny_data(), RecoverConfig(epochs=1), seed=0)


# --- unlearn --------------------------------------------------------------------------------------------


def learn(model: nn.Module, data: DefenceData) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(data.inputs), data.labels).backward()
        optimizer.step()
    model.zero_grad()
    model.eval()


def unlearned_by_hand(model: nn.Module, data: DefenceData, config: UnlearnConfig, epochs: int) -> list[float]:
    """Running train-mode accuracy of each epoch, with SGD written out, batches in order."""
    model = copy.deepcopy(model).train()
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    accuracies = []
    for epoch in range(epochs):
        rate = config.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
        correct = 0
        for batch in torch.arange(len(data)).split(config.batch_size):
            logits = model(data.inputs[batch])
            gradients = torch.autograd.grad(-F.cross_entropy(logits, data.labels[batch]), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(config.momentum).add_(g + config.weight_decay * p)
                    p.sub_(rate * v)
            correct += int((logits.argmax(1) == data.labels[batch]).sum())
        accuracies.append(correct / len(data))
    return accuracies


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))


@pytest.mark.usefixtures("in_order")
def test_unlearning_stops_on_the_running_accuracy_of_the_epoch(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, data = tiny[0], tiny_data()
    learn(model, data)
    before = state(model)
    config = UnlearnConfig(learning_rate=0.004, batch_size=10, milestones=(3,), stop_accuracy=0.7)
    accuracies = unlearned_by_hand(model, data, config, config.max_epochs)
    stop = next(i for i, accuracy in enumerate(accuracies) if accuracy <= config.stop_accuracy)
    unlearned = unlearn(model, data, config, seed=0)
    assert 1 <= stop < 20 and accuracies[0] > 0.8
    assert unlearned.reached and unlearned.epochs == stop + 1 and unlearned.accuracy == accuracies[stop]
    assert unlearned.steps == 3 * (stop + 1)  # batches of 10, 10 and 4
    assert same(before, model.state_dict()) and not unlearned.model.training


@pytest.mark.usefixtures("in_order")
def test_unlearning_that_never_reaches_the_stop_ends_after_max_epochs(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, data = tiny[0], tiny_data()
    learn(model, data)
    config = UnlearnConfig(learning_rate=1e-6, max_epochs=3)
    unlearned = unlearn(model, data, config, seed=0)
    assert not unlearned.reached and unlearned.epochs == unlearned.steps == 3  # a batch an epoch
    assert unlearned.accuracy == unlearned_by_hand(model, data, config, 3)[-1]


def test_unlearning_can_stop_on_one_batch(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, data = tiny[0], tiny_data()
    learn(model, data)
    config = UnlearnConfig(learning_rate=0.05, batch_size=4, stop_accuracy=0.25, stop_on="batch")
    unlearned = unlearn(model, data, config, seed=0)
    assert unlearned.reached and unlearned.accuracy in (0.0, 0.25)
    assert 6 * (unlearned.epochs - 1) < unlearned.steps <= 6 * unlearned.epochs


@pytest.mark.parametrize("stop_on", ["batch", "epoch"])
def test_unlearning_that_ends_too_soon_is_repeated_at_a_third_of_the_learning_rate(
    tiny: tuple[TinyNet, UnitIndex], stop_on: Literal["batch", "epoch"]
) -> None:
    model, data = tiny[0], tiny_data()
    learn(model, data)
    before = state(model)
    config = UnlearnConfig(learning_rate=0.2, batch_size=8, milestones=(), stop_accuracy=0.3, stop_on=stop_on)
    rates = [0.2, 0.2 / 3, 0.2 / 3 / 3, 0.2 / 3 / 3 / 3]
    plain = [unlearn(model, data, replace(config, learning_rate=rate), seed=0) for rate in rates]
    steps = [run.steps for run in plain]
    assert all(run.reached for run in plain) and steps == sorted(steps) and len(set(steps)) >= 3
    for least in (0, steps[0], steps[0] + 1, steps[2], steps[2] + 1, steps[3]):
        expected = next(number for number, taken in enumerate(steps) if taken >= least)
        found = unlearn(model, data, replace(config, min_steps=least), seed=0)
        assert found.steps == steps[expected] >= least
        assert same(found.model.state_dict(), plain[expected].model.state_dict())
        assert (found.epochs, found.accuracy, found.reached) == (
            plain[expected].epochs, plain[expected].accuracy, True
        )  # fmt: skip
    assert same(before, model.state_dict())


def test_unlearning_that_never_reaches_the_stop_is_not_repeated(tiny: tuple[TinyNet, UnitIndex]) -> None:
    """More steps at a lower rate would not get further."""
    model, data = tiny[0], tiny_data()
    learn(model, data)
    config = UnlearnConfig(learning_rate=1e-4, max_epochs=2)
    plain, found = (unlearn(model, data, replace(config, min_steps=least), seed=0) for least in (0, 50))
    assert not found.reached and found.steps == 2
    assert same(plain.model.state_dict(), found.model.state_dict())


def test_unlearning_keeps_a_copy_that_fell_too_soon_where_a_slower_one_never_falls(
    tiny: tuple[TinyNet, UnitIndex],
) -> None:
    model, data = tiny[0], tiny_data()
    learn(model, data)
    config = UnlearnConfig(learning_rate=0.2, batch_size=8, milestones=(), stop_accuracy=0.3, max_epochs=2)
    rates = (0.2, 0.2 / 3, 0.2 / 3 / 3)
    plain = [unlearn(model, data, replace(config, learning_rate=rate), seed=0) for rate in rates]
    assert [run.reached for run in plain] == [True, True, False]
    found = unlearn(model, data, replace(config, min_steps=50), seed=0)
    assert found.reached and same(plain[1].model.state_dict(), found.model.state_dict())


class Wrong(nn.Module):
    """Always says class 2, which no image has; counts its calls, those of its copies too."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)
        with torch.no_grad():
            self.fc.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))

    def forward(self, x: Tensor) -> Tensor:
        Wrong.calls += 1
        assert Wrong.calls < 2000, "unlearning goes on although no learning rate can delay its stop"
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("stop_on", ["batch", "epoch"])
def test_unlearning_ends_where_the_network_knows_nothing_from_the_outset(stop_on: Literal["batch", "epoch"]) -> None:
    Wrong.calls = 0
    data = replace(tiny_data(), labels=torch.arange(24) % 2)
    unlearned = unlearn(Wrong(), data, UnlearnConfig(stop_on=stop_on, min_steps=5), seed=0)
    assert unlearned.reached and unlearned.accuracy == 0


# --- prune ----------------------------------------------------------------------------------------------


def test_thresholds_are_those_of_the_reference() -> None:
    assert [f"{t:.2f}" for t in THRESHOLDS] == [f"0.{i:02d}" for i in range(0, 91, 5)]
    assert THRESHOLDS[3] == 0.15 and THRESHOLDS[6] == 0.3 and THRESHOLDS[-1] == 0.9


def test_threshold_masks_prune_gated_units_up_to_the_threshold(tiny: tuple[TinyNet, UnitIndex]) -> None:
    _, index = tiny
    values = torch.tensor([0.0, 0.15, 0.16, 0.9, 0.91, 1.0, 0.0, 0.0, 0.0])
    masks = dict(threshold_masks(index, values))
    assert list(masks) == list(THRESHOLDS)
    pruned = {t: (~mask.keep).nonzero().flatten().tolist() for t, mask in masks.items()}
    assert pruned[0.0] == [0] and pruned[0.1] == [0] and pruned[0.15] == [0, 1]
    assert pruned[0.2] == [0, 1, 2] and pruned[0.85] == [0, 1, 2] and pruned[0.9] == [0, 1, 2, 3]


def test_pruning_zeroes_gamma_and_leaves_beta(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    before = state(model)
    mask = threshold_masks(index, torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1]))[0][1]
    with masked(model, mask):
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {"bn.weight"} and model.bn.weight[0] == 0
        assert torch.equal(model.bn.weight[1:], before["bn.weight"][1:])
        channel = model.bn(model.conv(torch.rand(2, 1, 4, 4)))[:, 0]
        assert torch.equal(channel, before["bn.bias"][0].expand(2, 4, 4))


class ChannelsAreLogits(nn.Module):
    """Logit c is the mean of channel c, plus 0.1 for class 0: images that lose their channel are called 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, channels)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))
            self.fc.weight.copy_(torch.eye(channels))
            self.fc.bias.copy_(torch.tensor([0.1] + [0.0] * (channels - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def channel_data(counts: list[int], rival: tuple[int, int] | None = None) -> DefenceData:
    """`counts[c]` images of class c, channel c at 1; with `rival` = (c, r), channel r at 0.5 in images of class c."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = F.one_hot(labels, len(counts)).float()
    if rival is not None:
        images[labels == rival[0], rival[1]] = 0.5
    return DefenceData(images.view(-1, len(counts), 1, 1), labels, len(counts))


@pytest.mark.parametrize(
    ("max_drop", "threshold", "pruned"),
    [(0.0, 0.1, [0]), (0.019, 0.1, [0]), (0.02, 0.45, [0, 1]), (0.049, 0.45, [0, 1]), (0.05, 0.9, [0, 1, 2])],
)
def test_the_chosen_threshold_is_the_last_within_the_allowed_drop(
    max_drop: float, threshold: float, pruned: list[int]
) -> None:
    """Pruning channel 0 costs nothing, 1 costs 2 of 100 images (from 0.15 on), 2 costs 3 more (from 0.5 on)."""
    model = ChannelsAreLogits(4).eval()
    index = index_units(model, (4, 1, 1))
    values = torch.tensor([0.0, 0.12, 0.5, 0.95])
    chosen, mask = choose_threshold(model, index, values, channel_data([60, 2, 3, 35]), max_drop)
    assert chosen == threshold and mask.rule == "gamma"
    assert (~mask.keep).nonzero().flatten().tolist() == pruned


def test_the_choice_stops_at_the_first_violation() -> None:
    """Without channel 0 class 0 is taken for its rival 2; without channel 2 as well, accuracy is back."""
    model = ChannelsAreLogits(3).eval()
    index = index_units(model, (3, 1, 1))
    data = channel_data([50, 50, 0], rival=(0, 2))
    values = torch.tensor([0.3, 1.0, 0.6])
    chosen, mask = choose_threshold(model, index, values, data, 0.02)
    assert chosen == 0.25 and mask.units_pruned == 0
    both = dict(threshold_masks(index, values))[0.6]
    with masked(model, both):
        assert bool((model(data.inputs).argmax(1) == data.labels).all())


def test_no_threshold_is_chosen_where_already_0_costs_too_much() -> None:
    model = ChannelsAreLogits(2).eval()
    index = index_units(model, (2, 1, 1))
    chosen, mask = choose_threshold(model, index, torch.tensor([1.0, 0.0]), channel_data([5, 5]), 0.02)
    assert chosen is None and mask.units_pruned == 0


# --- end to end -----------------------------------------------------------------------------------------


def test_rnp_unlearns_and_recovers_by_its_seed(tiny: tuple[TinyNet, UnitIndex]) -> None:
    model, index = tiny
    data = tiny_data()
    learn(model, data)
    before = state(model)
    config = RNPConfig(
        UnlearnConfig(learning_rate=0.004, batch_size=8), RecoverConfig(learning_rate=2.0, epochs=2, batch_size=8)
    )
    one, two, other = (run_rnp(model, index, data, config, seed) for seed in (0, 0, 1))
    assert torch.equal(one.values, two.values) and not torch.equal(one.values, other.values)
    assert same(one.unlearned.model.state_dict(), two.unlearned.model.state_dict())
    assert same(before, model.state_dict())
    assert torch.equal(one.values, recover(one.unlearned.model, index, data, config.recover, 0))


def test_a_network_without_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    index = index_units(model, (1, 4, 4))
    with pytest.raises(ModelError, match="masks batch-norm channels and this network has none"):
        run_rnp(model, index, tiny_data(), RNPConfig(), 0)
    with pytest.raises(ModelError, match="this network has none"):
        recover(model, index, tiny_data(), RecoverConfig(), 0)


@pytest.mark.skipif(not (WILD.is_file() and ARCHIVE.is_file()), reason="needs shared/wild and shared/data")
def test_rnp_masks_every_batch_norm_channel_of_a_published_backdoored_network(tmp_path: Path) -> None:
    extract(ARCHIVE, tmp_path, "/train/")
    dataset = load_dataset(str(tmp_path / "cifar10_lossless"), "train", 3, None, tmp_path)
    assert dataset is not None
    data = draw_defence_data(dataset, 500, 10, Normalisation(), seed=0)
    model = build_model("wide_resnet16_1", 3, 10)
    load_checkpoint(model, WILD)
    index = index_units(model, (3, 32, 32))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert channels == 464 == int(index.batch_norm_units.sum())
    config = RNPConfig(UnlearnConfig(max_epochs=1), RecoverConfig(learning_rate=50.0, epochs=1))
    values = run_rnp(model, index, data, config, seed=0).values
    moved = [bool((values[layer.units] < 1).any()) for layer in index if layer.batch_norm is not None]
    assert all(moved) and len(moved) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.equal(values[~index.batch_norm_units], torch.ones(len(index) - 464))


def test_it_learns_where_gradients_are_off(tiny: tuple[TinyNet, UnitIndex]) -> None:
    (network, index), data = tiny, tiny_data()
    config = RNPConfig(UnlearnConfig(max_epochs=1), RecoverConfig(epochs=1))
    usual = run_rnp(network, index, data, config, seed=0).values
    with torch.no_grad():
        assert torch.equal(run_rnp(network, index, data, config, seed=0).values, usual)
