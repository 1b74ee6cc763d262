"""A traced network in which every unit layer passes through a gate: what the evaluation engine walks.

A gate multiplies units by 0 or 1, which is what zeroing their parameters does (`onp.masks`), but leaves the weights
alone, so everything computed before the first gate that closes can be used again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from onp.gated_graph import GatedGraph, is_plain
from onp.masks import Rule
from onp.tracing import BATCH_NORMS, CONVOLUTIONS, operation, shape_of
from onp.units import UnitIndex, UnitLayer

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CHANNELWISE = {
    *("ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh"),
    *("Hardswish", "Hardsigmoid", "Hardtanh", "Softplus", "Identity", "Dropout", "Dropout2d", "AlphaDropout"),
    *("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d"),
    *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish", "hardsigmoid"),
    *("dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("add", "sub", "mul"),
}
"""operations that make each channel of their output from the same channel of their inputs, by name"""
_CHEAP = _CHANNELWISE | {
    "flatten",
    "Flatten",
    "view",
    "reshape",
    "mean",
    "cat",
    "getattr",
    "getitem",
    "size",
    "contiguous",
}
"""operations that cost less than keeping their result"""


class Part(NamedTuple):
    """A convolution with plain zero padding, what it reads, and what is added to it, if anything."""

    convolution: fx.Node
    module: Convolution
    source: fx.Node
    other: fx.Node | None


class GatedNetwork(GatedGraph):
    """A traced copy of `model` in eval mode, with gates: what each node depends on, and how to compute it.

    The copy does not follow later changes of `model`.
    """

    def __init__(self, model: nn.Module, index: UnitIndex, input_shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(model, index, input_shape, device)
        self.nodes = list(self.graph_module.graph.nodes)
        self.output = self.nodes[-1].args[0]
        assert isinstance(self.output, fx.Node)  # a network that gives one tensor: `trace` refuses others
        self.parts = self._find_parts()
        """convolutions, and sums of a convolution that nothing else reads with another node: what they are made of"""
        self.absorbed = {part.convolution for node, part in self.parts.items() if part.convolution is not node}
        """convolutions that are part of a sum"""
        self.channelwise = {node for node in self.nodes if self._is_channelwise(node)}
        """nodes that make channel i (axis 1) of their output from channel i of their inputs"""
        self.kept = {node for node in self.nodes if self._is_worth_keeping(node)}
        """nodes whose value is costly, or needed in more places than one"""
        self.upstream: dict[fx.Node, frozenset[int]] = {}
        """units whose gates a node's value depends on"""
        self.local: dict[fx.Node, frozenset[int]] = {}
        """those of them that reach no other channel than their own"""
        for node in self.nodes:
            self._place(node)

    def _find_parts(self) -> dict[fx.Node, Part]:
        parts: dict[fx.Node, Part] = {}
        for node in self.nodes:
            if (module := self._convolution(node)) is not None:
                parts[node] = Part(node, module, node.all_input_nodes[0], None)
            elif self._is_sum(node):
                first, second = node.all_input_nodes
                for writer, other in ((first, second), (second, first)):
                    alone = writer in parts and writer is parts[writer].convolution and len(writer.users) == 1
                    if alone and node not in parts:
                        parts[node] = parts.pop(writer)._replace(other=other)
        return parts

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether a node adds up two nodes of one shape and does nothing else."""
        inputs = node.all_input_nodes
        return (
            (node.target in (operator.add, torch.add) or (node.op, node.target) == ("call_method", "add"))
            and len(inputs) == len(node.args) == 2
            and not node.kwargs
            and shape_of(inputs[0]) == shape_of(inputs[1]) is not None
        )

    def _place(self, node: fx.Node) -> None:
        """Say which units the node's value depends on, and which of them channel by channel."""
        upstream = frozenset[int]().union(*(self.upstream[source] for source in node.all_input_nodes))
        local = frozenset[int]()
        if node in self.channelwise:
            inputs = node.all_input_nodes
            tied = frozenset[int]().union(*(self.local[source] for source in inputs))
            spread = frozenset[int]().union(*(self.upstream[source] - self.local[source] for source in inputs))
            local = tied - spread
        if (layer := self.layer_of.get(node)) is not None:
            units = frozenset(layer.units)
            if node in self.channelwise:
                local |= units - (upstream - local)
            upstream |= units
        self.upstream[node], self.local[node] = upstream, local

    def _convolution(self, node: fx.Node) -> Convolution | None:
        module = self.module(node)
        if not isinstance(module, CONVOLUTIONS) or not is_plain(module):
            return None
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        return module

    def _is_channelwise(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        if shape is None or len(shape) < 2 or not node.all_input_nodes:
            return False
        if any((shape_of(source) or ())[:2] != shape[:2] for source in node.all_input_nodes):
            return False
        if node in self.layer_of:
            return _axis(self.layer_of[node], len(shape)) == 1 == self.layer_of[node].width
        module = self.module(node)
        name = operation(node, module)
        return isinstance(module, BATCH_NORMS) or (
            name in _CHANNELWISE and (len(shape) == 4 or "pool2d" not in name.lower())
        )

    def _is_worth_keeping(self, node: fx.Node) -> bool:
        if node in self.parts or node in self.absorbed:
            return node in self.parts
        module = self.module(node)
        name = operation(node, module)
        cheap = node in self.layer_of or isinstance(module, BATCH_NORMS) or name in _CHEAP
        if name == "getitem" and node.all_input_nodes[0].op == "call_module":
            cheap = False  # a module's tuple is not kept, so what is taken out of it is
        computed = node.op not in ("placeholder", "get_attr", "output") and shape_of(node) is not None
        return computed and (not cheap or len(node.users) > 1)

    # --- what the nodes are -------------------------------------------------------------------------------

    def fresh(self, node: fx.Node) -> bool:
        """Whether a node's value is its own, and its one reader may overwrite it."""
        makes = node in self.norms or self._convolution(node) is not None or isinstance(self.module(node), BATCH_NORMS)
        return (makes or self._is_sum(node)) and len(node.users) == 1

    def bytes_per_image(self, node: fx.Node) -> int:
        """Size of a node's value for one image."""
        shape = shape_of(node)
        return 0 if shape is None else -(-prod(shape) // 2) * node.meta["tensor_meta"].dtype.itemsize

    def axis(self, gate: fx.Node) -> int:
        """The axis of a gate's units, `width` entries each."""
        return _axis(self.layer_of[gate], len(shape_of(gate) or ()))

    def channels(self, units: frozenset[int]) -> tuple[int, ...]:
        """Channels of units that are local to one node."""
        layers = self.index.layers
        return tuple(sorted({unit - layers[int(self.index.layer_of[unit])].offset for unit in units}))

    # --- running them -------------------------------------------------------------------------------------

    def run(
        self,
        node: fx.Node,
        inputs: Mapping[fx.Node, Any],
        pruned: frozenset[int],
        rule: Rule,
        channels: list[int] | None = None,
        spare: fx.Node | None = None,
    ) -> Any:
        """The node's value from its inputs' under a mask.

        With `channels`, from those channels of its inputs alone. The value of the input `spare` may be overwritten.
        """
        module = self.module(node)
        if node in self.layer_of:
            return self._run_gate(node, inputs[node.all_input_nodes[0]], pruned, rule, channels)
        if isinstance(module, BATCH_NORMS):
            return _batch_norm(module, inputs[node.all_input_nodes[0]], module.weight, module.bias, channels)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph_module)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
        if spare is not None and self._is_sum(node):
            (other,) = (inputs[source] for source in node.all_input_nodes if source is not spare)
            return inputs[spare].add_(other)
        if spare is not None and (isinstance(module, nn.ReLU) or node.target in (torch.relu, nn.functional.relu)):
            return torch.relu_(inputs[spare])
        if node.target in self.untraced:  # it may change what it is given
            args, kwargs = fx.node.map_aggregate((args, kwargs), _own)
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _run_gate(
        self, node: fx.Node, value: Tensor, pruned: frozenset[int], rule: Rule, channels: list[int] | None
    ) -> Tensor:
        norm = self.norms.get(node)
        if pruned.isdisjoint(self.layer_of[node].units):
            return value if norm is None else _batch_norm(norm, value, norm.weight, norm.bias, channels)
        keep = self.keep(node, pruned, value)
        if norm is not None:
            return _batch_norm(
                norm, value, norm.weight * keep, norm.bias * keep if rule == "zero" else norm.bias, channels
            )
        beta = self.betas[node] if rule == "gamma" else None
        if channels is not None:
            keep, beta = keep[channels], None if beta is None else beta[channels]
        gate = self.along_axis(node, keep, value)
        if beta is None:
            return value * gate
        return torch.addcmul(self.along_axis(node, beta * (1 - keep), value), value, gate)

    def keep(self, gate: fx.Node, pruned: frozenset[int], value: Tensor) -> Tensor:
        """1 for each entry on a gate's axis that is open, 0 for those of `pruned` units; of the type of `value`."""
        layer = self.layer_of[gate]
        keep = value.new_ones(layer.size * layer.width)
        keep[layer.entries(torch.tensor([unit - layer.offset for unit in pruned if unit in layer.units])).tolist()] = 0
        return keep

    def along_axis(self, gate: fx.Node, entries: Tensor, value: Tensor) -> Tensor:
        """`entries` in a shape to be multiplied with a `value` of the gate."""
        shape = [1] * value.ndim
        shape[_axis(self.layer_of[gate], value.ndim)] = -1
        return entries.view(shape)


def _batch_norm(
    module: Any, value: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: list[int] | None
) -> Tensor:
    statistics = module.running_mean, module.running_var, gamma, beta
    if channels is not None:
        statistics = tuple(None if tensor is None else tensor[channels] for tensor in statistics)  # type: ignore[assignment]
    return nn.functional.batch_norm(value, *statistics, training=module.running_mean is None, eps=module.eps)


def _axis(layer: UnitLayer, ndim: int) -> int:
    """The axis that the units of a layer are on."""
    return 1 if layer.kind in ("conv", "batch_norm") or layer.batch_norm is not None else ndim - 1


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
