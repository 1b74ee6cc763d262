"""A network as a `torch.fx` graph, for finding its units and for running it under masks."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from onp.errors import ModelError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """A traced copy of `model` on the CPU, in eval mode, whose nodes know their shapes for a batch of two images.

    Raises `ModelError` where the network cannot be traced or does not fit the images.
    """
    traced = copy.deepcopy(model).cpu().eval()
    try:
        graph_module = fx.symbolic_trace(traced)
    except Exception as error:
        raise ModelError(
            f"cannot trace {type(model).__name__}: {_first_line(error)}; data-dependent Python control flow "
            "in forward() has to go"
        ) from error
    try:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(torch.zeros(2, *input_shape))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not accept images of shape {input_shape}: {_first_line(error)}"
        ) from error
    return graph_module


def _first_line(error: Exception) -> str:
    """ShapeProp wraps the cause and prints it behind the user's stack: the root cause says it best."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value in a graph made by `trace`; None where that is no tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return tuple(shape) if shape is not None else None


def operation(node: fx.Node, module: nn.Module | None) -> str:
    """The name of what a node does: its module's class, else its function or method."""
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
