"""Which unit writes which channel, followed through the operations of a traced network that have no weights.

What only moves values about (reshape, transpose, cat, chunk, slices, shuffles, ...) is run on tensors of labels, so
that channels are found again wherever they went, without a rule for each operation.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from onp.tracing import operation, shape_of

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_JOINS = ("cat", "concat", "concatenate")
_MOVES = {
    *_JOINS, "stack", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape", "view",
    "flatten", "Flatten", "unflatten", "Unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "contiguous",
    "chunk", "split", "tensor_split", "unbind", "getitem", "select", "narrow", "flip", "roll", "pad", "channel_shuffle",
    "ChannelShuffle", "pixel_shuffle", "PixelShuffle", "pixel_unshuffle", "PixelUnshuffle",
}  # fmt: skip
"""operations whose every output value is one of their input values (or padding), by name"""
_MIXINGS = ("matmul", "mm", "bmm", "einsum", "linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Reads:
    """What arrives at the input channels of a module.

    Each tensor of `units` has shape (channels,) and holds, per input channel, the unit that writes it
    (-1: none). There are several where residual additions overlay several writers.
    """

    axis: int
    units: tuple[Tensor, ...]
    positions: int = 1
    """input positions per channel: height x width behind a flatten, else 1"""
    flattened: bool = False


class ChannelFlow:
    """Says what the channels of a node's value carry, from `reads`, which knows it of the nodes before."""

    def __init__(self, reads: Mapping[fx.Node, Reads | None]) -> None:
        self.reads = reads
        self._labels: dict[fx.Node, list[Any]] = {}  # 1 + unit value by value, where no one axis tells them

    def follow(self, node: fx.Node, module: nn.Module | None) -> Reads | None:
        """What a node without weights (in `module`, where it calls one) hands on; None where that is unknown."""
        name, shape = operation(node, module), shape_of(node)
        carried = [reads for source in node.all_input_nodes if (reads := self.reads.get(source)) is not None]
        if is_merge(node):
            return _merge(carried, shape or ())
        alone = carried[0] if len(carried) == 1 and shape is not None and name not in _MIXINGS else None
        if alone is not None and name != "getitem" and (flat := _flattened(node, alone)) is not None:
            return flat
        if name in _MOVES:
            return self._moved(node, module, name, carried)
        if alone is None or shape is None or shape[alone.axis : alone.axis + 1] != (alone.units[0].numel(),):
            return None
        return alone

    def _moved(self, node: fx.Node, module: nn.Module | None, name: str, carried: list[Reads]) -> Reads | None:
        """Run a node that only moves values about on labels in their place."""
        if any(_is_number(source) for source in node.all_input_nodes):
            return None  # values that say where others go
        overlays = max((self._overlays(source) for source in node.all_input_nodes), default=0)
        labels = [self._run(node, module, level) for level in range(overlays)]
        if not labels:
            return None
        if not isinstance(labels[0], Tensor):  # several: a later node takes one
            self._labels[node] = labels
            return None
        axis, width = (carried[0].axis, carried[0].units[0].numel()) if carried else (1, 0)
        axes = [a for a in range(labels[0].ndim) if all(_differ_along(label, a) for label in labels)]
        if not axes:
            self._labels[node] = labels
            return None
        best = min(axes, key=lambda a: (labels[0].shape[a] != width, abs(a - axis)))
        units = tuple(label.movedim(best, -1).flatten(0, -2).amax(0).long() - 1 for label in labels)
        if not any(bool((writers >= 0).any()) for writers in units):
            return None
        if len(carried) == 1 and best == axis and _same(units, carried[0].units):
            return carried[0]
        flat = carried if name in _JOINS else []
        return Reads(best, units, max((r.positions for r in flat), default=1), any(r.flattened for r in flat))

    def _overlays(self, node: fx.Node) -> int:
        reads = self.reads.get(node)
        return len(reads.units) if reads is not None else len(self._labels.get(node, ()))

    def _run(self, node: fx.Node, module: nn.Module | None, level: int) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._label(source, level))
        if operation(node, module) == "pad":  # with 0, whatever is written there
            args, kwargs = args[:3], {name: value for name, value in kwargs.items() if name != "value"}
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _label(self, node: fx.Node, level: int) -> Any:
        """1 + the unit that writes each value of a node, 0 where none is known; what is no tensor as it is."""
        if node in self._labels:
            known = self._labels[node]
            return known[level] if level < len(known) else fx.node.map_aggregate(known[0], _unknown)
        if (shape := shape_of(node)) is None:
            return node.meta.get("value")
        reads, labels = self.reads.get(node), torch.zeros(shape, dtype=torch.double)
        if reads is None or level >= len(reads.units):
            return labels
        return labels.movedim(reads.axis, -1).add(reads.units[level] + 1).movedim(-1, reads.axis)


def is_merge(node: fx.Node) -> bool:
    """Whether a node adds or multiplies."""
    return node.target in _SUMS or node.target in _PRODUCTS


def _merge(carried: list[Reads], shape: tuple[int, ...]) -> Reads | None:
    """Overlay what the summands carry; None where their channels do not meet."""
    if not carried:
        return None
    first = carried[0]
    width = shape[first.axis] if first.axis < len(shape) else -1
    if any(reads.axis != first.axis or reads.units[0].numel() != width for reads in carried):
        return None
    merged = list(first.units)
    for reads in carried[1:]:
        merged += [units for units in reads.units if not any(torch.equal(units, known) for known in merged)]
    return Reads(first.axis, tuple(merged), first.positions, first.flattened)


def _flattened(node: fx.Node, reads: Reads) -> Reads | None:
    """What arrives behind a flatten of everything but the images; None where the node is no such thing."""
    shape, source = shape_of(node) or (), shape_of(node.all_input_nodes[0]) or ()
    if len(shape) != 2 or len(source) < 3 or reads.axis != 1 or shape[1] != prod(source[1:]):
        return None
    positions = prod(source[2:])
    return Reads(1, tuple(units.repeat_interleave(positions) for units in reads.units), positions, flattened=True)


def _unknown(label: Any) -> Any:
    return torch.zeros_like(label)


def _is_number(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of integers or truth values."""
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return dtype is not None and not dtype.is_floating_point


def _differ_along(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along one axis alone, but for the unknown ones among them."""
    rows = labels.movedim(axis, -1).flatten(0, -2)
    return bool(((rows == rows.amax(0)) | (rows == 0)).all())


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
