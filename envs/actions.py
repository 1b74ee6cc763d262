"""The numbered actions of the pruning environment: single units, pruned or restored, the best of a layer, stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onp.masks import KeepMask
from onp.units import UnitIndex


@dataclass(frozen=True)
class Bulk:
    """Prune the `count` units of layer number `layer` that are estimated best, at once."""

    layer: int
    count: int


class ActionSet:
    """What can be done to a network of N units: action i < N prunes unit i, or restores it where it is pruned; then
    come the bulk actions, which prune; the last stops.

    Every layer gets a bulk action for each of `fractions` of its size that makes two units or more. With `groups`, all
    units that a residual addition ties to a pruned or restored one go with it.
    """

    def __init__(self, index: UnitIndex, fractions: tuple[float, ...], groups: bool) -> None:
        self.index, self.groups = index, groups
        self.bulks = tuple(
            Bulk(number, count)
            for number, layer in enumerate(index)
            for count in sorted({round(layer.size * fraction) for fraction in fractions})
            if 2 <= count < layer.size
        )

    def __len__(self) -> int:
        return len(self.index) + len(self.bulks) + 1

    @property
    def stop(self) -> int:
        """The action that ends the episode."""
        return len(self) - 1

    def valid(self, mask: KeepMask) -> Tensor:
        """Which actions can be taken, (N + B + 1,) bool: all but bulks of more units than `mask` keeps of the layer."""
        bulks = [int(mask.keep[self._layer(bulk)].sum()) >= bulk.count for bulk in self.bulks]
        return torch.cat([torch.ones_like(mask.keep), torch.tensor([*bulks, True])])

    def totals(self, mask: KeepMask, effects: Tensor) -> Tensor:
        """Of single units' effects, (N,), the sum over what each action but stop toggles, to first order: (N + B,)."""
        totals = effects.new_zeros(len(self.bulks))
        for number, bulk in enumerate(self.bulks):
            if self.groups:  # units of one bulk may share a group, which counts once
                units = torch.tensor(self.units(len(self.index) + number, mask, effects))
                totals[number] = effects[units][mask.keep[units]].sum()
                continue
            kept = effects[self._layer(bulk)][mask.keep[self._layer(bulk)]]
            totals[number] = kept.topk(min(bulk.count, len(kept))).values.sum()
        return torch.cat([self._with_groups(mask, effects), totals])

    def after(self, action: int, mask: KeepMask, effects: Tensor) -> KeepMask:
        """The mask that a valid `action` leads to from `mask`; a bulk chooses its units by their `effects`, (N,)."""
        units = self.units(action, mask, effects)
        restores = action < len(self.index) and not mask.keep[action]
        return mask.restoring(units) if restores else mask.without(units)

    def units(self, action: int, mask: KeepMask, effects: Tensor) -> list[int]:
        """The units that `action` prunes or restores, those with the best `effects` (N,) first; none for stop."""
        if action == self.stop:
            return []
        chosen = [action]
        if action >= len(self.index):
            bulk = self.bulks[action - len(self.index)]
            units = self._layer(bulk)
            ranks = self._with_groups(mask, effects)[units].masked_fill(~mask.keep[units], -torch.inf)
            chosen = (ranks.argsort(descending=True, stable=True)[: bulk.count] + units.start).tolist()
        if not self.groups:
            return chosen
        return list(dict.fromkeys(unit for one in chosen for unit in self.index.group_of(one).tolist()))

    def undoing(self, action: int) -> list[int]:
        """Actions on what `action` has just toggled, a single unit or its group; none for bulks and stop."""
        if action >= len(self.index):
            return []
        return self.index.group_of(action).tolist() if self.groups else [action]

    def _with_groups(self, mask: KeepMask, effects: Tensor) -> Tensor:
        """Of every unit, the sum over those of its group that are pruned, or restored, with it."""
        if not self.groups:
            return effects
        groups, sums = self.index.groups, torch.zeros(2, len(effects), dtype=effects.dtype)
        for number, chosen in enumerate((mask.keep, ~mask.keep)):
            sums[number].index_add_(0, groups, effects.where(chosen, 0.0))
        return torch.where(mask.keep, sums[0, groups], sums[1, groups])

    def _layer(self, bulk: Bulk) -> slice:
        layer = self.index.layers[bulk.layer]
        return slice(layer.offset, layer.offset + layer.size)
