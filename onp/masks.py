"""The keep mask: which units stay, applied for a while (`masked`) or for good (`apply_mask`).

The two agree bit for bit, since both zero the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onp.checkpoints import read_json
from onp.errors import FileError, MaskError
from onp.units import UnitIndex

Rule = Literal["zero", "gamma"]
"""How a unit is pruned: `zero` zeroes its output (`onp.units`); `gamma`, RNP's, zeroes gamma and leaves beta."""


@dataclass(frozen=True, eq=False)
class KeepMask:
    """Which units of a network stay: `keep` has shape (N,), bool, True = kept.

    `order` remembers in which order `without` pruned what is pruned, for drawing the path; it is no part of the mask's
    identity.
    """

    index: UnitIndex
    keep: Tensor
    rule: Rule = "zero"
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.keep.shape != (len(self.index),) or self.keep.dtype != torch.bool:
            raise MaskError(
                f"a keep mask of shape {tuple(self.keep.shape)} and type {self.keep.dtype} does not fit "
                f"a network of {len(self.index)} units; give a bool tensor of shape ({len(self.index)},)"
            )
        if self.rule == "gamma" and not bool((self.keep | self.index.batch_norm_units).all()):
            unit = int((~self.keep & ~self.index.batch_norm_units).nonzero()[0])
            raise MaskError(
                f"rule 'gamma' cannot prune {self.index.name(unit)}: no batch-norm gates it; use rule 'zero'"
            )

    @classmethod
    def all_kept(cls, index: UnitIndex, rule: Rule = "zero") -> KeepMask:
        return cls(index, torch.ones(len(index), dtype=torch.bool), rule)

    def without(self, units: Iterable[int] | Tensor) -> KeepMask:
        """This mask with `units` pruned too; raises `MaskError` for one that the network does not have."""
        chosen = [unit for unit in self._numbers(units) if self.keep[unit]]
        keep = self.keep.clone()
        keep[chosen] = False
        return KeepMask(self.index, keep, self.rule, self.order + tuple(chosen))

    def restoring(self, units: Iterable[int] | Tensor) -> KeepMask:
        """This mask with `units` kept again; raises `MaskError` for one that the network does not have."""
        numbers = set(self._numbers(units))
        keep = self.keep.clone()
        keep[list(numbers)] = True
        return KeepMask(self.index, keep, self.rule, tuple(unit for unit in self.order if unit not in numbers))

    def copied(self) -> KeepMask:
        """The same mask with a tensor of its own."""
        return replace(self, keep=self.keep.clone())

    def _numbers(self, units: Iterable[int] | Tensor) -> list[int]:
        numbers = [int(unit) for unit in units]
        if outside := [unit for unit in numbers if not 0 <= unit < len(self.keep)]:
            raise MaskError(f"units {outside} are none of this network's, which go from 0 to {len(self.keep) - 1}")
        return numbers

    def path(self) -> list[KeepMask]:
        """From all kept to this mask, a unit at a time, in the order in which they were pruned."""
        masks = [KeepMask.all_kept(self.index, self.rule)]
        for unit in self.order:
            masks.append(masks[-1].without([unit]))
        return masks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeepMask) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"KeepMask({self.units_pruned} of {len(self.keep)} units pruned, rule {self.rule!r})"

    @cached_property
    def pruned(self) -> frozenset[int]:
        """The units that go."""
        return frozenset((~self.keep).nonzero().flatten().tolist())

    def check_fits(self, index: UnitIndex) -> None:
        """Raise `MaskError` where `index` is of a network with other units."""
        if self.index is not index and self.index.layers != index.layers:
            raise MaskError(
                f"the mask is for a network with other units ({len(self.index)} in {len(self.index.layers)} layers) "
                f"than this one ({len(index)} in {len(index.layers)}); make it with the index of this network"
            )

    @property
    def units_pruned(self) -> int:
        return int((~self.keep).sum())

    @property
    def key(self) -> bytes:
        """Equal for equal masks of one network."""
        return self.rule.encode() + self.keep.numpy().tobytes()

    def to_json(self) -> dict[str, Any]:
        """A readable form: the pruned units of every layer that loses some."""
        pruned = {layer.name: [i for i in range(layer.size) if not self.keep[layer.offset + i]] for layer in self.index}
        return {
            "rule": self.rule,
            "units": len(self.index),
            "units_pruned": self.units_pruned,
            "pruned": {name: units for name, units in pruned.items() if units},
            "order": [self.index.name(unit) for unit in self.order],
        }

    @classmethod
    def from_json(cls, index: UnitIndex, record: dict[str, Any]) -> KeepMask:
        """The inverse of `to_json`; raises `MaskError` where the record does not fit the network."""
        try:
            rule, units, pruned = record["rule"], record["units"], record["pruned"]
            order = [str(name) for name in record.get("order", [])]
        except (KeyError, TypeError, AttributeError) as error:
            raise MaskError(f"not a mask record: {error} is missing; expected rule, units and pruned") from error
        if rule not in ("zero", "gamma"):
            raise MaskError(f"unknown pruning rule {rule!r}; expected 'zero' or 'gamma'")
        if not isinstance(pruned, dict) or not all(isinstance(members, list) for members in pruned.values()):
            raise MaskError(f"not a mask record: 'pruned' has to map layers to lists of units, not {pruned}")
        layers = {layer.name: layer for layer in index}
        unknown = sorted(set(pruned) - set(layers))
        if units != len(index) or unknown:
            raise MaskError(
                f"the mask is for a network of {units} units (layers unknown here: {unknown or 'none'}); "
                f"this one has {len(index)} units"
            )
        keep = torch.ones(len(index), dtype=torch.bool)
        for name, members in pruned.items():
            if any(type(i) is not int or not 0 <= i < layers[name].size for i in members):
                raise MaskError(f"layer {name} has units 0 to {layers[name].size - 1}; the mask names {members}")
            keep[[layers[name].offset + i for i in members]] = False
        names = {index.name(unit): unit for unit in (~keep).nonzero().flatten().tolist()}
        return cls(index, keep, rule, tuple(names[name] for name in order if name in names))

    @classmethod
    def load(cls, index: UnitIndex, path: Path | str) -> KeepMask:
        """Read `masks/METHOD.json` of a run; raises `MaskError` where it cannot be read or does not fit the network."""
        try:
            record = read_json(Path(path))
        except FileError as error:
            raise MaskError(f"{error}, or give masks/METHOD.json of a run") from error
        try:
            return cls.from_json(index, record)
        except MaskError as error:
            raise MaskError(f"{path}: {error}") from error


def apply_mask(model: nn.Module, mask: KeepMask) -> None:
    """Prune `model` in place, for good; keys and shapes of its state dict stay."""
    with torch.no_grad():
        for parameter, axis, units in _zeroed(model, mask):
            parameter.index_fill_(axis, units, 0.0)


@contextmanager
def masked(model: nn.Module, mask: KeepMask) -> Iterator[nn.Module]:
    """`model` pruned inside the `with` block, its parameters restored bit for bit behind it.

    Buffers are not: where `model` is in train mode, what runs inside moves its batch-norm statistics.
    """
    saved: dict[nn.Parameter, Tensor] = {}
    try:
        with torch.no_grad():
            for parameter, axis, units in _zeroed(model, mask):
                saved.setdefault(parameter, parameter.detach().clone())
                parameter.index_fill_(axis, units, 0.0)
        yield model
    finally:
        with torch.no_grad():
            for parameter, value in saved.items():
                parameter.copy_(value)


def _zeroed(model: nn.Module, mask: KeepMask) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """The parameter slices that the mask sets to zero: (parameter, axis, positions on it)."""
    for layer in mask.index:
        units = (~mask.keep[layer.offset : layer.offset + layer.size]).nonzero().flatten()
        if units.numel():
            gates = layer.gates if mask.rule == "zero" else layer.gates[:1]
            for name, axis in gates:
                parameter = model.get_parameter(name)
                yield parameter, axis, layer.entries(units).to(parameter.device)
