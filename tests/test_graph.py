"""The graph: edges and features against values worked out by hand on tiny networks."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from onp.drawing import draw_graph
from onp.errors import ConfigError
from onp.graph import (
    FEATURES,
    GraphConfig,
    activation_statistics,
    build_graph,
    connection_strengths,
    to_networkx,
    unlearning_signal,
)
from onp.models.small import SmallCNN
from onp.units import UnitIndex, index_units


class Chain(nn.Module):
    """Two hidden linear layers on two input pixels, with given weights."""

    def __init__(self, first: list[list[float]], second: list[list[float]]) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.one = nn.Linear(2, len(first), bias=False)
        self.two = nn.Linear(len(first), len(second), bias=False)
        self.out = nn.Linear(len(second), 2, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor(first))
            self.two.weight.copy_(torch.tensor(second))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(torch.relu(self.one(self.flatten(x)))))


class Residual(nn.Module):
    """A stem, a residual branch, a batch-norm that reads their sum and a convolution that reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.reader = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        self.out = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        return self.out(torch.relu(self.reader(x)) + self.reader2(x)) if hasattr(self, "reader2") else self._tail(x)

    def _tail(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.reader(torch.relu(self.norm(x)))))
