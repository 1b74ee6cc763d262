"""A traced network in which every unit layer passes through a gate: how the graph is made.

A gate stands for parameters that become zero (`onp.masks`), so nothing else may use those.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from onp.attention import heads_alone, is_output
from onp.errors import ModelError
from onp.layout import fastest_layout
from onp.tracing import BATCH_NORMS, CONVOLUTIONS, shape_of, trace, untraced
from onp.units import UnitIndex, UnitLayer

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class GatedGraph:
    """A traced copy of `model` in eval mode, with gates; batch-norms are folded into what alone feeds them.

    Raises `ModelError` where gates cannot stand for the parameters, or something works in place and cannot help it.
    """

    def __init__(self, model: nn.Module, index: UnitIndex, input_shape: tuple[int, ...], device: torch.device) -> None:
        self.index = index
        self.graph_module = trace(model, input_shape)
        self.modules = dict(self.graph_module.named_modules(remove_duplicate=False))
        self.untraced = {path for path, _ in untraced(self.graph_module)}
        """modules that are one node although nobody knows what they do"""
        self.layer_of: dict[fx.Node, UnitLayer] = {}
        """gates and the units that they gate"""
        self.betas: dict[fx.Node, Tensor] = {}
        """what a gate gives for a pruned unit under RNP's rule"""
        self._never_in_place()
        self._check_gates()
        for node in list(self.graph_module.graph.nodes):
            for layer in index if node.op == "call_module" else ():
                if layer.module == node.target and isinstance(self.modules[layer.module], nn.MultiheadAttention):
                    self._part_attention(node, layer)
                elif layer.module == node.target:
                    self._insert_gate(node, layer)
        self._fold_batch_norms()
        self.norms = self._join_gates_with_batch_norms()
        """gates that are one with their batch-norm"""
        self.layout = fastest_layout(model, input_shape, learns=False)
        for parameter in self.graph_module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        self.graph_module.to(device).requires_grad_(False)
        self.betas = {node: beta.to(device) for node, beta in self.betas.items()}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, where one is known to do what its class does."""
        known = node.op == "call_module" and node.target not in self.untraced
        return self.modules[str(node.target)] if known else None

    def _never_in_place(self) -> None:
        """Values are used again: nothing may change its input."""
        for path, module in self.modules.items():
            if getattr(module, "inplace", False) and self.untraced.isdisjoint(_owners(f"{path}.")):
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
        used = {name for name in parameters if not called.isdisjoint(_owners(name))}
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        for name in dict.fromkeys(name for layer in self.index for name, _ in layer.gates):
            same = {other for other, parameter in parameters.items() if parameter is parameters[name]}
            twice = {name} if len(called.intersection(_owners(name))) > 1 else set()
            others = (used & same - {name}) | (same & read) | twice
            if others:
                raise ModelError(
                    f"{name} is also used as {', '.join(sorted(others))}, outside its layer, so its units cannot be "
                    "pruned alone; untie the weights"
                )

    def _insert_gate(self, node: fx.Node, layer: UnitLayer) -> None:
        graph = self.graph_module.graph
        before = layer.kind in ("linear_input", "head")
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
            self.betas[gate] = self.modules[layer.batch_norm].get_parameter("bias").detach().clone()

    def _part_attention(self, node: fx.Node, layer: UnitLayer) -> None:
        """Put the gate between the heads of an attention and its output projection."""
        graph, path = self.graph_module.graph, str(node.target)
        projection, attention = f"{path}_out_proj", self.modules[path]
        if projection not in self.modules and isinstance(attention, nn.MultiheadAttention):
            self.modules[path], self.modules[projection] = heads_alone(attention), attention.out_proj
            self.graph_module.set_submodule(path, self.modules[path])
            self.graph_module.add_submodule(projection, self.modules[projection])
        for heads in [user for user in node.users if is_output(user)]:
            with graph.inserting_after(heads):
                gate = graph.call_function(_gate, (heads,))
            with graph.inserting_after(gate):
                output = graph.call_module(projection, (gate,))
            gate.meta, output.meta = dict(heads.meta), dict(heads.meta)
            heads.replace_all_uses_with(output)
            gate.args = (heads,)
            output.args = (gate,)
            self.layer_of[gate] = layer

    def _fold_batch_norms(self) -> None:
        nodes = self.graph_module.graph.nodes
        calls = [node.target for node in nodes if node.op == "call_module"]
        read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
        for node in list(self.graph_module.graph.nodes):
            module = self.module(node)
            if not isinstance(module, BATCH_NORMS) or module.running_mean is None or calls.count(node.target) > 1:
                continue
            source = node.all_input_nodes[0]
            writer = self.module(source)
            if len(source.users) > 1 or calls.count(source.target) > 1 or {node.target, source.target} & read:
                continue
            if not is_plain(writer) or not is_plain(module):
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
            own = isinstance(self.module(norm), BATCH_NORMS) and self.layer_of[gate].batch_norm == norm.target
            if own and len(norm.users) == 1:
                joined[gate] = self.module(norm)
                norm.replace_all_uses_with(norm.all_input_nodes[0])
                self.graph_module.graph.erase_node(norm)
        return joined


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


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is just what its class says: no parametrized weights, no hooks."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules."):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _owners(name: str) -> list[str]:
    """Paths of the modules that a parameter lies in."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]


def _gate(value: Tensor) -> Tensor:
    """Marks a gate in the graph; `GatedNetwork` runs it."""
    return value
