"""Masks: for a while and for good are the same, nothing else changes, and JSON keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.checkpoints import load_checkpoint, save_weights
from onp.engine import Engine
from onp.errors import MaskError
from onp.masks import KeepMask, apply_mask, masked
from onp.models import build_model
from onp.units import UnitIndex, index_units


class HiddenLinear(nn.Module):
    """conv-bn (4), bn behind the activation (4), flatten (4 x 16 positions), hidden linear (6), logits: every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn2(F.relu(self.bn1(self.conv(x)))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "small_cnn": (lambda: build_model("small_cnn", 1, 10), (1, 8, 8), {"conv"}),
    "wide_resnet16_1": (lambda: build_model("wide_resnet16_1", 3, 10), (3, 16, 16), {"conv", "batch_norm"}),
    "cifar_resnet18": (lambda: build_model("cifar_resnet18", 3, 10), (3, 16, 16), {"conv", "linear_input"}),
    "preact_resnet18": (
        lambda: build_model("preact_resnet18-w8", 3, 10),
        (3, 16, 16),
        {"conv", "batch_norm", "linear_input"},
    ),
    "cifar_vgg16_bn": (lambda: build_model("cifar_vgg16_bn-w8", 3, 10), (3, 32, 32), {"conv"}),
    "cifar_mobilenet_v2": (lambda: build_model("cifar_mobilenet_v2-w0.25", 3, 10), (3, 16, 16), {"conv"}),
    "small_vgg": (lambda: build_model("small_vgg", 3, 10), (3, 32, 32), {"conv", "linear_input"}),
    "hidden_linear": (HiddenLinear, (1, 8, 8), {"conv", "batch_norm", "linear_input", "linear"}),
}


@pytest.fixture(scope="module")
def toy(randomised: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return randomised(HiddenLinear())


@pytest.fixture(scope="module")
def index(toy: nn.Module) -> UnitIndex:
    """bn1 0-3, bn2 4-7, hidden.input 8-71, hidden 72-77."""
    return index_units(toy, (1, 8, 8))


def random_mask(index: UnitIndex, seed: int) -> KeepMask:
    """Prunes 2 % to 20 % of every layer, at least one unit of each."""
    generator = torch.Generator().manual_seed(seed)
    mask = KeepMask.all_kept(index)
    for layer in index:
        share = 0.02 + 0.18 * float(torch.rand((), generator=generator))
        chosen = torch.randperm(layer.size, generator=generator)[: max(1, round(share * layer.size))]
        mask = mask.without(layer.offset + chosen)
    return mask


def bits(model: nn.Module) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_apply_save_and_load(name: str, randomised: Callable[..., nn.Module], tmp_path: Path) -> None:
    build, shape, kinds = NETWORKS[name]
    torch.manual_seed(0)
    model, pruned, fresh = randomised(build()), build(), build()
    index = index_units(model, shape)
    inputs = torch.rand(3, *shape)
    with torch.no_grad():
        unpruned = model(inputs)
    engine = Engine(model, index, inputs)
    for seed in range(20):
        mask = random_mask(index, seed)
        assert {layer.kind for layer in index if not mask.keep[layer.offset : layer.offset + layer.size].all()} == kinds
        with torch.no_grad(), masked(model, mask):
            temporary = model(inputs)
        pruned.load_state_dict(model.state_dict())
        apply_mask(pruned, mask)
        save_weights(pruned, tmp_path / "pruned.safetensors")
        randomised(fresh, seed + 100)  # whatever it held before does not matter
        load_checkpoint(fresh, tmp_path / "pruned.safetensors")
        with torch.no_grad():
            permanent = fresh.eval()(inputs)
        assert (temporary - permanent).abs().max() <= 1e-5 * temporary.abs().max()
        assert (engine.logits(mask) - permanent).abs().max() <= 1e-5 * temporary.abs().max()
        assert (temporary - unpruned).abs().max() > 1e-3 * unpruned.abs().max(), "the mask has to change something"


def test_restoring_keeps_units_again_and_the_order_of_the_others(index: UnitIndex) -> None:
    mask = KeepMask.all_kept(index).without([9, 2, 70, 5])
    restored = mask.restoring([70, 2, 3])  # 3 was kept all the time
    assert restored == KeepMask.all_kept(index).without([5, 9]) and restored.order == (9, 5)
    assert mask.pruned == {2, 5, 9, 70} and mask.restoring([]) == mask
    assert mask.restoring(torch.tensor([2, 5, 9, 70])).key == KeepMask.all_kept(index).key
    with pytest.raises(MaskError, match=r"units \[78\] are none of this network's"):
        mask.restoring([2, 78])


def test_only_the_gates_become_zero(toy: nn.Module, index: UnitIndex) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    expected = {key: value.clone() for key, value in before.items()}
    for key, position in (("bn1.weight", 2), ("bn1.bias", 2), ("bn2.weight", 0), ("bn2.bias", 0), ("hidden.weight", 5)):
        expected[key][position] = 0
    expected["hidden.bias"][5] = 0
    expected["hidden.weight"][:, 63] = 0
    with masked(toy, KeepMask.all_kept(index).without([2, 4, 71, 77])):
        inside = {key: value.clone() for key, value in toy.state_dict().items()}
    assert all(torch.equal(inside[key], expected[key]) for key in expected)
    assert all(torch.equal(value, before[key]) for key, value in toy.state_dict().items())


def test_masked_restores_bit_for_bit_after_an_exception(randomised: Callable[..., nn.Module], index: UnitIndex) -> None:
    model = randomised(HiddenLinear())
    with torch.no_grad():
        model.bn1.weight[:2] = torch.tensor([-0.0, float("inf")])
    before = bits(model)
    with pytest.raises(RuntimeError, match="inside"), masked(model, random_mask(index, 1)):
        assert bits(model) != before
        raise RuntimeError("inside")
    assert bits(model) == before


def test_masked_restores_where_the_mask_does_not_fit(index: UnitIndex) -> None:
    model = HiddenLinear()
    del model.hidden
    before = bits(model)
    with pytest.raises(AttributeError), masked(model, random_mask(index, 2)):
        pass
    assert bits(model) == before


def test_masks_nest(toy: nn.Module, index: UnitIndex) -> None:
    start = bits(toy)
    with masked(toy, KeepMask.all_kept(index).without([1])):
        outer = bits(toy)
        with masked(toy, KeepMask.all_kept(index).without([1, 9, 75])):
            assert bits(toy) != outer
        assert bits(toy) == outer
    assert bits(toy) == start


# --- the rule `gamma` -------------------------------------------------------------------------------------


def test_rule_gamma_leaves_beta_and_a_constant_channel(toy: nn.Module, index: UnitIndex) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    outputs: list[Tensor] = []
    handle = toy.bn1.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), masked(toy, KeepMask.all_kept(index, "gamma").without([3])):
        toy(torch.rand(2, 1, 8, 8))
        changed = {key for key, value in toy.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {"bn1.weight"}
        assert toy.bn1.weight[3] == 0 and torch.equal(toy.bn1.weight[:3], before["bn1.weight"][:3])
    handle.remove()
    beta = before["bn1.bias"][3]
    assert beta > 0
    assert torch.equal(outputs[0][:, 3], beta.expand(2, 8, 8))


@pytest.mark.parametrize(("unit", "name"), [(8, r"hidden\.input\[0\]"), (74, r"hidden\[2\]")])
def test_rule_gamma_refuses_units_without_batch_norm(index: UnitIndex, unit: int, name: str) -> None:
    with pytest.raises(MaskError, match=f"rule 'gamma' cannot prune {name}"):
        KeepMask.all_kept(index, "gamma").without([unit])
    assert KeepMask.all_kept(index, "gamma").without(range(8)).units_pruned == 8


# --- the mask itself --------------------------------------------------------------------------------------


def test_units_pruned_counts_units_once(index: UnitIndex) -> None:
    mask = KeepMask.all_kept(index)
    assert mask.units_pruned == 0
    fewer = mask.without([5, 5, 70]).without(torch.tensor([5, 77]))
    assert fewer.units_pruned == 3
    assert (~fewer.keep).nonzero().flatten().tolist() == [5, 70, 77]
    assert mask.units_pruned == 0, "masks are values"


def test_keys_tell_masks_apart(index: UnitIndex) -> None:
    mask = KeepMask.all_kept(index).without([1, 6])
    assert mask.key == KeepMask.all_kept(index).without([6]).without([1]).key
    others = [KeepMask.all_kept(index), mask.without([2]), KeepMask.all_kept(index, "gamma").without([1, 6])]
    assert mask.key not in {other.key for other in others}


@pytest.mark.parametrize(
    "keep",
    [
        torch.ones(77, dtype=torch.bool),
        torch.ones(78),
        torch.ones(78, dtype=torch.int64),
        torch.ones(1, 78, dtype=torch.bool),
    ],
)
def test_a_mask_of_another_shape_or_type_is_refused(index: UnitIndex, keep: Tensor) -> None:
    with pytest.raises(MaskError, match=r"bool tensor of shape \(78,\)"):
        KeepMask(index, keep)


# --- JSON -------------------------------------------------------------------------------------------------


def test_json_form(index: UnitIndex) -> None:
    assert KeepMask.all_kept(index).without([3, 0, 71, 72]).to_json() == {
        "rule": "zero",
        "units": 78,
        "units_pruned": 4,
        "pruned": {"bn1": [0, 3], "hidden.input": [63], "hidden": [0]},
        "order": ["bn1[3]", "bn1[0]", "hidden.input[63]", "hidden[0]"],
    }


@pytest.mark.parametrize("rule", ["zero", "gamma"])
def test_json_round_trip(index: UnitIndex, rule: Any) -> None:
    mask = KeepMask.all_kept(index, rule).without([1, 6] if rule == "gamma" else [1, 6, 30, 73])
    again = KeepMask.from_json(index, json.loads(json.dumps(mask.to_json())))
    assert torch.equal(again.keep, mask.keep) and again.rule == rule and again.order == mask.order


RECORD: dict[str, Any] = {"rule": "zero", "units": 78, "pruned": {"bn1": [0]}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"rule": "zero", "units": 78}, "'pruned' is missing"),
        ([], "not a mask record"),
        (None, "not a mask record"),
        (RECORD | {"rule": "beta"}, "unknown pruning rule 'beta'"),
        (RECORD | {"units": 79}, "79 units.*this one has 78"),
        (RECORD | {"pruned": {"bn7": [0]}}, "bn7"),
        (RECORD | {"pruned": {"bn1": [4]}}, "bn1 has units 0 to 3"),
        (RECORD | {"pruned": {"bn1": [-1]}}, "bn1 has units 0 to 3"),
        (RECORD | {"pruned": {"bn1": [1.0]}}, "bn1 has units 0 to 3"),
        (RECORD | {"pruned": {"bn1": ["1"]}}, "bn1 has units 0 to 3"),
        (RECORD | {"rule": "gamma", "pruned": {"hidden": [0]}}, r"cannot prune hidden\[0\]"),
        (RECORD | {"pruned": {"bn1": 2}}, "bn1"),
        (RECORD | {"pruned": ["bn1"]}, "pruned"),
        (RECORD | {"pruned": 3}, "pruned"),
    ],
)
def test_broken_records_raise_mask_errors(index: UnitIndex, record: Any, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        KeepMask.from_json(index, record)
