"""A traced network in which every unit layer passes through a gate: the graph that the evaluation engine walks.

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
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from onp.errors import ModelError
from onp.masks import Rule
from onp.tracing import BATCH_NORMS, CONVOLUTIONS, operation, shape_of, trace
from onp.units import UnitIndex, UnitLayer

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
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


class GatedNetwork:
    """A traced copy of `model` in eval mode; batch-norms are folded where a weighted layer alone feeds them.

    The copy does not follow later changes of `model`.
    """

    def __init__(self, model: nn.Module, index: UnitIndex, input_shape: tuple[int, ...], device: torch.device) -> None:
        self.index = index
        self.graph_module = trace(model, input_shape)
        self.modules = dict(self.graph_module.named_modules())
        self.layer_of: dict[fx.Node, UnitLayer] = {}
        """gates and the units that they gate"""
        self._betas: dict[fx.Node, Tensor] = {}
        self._never_in_place()
        self._check_gates()
        for node in list(self.graph_module.graph.nodes):
            for layer in index if node.op == "call_module" else ():
                if layer.module == node.target:
                    self._insert_gate(node, layer)
        self._fold_batch_norms()
        self._norms = self._join_gates_with_batch_norms()
        for parameter in self.graph_module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.graph_module.to(device).requires_grad_(False)
        self._betas = {node: beta.to(device) for node, beta in self._betas.items()}
        self.nodes = list(self.graph_module.graph.nodes)
        self.output = self.nodes[-1].args[0]
        if not isinstance(self.output, fx.Node) or shape_of(self.output) is None:
            raise ModelError(f"{type(model).__name__} gives more than one tensor; it has to give the logits alone")
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

    # --- building ---------------------------------------------------------------------------------------

    def _never_in_place(self) -> None:
        """Values are used again: nothing may change its input."""
        for module in self.modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False
        for node in self.graph_module.graph.nodes:
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
            if node.op in ("call_function", "call_method"):
                node.target = _OUT_OF_PLACE.get(node.target) or _without_underscore(node)

    def _check_gates(self) -> None:
        """A gate stands for its parameters only where nothing else uses them."""
        graph, parameters = self.graph_module.graph, dict(self.graph_module.named_parameters(remove_duplicate=False))
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        for name in {name for layer in self.index for name, _ in layer.gates}:
            same = {other for other, parameter in parameters.items() if parameter is parameters[name]}
            others = {other for other in same - {name} if other.rpartition(".")[0] in called} | (same & read)
            if others:
                raise ModelError(
                    f"{name} is also used as {', '.join(sorted(others))}, outside its layer, so its units cannot be "
                    "pruned alone; untie the weights"
                )

    def _insert_gate(self, node: fx.Node, layer: UnitLayer) -> None:
        graph = self.graph_module.graph
        before = layer.kind == "linear_input"
        source = node.all_input_nodes[0] if before else node
        with graph.inserting_after(source):
            gate = graph.call_function(_gate, (source,))
        gate.meta = dict(source.meta)
        if before:
            node.replace_input_with(source, gate)
        else:
            source.replace_all_uses_with(gate, lambda user: user is not gate)
        self.layer_of[gate] = layer
        if layer.batch_norm is not None:
            self._betas[gate] = self.modules[layer.batch_norm].get_parameter("bias").detach().clone()

    def _fold_batch_norms(self) -> None:
        nodes = self.graph_module.graph.nodes
        calls = [node.target for node in nodes if node.op == "call_module"]
        read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
        for node in list(self.graph_module.graph.nodes):
            module = self._module(node)
            if not isinstance(module, BATCH_NORMS) or module.running_mean is None or calls.count(node.target) > 1:
                continue
            source = node.all_input_nodes[0]
            writer = self._module(source)
            if len(source.users) > 1 or calls.count(source.target) > 1 or {node.target, source.target} & read:
                continue
            if not _is_plain(writer) or not _is_plain(module):
                continue
            if isinstance(writer, CONVOLUTIONS):
                folded: nn.Module = fuse_conv_bn_eval(writer, module)
            elif isinstance(writer, nn.Linear) and len(shape_of(source) or ()) == 2:
                folded = fuse_linear_bn_eval(writer, module)
            else:
                continue
            self.graph_module.set_submodule(str(source.target), folded)
            self.modules[str(source.target)] = folded
            node.replace_all_uses_with(source)
            self.graph_module.graph.erase_node(node)

    def _join_gates_with_batch_norms(self) -> dict[fx.Node, Any]:
        """A gate behind a batch-norm becomes one node with it: it costs nothing to zero gamma and beta."""
        joined: dict[fx.Node, Any] = {}
        for gate in self.layer_of:
            norm = gate.all_input_nodes[0]
            own = isinstance(self._module(norm), BATCH_NORMS) and self.layer_of[gate].batch_norm == norm.target
            if own and len(norm.users) == 1:
                joined[gate] = self._module(norm)
                norm.replace_all_uses_with(norm.all_input_nodes[0])
                self.graph_module.graph.erase_node(norm)
        return joined

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

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

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
        module = self._module(node)
        if not isinstance(module, CONVOLUTIONS) or not _is_plain(module):
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
            return _axis(self.layer_of[node], len(shape)) == 1
        module = self._module(node)
        name = operation(node, module)
        return isinstance(module, BATCH_NORMS) or (
            name in _CHANNELWISE and (len(shape) == 4 or "pool2d" not in name.lower())
        )

    def _is_worth_keeping(self, node: fx.Node) -> bool:
        if node in self.parts or node in self.absorbed:
            return node in self.parts
        module = self._module(node)
        name = operation(node, module)
        cheap = node in self.layer_of or isinstance(module, BATCH_NORMS) or name in _CHEAP
        computed = node.op not in ("placeholder", "get_attr", "output") and shape_of(node) is not None
        return computed and (not cheap or len(node.users) > 1)

    # --- what the nodes are -------------------------------------------------------------------------------

    def fresh(self, node: fx.Node) -> bool:
        """Whether a node's value is its own, and its one reader may overwrite it."""
        makes = (
            node in self._norms or self._convolution(node) is not None or isinstance(self._module(node), BATCH_NORMS)
        )
        return (makes or self._is_sum(node)) and len(node.users) == 1

    def bytes_per_image(self, node: fx.Node) -> int:
        """Size of a node's value for one image."""
        shape = shape_of(node)
        return 0 if shape is None else -(-prod(shape) // 2) * node.meta["tensor_meta"].dtype.itemsize

    def axis(self, gate: fx.Node) -> int:
        """The axis of a gate's units."""
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
        module = self._module(node)
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
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _run_gate(
        self, node: fx.Node, value: Tensor, pruned: frozenset[int], rule: Rule, channels: list[int] | None
    ) -> Tensor:
        layer, norm = self.layer_of[node], self._norms.get(node)
        closed = [unit - layer.offset for unit in pruned if unit in layer.units]
        if not closed:
            return value if norm is None else _batch_norm(norm, value, norm.weight, norm.bias, channels)
        keep = value.new_ones(layer.size)
        keep[closed] = 0
        if norm is not None:
            return _batch_norm(
                norm, value, norm.weight * keep, norm.bias * keep if rule == "zero" else norm.bias, channels
            )
        shape = [1] * value.ndim
        shape[_axis(layer, value.ndim)] = -1
        beta = self._betas[node] if rule == "gamma" else None
        if channels is not None:
            keep, beta = keep[channels], None if beta is None else beta[channels]
        if beta is None:
            return value * keep.view(shape)
        return torch.addcmul((beta * (1 - keep)).view(shape), value, keep.view(shape))


def _batch_norm(
    module: Any, value: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: list[int] | None
) -> Tensor:
    statistics = module.running_mean, module.running_var, gamma, beta
    if channels is not None:
        statistics = tuple(None if tensor is None else tensor[channels] for tensor in statistics)  # type: ignore[assignment]
    return nn.functional.batch_norm(value, *statistics, training=module.running_mean is None, eps=module.eps)


def _without_underscore(node: fx.Node) -> Any:
    """What a node calls, or its twin that works out of place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if "out" in node.kwargs:
        raise ModelError(f"{name}(out=...) writes over a tensor; use its result instead")
    if not name.endswith("_") or name.endswith("__"):
        return node.target
    homes = (Tensor,) if isinstance(node.target, str) else (nn.functional, torch)
    twins = [getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1])]
    if not twins or name == "requires_grad_":
        raise ModelError(f"{name}() works in place and has no twin that does not; take it out of forward()")
    return name[:-1] if isinstance(node.target, str) else twins[0]


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a module is just what its class says: no parametrized weights, no hooks."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules."):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _axis(layer: UnitLayer, ndim: int) -> int:
    """The axis that the units of a layer are on."""
    return 1 if layer.kind in ("conv", "batch_norm") or layer.batch_norm is not None else ndim - 1


def _gate(value: Tensor) -> Tensor:
    """Marks a gate in the graph; `GatedNetwork` runs it."""
    return value
