"""The heads of attention: what they write before the output projection mixes it.

`nn.MultiheadAttention` keeps that to itself; where a network writes attention out, the projection is a linear layer.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from onp.tracing import operation, shape_of

_MERGES = ("reshape", "view", "flatten", "Flatten")
_SWAPS = ("transpose", "permute", "swapaxes", "movedim", "contiguous")
_PASSES = ("Identity", "Dropout", "dropout", "contiguous")
_PRODUCTS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention")


def heads_alone(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A copy that gives its heads' outputs side by side, head i in columns i * head_dim to (i + 1) * head_dim.

    Its output projection is the identity, so that whatever the attention does else (masks, biases, layout) stays.
    """
    projection = copy.deepcopy(attention.out_proj)
    with torch.no_grad():
        nn.init.eye_(projection.weight)
        if projection.bias is not None:
            projection.bias.zero_()
    alone = copy.copy(attention)  # everything but the projection is the attention's own
    alone._modules = {**attention._modules, "out_proj": projection}
    alone._forward_hooks = OrderedDict()
    return alone


def value_kernels(attention: nn.MultiheadAttention) -> Tensor:
    """The weights of the value projection, what every head's output is made by: (heads * head_dim, inputs)."""
    if attention.in_proj_weight is None:
        return attention.v_proj_weight
    return attention.in_proj_weight.chunk(3)[2]


def is_output(node: fx.Node) -> bool:
    """Whether a node takes the output of an attention out of what its module gives, which has the weights besides."""
    return node.target is operator.getitem and node.args[1:] == (0,)


def heads_read(layer: fx.Node, module: Callable[[fx.Node], nn.Module | None]) -> tuple[int, int] | None:
    """(heads, head_dim), where a linear layer reads the heads of an attention that is written out; else None.

    That is a product (with the attention's weights), of which two axes, heads and their dimension, become one.
    `module` gives the module that a node calls.
    """

    def before(node: fx.Node, names: tuple[str, ...]) -> fx.Node:
        while operation(node, module(node)) in names:
            node = node.all_input_nodes[0]
        return node

    merged = before(layer.all_input_nodes[0], _PASSES)
    if operation(merged, module(merged)) not in _MERGES:
        return None
    parted = merged.all_input_nodes[0]
    product = before(parted, _SWAPS)
    *places, heads, width = shape_of(parted) or (0, 0)
    if operation(product, module(product)) not in _PRODUCTS or (*places, heads * width) != shape_of(merged):
        return None
    return (heads, width) if places else None
