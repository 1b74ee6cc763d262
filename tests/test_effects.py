"""First-order effects of the units on functions of the logits, against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import cross_entropies, loss_effects, slopes
from torch import Tensor, nn
from toy_networks import EveryKind, grey_images

from onp.data import DefenceData
from onp.engine import Engine
from onp.masks import KeepMask
from onp.units import UnitIndex, index_units


@pytest.fixture
def network(randomised: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(EveryKind())


@pytest.fixture
def data() -> DefenceData:
    return grey_images()


@pytest.fixture
def index(network: nn.Module) -> UnitIndex:
    return index_units(network, (1, 8, 8))


def test_first_order_effects_are_the_slopes_of_the_loss(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    assert {layer.kind for layer in index} == {"conv", "batch_norm", "linear", "linear_input"}
    expected = slopes(network, index, lambda model: cross_entropies(data, data.labels)(model).mean())[:, 0]
    found = loss_effects(network, index, data)
    assert found.shape == (len(index),)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-3)
    assert float(expected.abs().min()) > 1e-5  # every unit takes part


def test_first_order_effects_leave_frozen_parameters_frozen(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    expected = loss_effects(network, index, data)
    names = ["norm.weight", "hidden.weight", "plain.bias"]
    for name in names:
        network.get_parameter(name).requires_grad_(False)
    weights = copy.deepcopy(network.state_dict())
    assert torch.equal(loss_effects(network, index, data), expected)
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == sorted(
        names, key=[name for name, _ in network.named_parameters()].index
    )
    assert all(torch.equal(network.state_dict()[key], value) for key, value in weights.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_first_order_effects_of_any_function_are_its_slopes(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    """A function that is no mean over images: the slopes of a batch depend on every other batch."""

    def function(logits: Tensor) -> Tensor:
        return logits.softmax(1)[:, 2].mean().log() + 0.3 * logits[:, 0].var()

    inputs = data.inputs
    expected = slopes(network, index, lambda model: function(model(inputs.double())))[:, 0]
    whole = KeepMask.all_kept(index)
    found = Engine(network, index, inputs).effects(whole, function)
    assert found.shape == (20, len(index))
    assert torch.allclose(found.sum(0).double(), expected, atol=1e-5, rtol=1e-3)
    assert float(expected.abs().min()) > 1e-5
    for chunk in (1, 7, 19, 20):
        again = Engine(network, index, inputs, chunk=chunk).effects(whole, function)
        assert torch.allclose(again, found, atol=1e-6, rtol=1e-4), chunk
    engine = Engine(network, index, inputs, chunk=8)
    few = slopes(network, index, lambda model: function(model(inputs[:11].double())))[:, 0]
    assert torch.allclose(engine.effects(whole, function, 11).sum(0).double(), few, atol=1e-5, rtol=1e-3)


def test_first_order_effects_by_image_are_the_slopes_where_one_image_alone_sees_the_pruning(
    network: nn.Module, index: UnitIndex, data: DefenceData
) -> None:
    def function(logits: Tensor) -> Tensor:
        return logits.softmax(1)[:, 2].mean().log() + 0.3 * logits[:, 0].var()

    with torch.no_grad():
        before = copy.deepcopy(network).double()(data.inputs.double())

    def one_by_one(model: nn.Module) -> Tensor:
        after, values = model(data.inputs.double()), []
        for image in range(len(data)):
            mixed = before.clone()
            mixed[image] = after[image]
            values.append(function(mixed))
        return torch.stack(values)

    expected = slopes(network, index, one_by_one).T
    found = Engine(network, index, data.inputs, chunk=8).effects(KeepMask.all_kept(index), function)
    assert torch.allclose(found.double(), expected, atol=1e-7, rtol=1e-3)
    assert float(expected.std(0).max()) > 1e-4  # images differ


def test_layers_that_the_outputs_do_not_need_have_no_effect(index: UnitIndex, network: Any, data: DefenceData) -> None:
    network.out.weight.data.zero_()
    number = next(i for i, layer in enumerate(index) if layer.module == "hidden")
    engine, whole = Engine(network, index, data.inputs), KeepMask.all_kept(index)
    effects = engine.effects(whole, lambda logits: logits.square().mean())
    assert bool((effects[:, index.layer_of <= number] == 0).all())
    constant = engine.effects(whole, lambda logits: 0 * logits.sum() + 1)
    assert bool((constant == 0).all())
