"""The command behind `python -m onp.graph`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

from baselines_rnp.unlearn import unlearn
from onp.checkpoints import write_atomically
from onp.checks import check_network
from onp.commands import check_output, console, print_untraced, run_command
from onp.config import EnvConfig, UnlearnConfig
from onp.drawing import draw_graph
from onp.engine import Engine
from onp.errors import ConfigError
from onp.graph import GraphConfig, build_graph, to_networkx
from onp.inputs import InputConfig, open_inputs
from onp.masks import KeepMask
from onp.units import index_units


@dataclass(frozen=True)
class GraphCommandConfig(InputConfig):
    """Options of `python -m onp.graph`."""

    out: Path = Path("graph")
    """folder for graph.png and graph.graphml"""
    mask: Path | None = None
    """keep mask of a run (masks/METHOD.json), whose pruned units are ringed"""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """what becomes an edge"""
    unlearn: UnlearnConfig = field(default_factory=lambda: EnvConfig().unlearn)
    """how the unlearned copy is made, whose weight change colours the units"""


def draw(config: GraphCommandConfig) -> None:
    """Draw a network's unit graph (PNG) and write it as GraphML."""
    if config.checkpoint is None:
        raise ConfigError("no --checkpoint: give the weights of the network to draw")
    out = check_output(config.out, "--out", folder=True)
    inputs = open_inputs(config.resolved())
    data = inputs.defence_data()
    index = index_units(inputs.model, data.input_shape)
    print_untraced(index, console)
    check_network(inputs.model, data)
    pruned = set(KeepMask.load(index, config.mask).pruned) if config.mask else set()
    unlearned = unlearn(inputs.model, data, config.unlearn, config.seed).model
    engine = Engine(inputs.model, index, data.inputs)
    effects = {"clean_loss": engine.effects(KeepMask.all_kept(index), data.cross_entropy).sum(0)}
    graph = to_networkx(build_graph(index, inputs.model, data.inputs, unlearned, effects, config.graph), index)
    write_atomically(out / "graph.graphml", lambda temporary: nx.write_graphml(graph, temporary))
    write_atomically(out / "graph.png", lambda temporary: draw_graph(graph, temporary, pruned))
    console.print(f"{len(index)} units in {len(index.layers)} layers, {graph.number_of_edges()} edges")
    console.print(f"{out / 'graph.png'}\n{out / 'graph.graphml'}")


def main() -> None:
    """Run the command."""
    run_command(GraphCommandConfig, draw, "onp.graph")
