"""Which channels a network can lose without changing its logits, whatever the image.

One walk over the traced network gives every channel of every tensor an id; additions, products and depthwise
convolutions tie those of their operands into one. A channel can go where each layer that mixes channels reads a proven
zero there, or has zero weights for it. What is proven follows from the weights: a pruned unit is zero, and stays so
through whatever maps zero to zero; a sigmoid, or a batch-norm with another mean, makes a constant of it, which stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from onp.tracing import BATCH_NORMS, CONVOLUTIONS, operation, trace, untraced

_SUMS = {"add", "iadd", "add_", "sub", "isub", "sub_"}
_PRODUCTS = {"mul", "imul", "mul_"}
_ELEMENTWISE = {
    *("ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Hardswish"),
    *("Hardsigmoid", "Hardtanh", "Softplus", "Identity", "Dropout", "AlphaDropout", "StochasticDepth"),
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh"),
    *("hardswish", "hardsigmoid", "hardtanh", "softplus", "dropout", "stochastic_depth", "contiguous", "clone"),
}
"""operations that make each value of their output from the same value of their input, by name"""
_CHANNELWISE = _ELEMENTWISE | {
    *("Dropout2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "Upsample", "ZeroPad2d"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"),
}
"""operations that make each channel (axis 1) of their output from the same channel of their input, by name"""


class Channels(NamedTuple):
    """The channels of one tensor, on its axis 1 (its last, behind a linear layer over tokens); fields: (channels,)."""

    ids: Tensor
    """int64"""
    fixed: Tensor
    """bool: the same values for every image"""
    zero: Tensor
    """bool: zero for every image"""


@dataclass(frozen=True, eq=False)
class Slot:
    """The ids of the channels that a convolution, batch-norm or linear layer reads and writes."""

    inputs: Tensor | None
    """None where the layer does not mix channels, or what it reads is unknown"""
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """What `map_channels` finds."""

    slots: dict[str, Slot]
    """by module path"""
    reasons: tuple[str | None, ...]
    """by id: why the channel has to stay; None where it can go"""

    def staying(self, ids: Tensor) -> Tensor:
        """Positions in `ids` of the channels that stay, int64."""
        return torch.tensor([self.reasons[channel] is not None for channel in ids.tolist()]).nonzero().flatten()


def map_channels(model: nn.Module, input_shape: tuple[int, ...]) -> ChannelMap:
    """Follow the channels of `model`, whose pruned units are zeroed and which takes images of `input_shape`.

    Raises `ModelError` where the network cannot be traced.
    """
    walk = _Walk(trace(model, input_shape))
    with torch.no_grad():
        walk.run(torch.zeros(2, *input_shape))
    return walk.channel_map()


class _Walk(fx.Interpreter):
    """Runs the network on blank images and says of every tensor what its channels are.

    Values are looked at only where they are the same for every image, so a blank one tells.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))
        self.untraced = {path for path, _ in untraced(graph_module)}
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.channels: dict[fx.Node, Channels] = {}
        self.last: set[fx.Node] = set()  # nodes whose channels are on the last axis, as a linear layer leaves tokens
        self.slots: dict[str, Slot] = {}
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            self._stay_all(n, "it is a logit")
        elif isinstance(value, Tensor):
            self.shapes[n] = value.shape
            if (known := self._visit(n, value)) is not None:
                blank = (value == 0).movedim(self._axis(n), 0).flatten(1).all(1)
                self.channels[n] = known._replace(zero=known.fixed & blank)
        elif not isinstance(value, (int, torch.Size, torch.dtype, torch.device)):  # several tensors, as of a chunk
            self._stay_all(n, f"{operation(n, None)} reads it, and may mix, move or count channels")
        return value

    def channel_map(self) -> ChannelMap:
        """The reasons, shared by what is tied together."""
        for node in self.module.graph.nodes if isinstance(self.module, fx.GraphModule) else ():
            slot = self.slots.get(str(node.target).rpartition(".")[0]) if node.op == "get_attr" else None
            if slot is not None:
                self._stay_slot(slot, f"{node.target} is used outside its layer")
        roots = [self._root(channel) for channel in range(len(self.parent))]
        reasons: dict[int, str] = {}
        for channel, reason in self.reasons.items():
            reasons.setdefault(roots[channel], reason)
        for path, slot in self.slots.items():
            written = [roots[channel] for channel in slot.outputs.tolist()]
            if not any(root in reasons for root in written):
                reasons[written[0]] = f"{path} has to keep one channel"
        return ChannelMap(self.slots, tuple(reasons.get(root) for root in roots))

    # --- one node -----------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, value: Tensor) -> Channels | None:
        """The channels of a node's value, but for what is zero; None where they cannot be followed."""
        known_module = node.op == "call_module" and node.target not in self.untraced
        module = self.modules[str(node.target)] if known_module else None
        name = operation(node, module)
        if node.op == "placeholder":
            return self._new(value.shape[1], "it is a channel of the image")
        if (isinstance(module, nn.Linear) and value.ndim > 2) or not self.last.isdisjoint(node.all_input_nodes):
            return self._on_tokens(node, module, name)
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            return self._grouped(node, module)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            return self._mixing(node, module)
        known = [self.channels[source] for source in node.all_input_nodes if source in self.channels]
        result: Channels | None = None
        if isinstance(module, BATCH_NORMS) and known:
            shut = _zero(module.weight, 0) if module.affine else torch.zeros_like(known[0].fixed)
            return self._place(node, None, known[0]._replace(fixed=known[0].fixed | shut))
        if name in _SUMS or name in _PRODUCTS:
            result = self._merged(node, known, value, product=name in _PRODUCTS)
        elif name in ("cat", "concat", "concatenate"):
            result = self._concatenated(node)
        elif len(known) == 1:
            before = self.shapes[node.all_input_nodes[0]]
            result = known[0] if name in _CHANNELWISE else _reshaped(node, name, known[0], before, value.shape)
        if result is None or len(result.ids) != value.shape[self._axis(node)]:
            self._stay_all(node, f"{name} reads it, and may mix, move or count channels")
            return None
        return result

    def _axis(self, node: fx.Node) -> int:
        return -1 if node in self.last else 1

    def _on_tokens(self, node: fx.Node, module: nn.Module | None, name: str) -> Channels | None:
        """A linear layer over the last axis of more than two, or what reads such a layer's output."""
        source = node.all_input_nodes[0]
        if isinstance(module, nn.Linear):
            self.last.add(node)
            if source in self.last:
                return self._mixing(node, module)
            self._stay_all(node, f"{node.target} reads another axis")
            weight = module.get_parameter("weight")
            return self._place(node, None, self._new(len(weight))._replace(fixed=_zero(weight, 0)))
        if name in _ELEMENTWISE and len(node.all_input_nodes) == 1:
            self.last.add(node)
            return self.channels[source]
        self._stay_all(node, f"{name} reads it, and may mix, move or count channels")
        return None

    def _mixing(self, node: fx.Node, module: nn.Module) -> Channels:
        """A layer each of whose outputs reads every input channel."""
        weight, source = module.get_parameter("weight"), self.channels.get(node.all_input_nodes[0])
        if source is not None:
            read = ~source.zero & ~_zero(weight, 1)
            self._stay(source.ids[read & ~source.fixed], f"{node.target} still reads it")
            self._stay(source.ids[read & source.fixed], f"{node.target} reads a constant other than zero there")
        written = self._new(len(weight))._replace(fixed=_zero(weight, 0))
        return self._place(node, source.ids if source is not None else None, written)

    def _grouped(self, node: fx.Node, module: Any) -> Channels:
        source = self.channels.get(node.all_input_nodes[0])
        if source is None or module.groups < module.in_channels:
            reason = f"{node.target} works in groups of channels"
            self._stay_all(node, reason)
            return self._place(node, None, self._new(module.out_channels, reason))
        ids, fixed = (part.repeat_interleave(module.out_channels // module.groups) for part in source[:2])
        return self._place(node, None, Channels(ids, fixed | _zero(module.weight, 0), fixed))

    def _place(self, node: fx.Node, inputs: Tensor | None, written: Channels) -> Channels:
        path, slot = str(node.target), Slot(inputs, written.ids)
        if path in self.slots:
            for call in (self.slots[path], slot):
                self._stay_slot(call, f"{path} is called several times")
        self.slots[path] = slot
        return written

    def _merged(self, node: fx.Node, known: list[Channels], value: Tensor, product: bool) -> Channels | None:
        """A sum or product, which ties its operands' channels; None where they do not meet one to one."""
        operands = [source for source in node.all_input_nodes if source in self.shapes]
        for source in operands:
            shape = self.shapes[source]
            if source not in self.channels and shape.numel() > 1:
                return None
            if source in self.channels and (len(shape) != value.ndim or shape[1] != value.shape[1]):
                return None
        if not known:
            return None
        first, *rest = known
        for part in rest:
            for one, other in zip(first.ids.tolist(), part.ids.tolist(), strict=True):
                self.parent[self._root(other)] = self._root(one)
        fixed = torch.stack([part.fixed for part in known]).all(0) & (len(known) == len(operands))
        zero = torch.stack([part.zero for part in known]).any(0)
        return first._replace(fixed=fixed | zero if product else fixed)

    def _concatenated(self, node: fx.Node) -> Channels | None:
        sources = node.args[0] if node.args else node.kwargs["tensors"]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if axis not in (1, 1 - len(self.shapes[node])) or not isinstance(sources, (list, tuple)):
            return None
        parts = []
        for source in sources:
            assert isinstance(source, fx.Node)
            parts.append(
                self.channels.get(source) or self._new(self.shapes[source][1], "where it comes from is unknown")
            )
        return Channels(*map(torch.cat, zip(*parts, strict=True)))

    # --- ids ----------------------------------------------------------------------------------------------

    def _new(self, size: int, reason: str | None = None) -> Channels:
        ids = torch.arange(len(self.parent), len(self.parent) + size)
        self.parent += ids.tolist()
        if reason:
            self._stay(ids, reason)
        return Channels(ids, torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool))

    def _stay(self, ids: Tensor | None, reason: str) -> None:
        for channel in ids.tolist() if ids is not None else ():
            self.reasons.setdefault(channel, reason)

    def _stay_slot(self, slot: Slot, reason: str) -> None:
        self._stay(slot.inputs, reason)
        self._stay(slot.outputs, reason)

    def _stay_all(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            self._stay(self.channels[source].ids if source in self.channels else None, reason)

    def _root(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel


def _zero(weight: Tensor, axis: int) -> Tensor:
    """Which slices of `weight` along `axis` are all zero, bool."""
    return (weight == 0).transpose(0, axis).reshape(weight.shape[axis], -1).all(1)


def _reshaped(node: fx.Node, name: str, source: Channels, before: torch.Size, after: torch.Size) -> Channels | None:
    """Channels behind a mean over the image, a flatten or a view; None where their axis or number is lost."""
    sizes: Any = node.args[1:]
    if name == "mean":
        dims = node.kwargs.get("dim", sizes[0] if sizes else 1)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return source if all(dim % len(before) > 1 for dim in dims) else None
    if name in ("view", "reshape"):
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        if len(sizes) < 2 or (isinstance(sizes[1], int) and sizes[1] != -1):
            return None  # a number of channels written into the code
    elif name not in ("flatten", "Flatten"):
        return None
    if after[:2] == before[:2]:
        return source
    if after == (before[0], prod(before[1:])):
        return Channels(*(part.repeat_interleave(prod(before[2:])) for part in source))
    return None
