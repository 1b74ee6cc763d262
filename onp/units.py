"""Units, unit layers and unit groups: everything that can be pruned, under one index.

A *unit* is an output channel of a convolution (with the batch-norm that alone reads it), a channel of a
batch-norm that reads anything else (a residual sum, a concatenation), a neuron of a hidden linear layer,
one input position of a linear layer behind a flatten, or a head of attention. Units are found by tracing
with `torch.fx`, so no table of architectures is needed. Output layers (what produces the logits) hold no
units, nor does a submodule that cannot be traced (`UnitIndex.untraced`): that is computed as it is.

Pruning a unit makes its output exactly zero, by zeroing parameters (its *gates*):

| kind           | gates                                                                       |
|----------------|-----------------------------------------------------------------------------|
| `conv`         | gamma and beta of the batch-norm that alone reads it; else kernel and bias   |
| `batch_norm`   | gamma and beta: only what reads the batch-norm sees the change               |
| `linear`       | like `conv`: the batch-norm behind it, else weight row and bias              |
| `linear_input` | the weight column of that position                                          |
| `head`         | the head's weight columns of the output projection                          |

Channels that a residual addition (or a product, as in squeeze-and-excitation) ties together form a *group*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, fx, nn

from onp.attention import heads_read, is_output
from onp.errors import ModelError
from onp.flow import ChannelFlow, Reads, is_merge
from onp.tracing import BATCH_NORMS, CONVOLUTIONS, shape_of, trace, untraced

UnitKind = Literal["conv", "batch_norm", "linear", "linear_input", "head"]
KINDS: tuple[UnitKind, ...] = ("conv", "batch_norm", "linear", "linear_input", "head")

_CHANNELWISE = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.PReLU)


@dataclass(frozen=True)
class UnitLayer:
    """Units of one kind in one module; unit `i` of the layer is unit `offset + i` of the index."""

    name: str
    """module path (that of the batch-norm where one gates the units; with `.input` for input positions, `.heads`
    for heads)"""
    kind: UnitKind
    offset: int
    size: int
    gates: tuple[tuple[str, int], ...]
    """parameters to zero, each with the axis that runs over the units"""
    weight: str | None
    """module path of the kernels that write the units (None where a unit only gates what it reads); the attention's for
    heads"""
    batch_norm: str | None
    """module path of the batch-norm that gates the units"""
    module: str
    """path of the module whose output (input, for `linear_input`) the units are; for heads, that of the attention, or
    where it is written out, of the linear layer that reads them"""
    reads: Reads | None = field(compare=False)
    """what the layer reads; None where the trace lost track of it. It follows from the rest, and holds tensors"""
    width: int = 1
    """entries of a gate's axis that belong to one unit, side by side: the dimension of a head, else 1"""

    @property
    def units(self) -> range:
        return range(self.offset, self.offset + self.size)

    def entries(self, units: Tensor) -> Tensor:
        """Where the gates' axis holds `units`, which count from the layer's first."""
        return (units.unsqueeze(1) * self.width + torch.arange(self.width)).flatten()


@dataclass(frozen=True)
class OutputLayer:
    """A module that produces logits: it reads units and holds none."""

    module: str
    reads: Reads | None


@dataclass(frozen=True, eq=False)
class UnitIndex:
    """Every prunable unit of one network, in the order in which the network computes them."""

    layers: tuple[UnitLayer, ...]
    outputs: tuple[OutputLayer, ...]
    groups: Tensor
    """(N,) int64: units with equal numbers are tied by residual additions"""
    untraced: tuple[tuple[str, str], ...] = ()
    """modules whose inside could not be traced, so that there are no units in them: path and reason"""

    def __len__(self) -> int:
        return sum(layer.size for layer in self.layers)

    def __repr__(self) -> str:
        return f"UnitIndex({len(self)} units in {len(self.layers)} layers)"

    def __iter__(self) -> Iterator[UnitLayer]:
        return iter(self.layers)

    @cached_property
    def layer_of(self) -> Tensor:
        """(N,) int64: the number of each unit's layer."""
        sizes = torch.tensor([layer.size for layer in self.layers])
        return torch.repeat_interleave(torch.arange(len(self.layers)), sizes)

    def name(self, unit: int) -> str:
        """`LAYER[i]`, e.g. `block3.layer.0.bn2[57]`."""
        layer = self.layers[int(self.layer_of[unit])]
        return f"{layer.name}[{unit - layer.offset}]"

    def group_of(self, unit: int) -> Tensor:
        """Units tied to `unit`, itself included, int64."""
        return (self.groups == self.groups[unit]).nonzero().flatten()

    @cached_property
    def batch_norm_units(self) -> Tensor:
        """(N,) bool: units that a batch-norm gates, i.e. those RNP knows."""
        gated = torch.tensor([layer.batch_norm is not None for layer in self.layers])
        return gated[self.layer_of]


def index_units(model: nn.Module, input_shape: tuple[int, ...]) -> UnitIndex:
    """Find the units of `model`, which takes images of `input_shape` (channels, height, width).

    Raises `ModelError` where the network cannot be traced, does not fit the images, or has no unit.
    """
    return _Tracing(model, input_shape).index()


class _Tracing:
    """One walk over the traced network that assigns units and follows the channels that carry them."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.type_name = type(model).__name__
        self.graph_module = trace(model, input_shape)
        self.modules = dict(self.graph_module.named_modules(remove_duplicate=False))
        self.untraced = {path for path, _ in untraced(self.graph_module)}
        self.output_nodes = self._output_nodes()
        self.layers: list[UnitLayer] = []
        self.outputs: list[OutputLayer] = []
        self.size = 0
        self.parent: list[int] = []
        self.reads: dict[fx.Node, Reads | None] = {}
        self.flow = ChannelFlow(self.reads)
        self.indexed: set[str] = set()

    def index(self) -> UnitIndex:
        for node in self.graph_module.graph.nodes:
            self.reads[node] = self._visit(node)
        if not self.layers:
            raise ModelError(
                f"{self.type_name} has no prunable unit: no hidden convolution, batch-norm or linear layer"
            )
        roots = torch.tensor([self._root(unit) for unit in range(self.size)])
        groups = torch.unique(roots, return_inverse=True)[1]
        return UnitIndex(tuple(self.layers), tuple(self.outputs), groups, untraced(self.graph_module))

    # --- which modules produce the logits -------------------------------------------------------------

    def _output_nodes(self) -> set[fx.Node]:
        """Nodes from which the logits follow without another convolution or linear layer."""
        found: set[fx.Node] = set()
        queue = [node for node in self.graph_module.graph.nodes if node.op == "output"]
        while queue:
            node = queue.pop()
            for source in node.all_input_nodes:
                if source not in found:
                    found.add(source)
                    if not isinstance(self._module(source), (nn.Linear, *CONVOLUTIONS)):
                        queue.append(source)
        self.output_path = {str(node.target) for node in found if node.op == "call_module"}
        return {node for node in found if isinstance(self._module(node), (nn.Linear, *CONVOLUTIONS))}

    def _module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, where one is known to do what its class does."""
        known = node.op == "call_module" and node.target not in self.untraced
        return self.modules[str(node.target)] if known else None

    # --- following channels ---------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Reads | None:
        """The units that the channels of the node's output carry; None where that is unknown."""
        module = self._module(node)
        if module is None and node.op == "call_module":
            return None
        if isinstance(module, nn.MultiheadAttention):
            self._visit_attention(node, module)
            return None
        if isinstance(module, CONVOLUTIONS):
            return self._visit_weighted(node, module, axis=1, size=module.out_channels)
        if isinstance(module, nn.Linear):
            return self._visit_weighted(node, module, axis=len(_require_shape(node)) - 1, size=module.out_features)
        if isinstance(module, BATCH_NORMS):
            return self._visit_batch_norm(node, module)
        if (
            isinstance(module, nn.Module)
            and not isinstance(module, _CHANNELWISE)
            and any(True for _ in module.parameters())
        ):
            return None
        reads = self.flow.follow(node, module)
        if reads is not None and is_merge(node):
            self._tie(reads)
        return reads

    def _visit_attention(self, node: fx.Node, module: nn.MultiheadAttention) -> None:
        path = str(node.target)
        value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
        if path not in self.output_path and any(is_output(user) for user in node.users):
            reads = self.reads[value] if isinstance(value, fx.Node) else None
            gates, width = ((f"{path}.out_proj.weight", 1),), module.head_dim
            self._add_layer(f"{path}.heads", "head", module.num_heads, gates, path, None, path, reads, -1, width)

    def _heads(self, node: fx.Node, reads: Reads | None) -> Reads | None:
        """Make units of the heads of an attention written out that a linear layer reads."""
        if reads is not None or (found := heads_read(node, self._module)) is None:
            return None
        path, (heads, width), axis = str(node.target), found, len(_require_shape(node)) - 1
        gates = ((f"{path}.weight", 1),)
        made = self._add_layer(f"{path}.heads", "head", heads, gates, None, None, path, None, axis, width)
        return made and Reads(axis, (made.units[0].repeat_interleave(width),))

    def _visit_weighted(self, node: fx.Node, module: nn.Module, axis: int, size: int) -> Reads | None:
        reads = self._input(node)
        if isinstance(module, nn.Linear):
            if reads is not None and reads.axis != axis:
                reads = None  # it mixes another axis than the one that the channels are on
            reads = self._heads(node, reads) or self._input_positions(node, reads)
        path = str(node.target)
        if node in self.output_nodes:
            self.outputs.append(OutputLayer(path, reads))
            return None
        if path in self.output_path:
            return None
        if self._gating_batch_norm(node) is not None:
            return reads  # the batch-norm becomes the unit and needs to know what its convolution reads
        gates = [(f"{path}.weight", 0)] + ([(f"{path}.bias", 0)] if module.bias is not None else [])
        kind: UnitKind = "linear" if isinstance(module, nn.Linear) else "conv"
        return self._add_layer(path, kind, size, tuple(gates), path, None, path, reads, axis)

    def _gating_batch_norm(self, node: fx.Node) -> nn.Module | None:
        users = list(node.users)
        module = self._module(users[0]) if len(users) == 1 else None
        return module if isinstance(module, BATCH_NORMS) else None

    def _visit_batch_norm(self, node: fx.Node, module: nn.Module) -> Reads | None:
        source = node.all_input_nodes[0]
        writer = self._module(source)
        alone = isinstance(writer, (nn.Linear, *CONVOLUTIONS)) and len(source.users) == 1
        if str(node.target) in self.output_path:
            return None
        if not module.affine:  # no gate here; a convolution's unit would not be zero behind it
            return None if alone else self.reads[source]
        path = str(node.target)
        kind: UnitKind = "batch_norm"
        if alone:
            kind = "linear" if isinstance(writer, nn.Linear) else "conv"
        weight = str(source.target) if alone else None
        gates = ((f"{path}.weight", 0), (f"{path}.bias", 0))
        reads = self.reads[source]
        return self._add_layer(path, kind, _require_shape(node)[1], gates, weight, path, path, reads, axis=1)

    def _input_positions(self, node: fx.Node, reads: Reads | None) -> Reads | None:
        """Make units of the input positions behind a flatten, where no single unit controls each of them already."""
        if reads is None or not reads.flattened or (reads.positions == 1 and len(reads.units) == 1):
            return reads
        path = str(node.target)
        size = int(self.modules[path].get_parameter("weight").shape[1])
        return self._add_layer(
            f"{path}.input", "linear_input", size, ((f"{path}.weight", 1),), None, None, path, reads, reads.axis
        )

    def _add_layer(
        self,
        name: str,
        kind: UnitKind,
        size: int,
        gates: tuple[tuple[str, int], ...],
        weight: str | None,
        batch_norm: str | None,
        module: str,
        reads: Reads | None,
        axis: int,
        width: int = 1,
    ) -> Reads | None:
        if name in self.indexed:  # a module called twice is one set of units
            return None
        self.indexed.add(name)
        parameters = dict(self.graph_module.named_parameters(remove_duplicate=False))
        if computed := [gate for gate, _ in gates if gate not in parameters]:
            raise ModelError(
                f"{computed[0]} is no plain parameter; remove the parametrization (weight_norm, ...) first"
            )
        self.layers.append(UnitLayer(name, kind, self.size, size, gates, weight, batch_norm, module, reads, width))
        units = torch.arange(self.size, self.size + size)
        self.size += size
        self.parent.extend(units.tolist())
        return Reads(axis, (units,))

    def _tie(self, reads: Reads) -> None:
        """Units that write the same channel are of one group."""
        for writers in zip(*(units.tolist() for units in reads.units), strict=True):
            known = [unit for unit in writers if unit >= 0]
            for unit in known[1:]:
                self.parent[self._root(unit)] = self._root(known[0])

    def _input(self, node: fx.Node) -> Reads | None:
        return self.reads[node.all_input_nodes[0]] if node.all_input_nodes else None

    def _root(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit


def _require_shape(node: fx.Node) -> tuple[int, ...]:
    return shape_of(node) or ()
