"""A network as a `torch.fx` graph, for finding its units and for running it under masks.

A submodule that cannot be traced, since its `forward` branches on values, becomes one node of the graph.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from onp.errors import ModelError, first_line, lacks_memory

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSFORMERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_KNOWN = (nn.Linear, *CONVOLUTIONS, nn.MultiheadAttention, nn.LayerNorm, nn.Embedding)


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """A traced copy of `model` on the CPU, in eval mode, whose nodes know their shapes for a batch of two images.

    Raises `ModelError` where the network's own `forward` cannot be traced, does not fit the images, or does not give
    one tensor.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"{type(model).__name__} runs a network on several devices; give the network itself, .module")
    traced = copy.deepcopy(model).cpu().eval()
    graph_module = _trace_around(traced, {})
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # ShapeProp prints what it raises
            _Shapes(graph_module).propagate(torch.zeros(3, *input_shape))
            shapes_of_three = {node: shape_of(node) for node in graph_module.graph.nodes}
            _Shapes(graph_module).propagate(torch.zeros(2, *input_shape))
    except Exception as error:
        if lacks_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not accept batches of 2 and 3 float images of shape {input_shape}: "
            f"{_root_cause(error)}"
        ) from error
    if shape_of(next(iter(reversed(graph_module.graph.nodes)))) is None:
        raise ModelError(
            f"{type(model).__name__} gives something else than one tensor; wrap it in a module that returns the "
            "logits alone"
        )
    for node, shape in shapes_of_three.items():
        node.meta["image_axis"] = _first_difference(shape or (), shape_of(node) or ())
    return graph_module


def _trace_around(model: nn.Module, whole: dict[str, str]) -> fx.GraphModule:
    """The graph of `model` in which the modules `whole` are one node each, and so are more where tracing fails."""
    tracer, fast = _Tracer(whole), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it asks for values
    try:
        graph = tracer.trace(model)
    except Exception as error:
        if tracer.failed is None or tracer.failed in whole:
            raise ModelError(
                f"cannot trace {type(model).__name__}: {_root_cause(error)}; take what branches on values out of its "
                "forward(), into a submodule: that is then one piece without units"
            ) from error
        return _trace_around(model, {**whole, tracer.failed: _root_cause(error)})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    graph_module = fx.GraphModule(tracer.root, graph, type(model).__name__)
    called = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    reasons = {path: whole.get(path) or _opaque(graph_module.get_submodule(path)) for path in called}
    graph_module.meta["untraced"] = tuple((path, reason) for path, reason in reasons.items() if reason)
    return graph_module


def untraced(graph_module: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """Modules of a graph made by `trace` that are one node although they have layers inside: (path, reason)."""
    modules: tuple[tuple[str, str], ...] = graph_module.meta["untraced"]
    return modules


def _opaque(module: nn.Module) -> str:
    """Why nothing is known about the weights of a module of PyTorch's own; nothing where all is."""
    weighted = any(parameter.ndim > 1 for parameter in module.parameters())
    return f"{type(module).__name__} is one piece" if weighted and not isinstance(module, _KNOWN) else ""


class _Tracer(fx.Tracer):
    """Traces every module but those of PyTorch and the paths `whole`; remembers the innermost one that fails."""

    def __init__(self, whole: Collection[str] = ()) -> None:
        super().__init__()
        self.whole = whole
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.whole:
            return True
        return not isinstance(m, _TRANSFORMERS) and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, nn.TransformerEncoder) and len(args) == 1 and not kwargs:
            forward = partial(_encode, m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _encode(encoder: nn.TransformerEncoder, value: Tensor) -> Tensor:
    """What an encoder does without masks; its own `forward` looks for nested tensors."""
    for layer in encoder.layers:
        value = layer(value)
    return value if encoder.norm is None else encoder.norm(value)


class _Shapes(ShapeProp):
    """Notes the shapes of tensors, and under `value` whatever else a node gives (sizes, numbers)."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "tensor_meta" not in n.meta:
            n.meta["value"] = result
        return result


def _root_cause(error: Exception) -> str:
    """ShapeProp wraps the cause and prints it behind the user's stack: the root cause says it best."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _first_difference(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    return next((axis for axis, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value in a graph made by `trace`; None where that is no tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return tuple(shape) if shape is not None else None


def image_axis(node: fx.Node) -> int | None:
    """The axis of a node's value that runs over the images; None where it is the same for all of them."""
    axis: int | None = node.meta["image_axis"]
    return axis


def operation(node: fx.Node, module: nn.Module | None) -> str:
    """The name of what a node does: the class of its `module` (None: one not known), else its function or method."""
    if module is None and node.op == "call_module":
        return f"module {node.target}"
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
