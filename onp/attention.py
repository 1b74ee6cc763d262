"""The heads of `nn.MultiheadAttention`: what they write before the output projection mixes it."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict

import torch
from torch import Tensor, fx, nn


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
