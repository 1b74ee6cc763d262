"""Which networks the tool can treat: what is found in each, and whether masks mean the same everywhere.

Weights are random, so that nothing has to be downloaded.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from onp.checkpoints import write_json
from onp.commands import check_output, console, print_untraced
from onp.engine import Engine
from onp.errors import ConfigError, ModelError, OnpError
from onp.export import export_onnx, require_onnx
from onp.inputs import use_threads
from onp.logits import logits_of
from onp.masks import KeepMask, apply_mask, masked
from onp.models import build_model
from onp.seeding import check_seed
from onp.shrinking import parameter_count, shrink
from onp.tracing import BATCH_NORMS
from onp.units import KINDS, UnitIndex, index_units

SIZES = {"inception_v3": 96, "vit_b_16": 224}
"""height and width of the images that a network takes, where 64 is too small"""
SHARES = (0.01, 0.2)
"""shares of the units that the masks prune"""

WIDTH = 150
"""characters that the table needs"""


@dataclass(frozen=True)
class NetworksConfig:
    """Options of `python -m onp.bench networks`."""

    networks: tuple[str, ...] = (
        *("resnet18", "resnet50", "vgg16", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
        *("densenet121", "efficientnet_b0", "googlenet", "inception_v3", "convnext_tiny", "vit_b_16"),
    )
    """torchvision's classifiers, or path/to/file.py:function (your code, which is executed)"""
    image_size: int = 64
    """height and width of the images; inception_v3 gets 96, vit_b_16 224"""
    images: int = 4
    """random images that deviations are measured on"""
    onnx: bool = True
    """also write every smaller network as ONNX and run that (needs onp[export])"""
    seed: int = 0
    """seed of weights, images and masks"""
    threads: int = 0
    """CPU threads for PyTorch; 0 leaves its default"""
    json: Path | None = None
    """file for the figures, as a list of objects; written after every network"""


@dataclass
class Row:
    """One network."""

    network: str
    image_size: int
    error: str | None = None
    """why the network cannot be treated"""
    parameters: int = 0
    units: dict[str, int] = field(default_factory=dict)
    """by kind"""
    layers: int = 0
    groups: int = 0
    """units that nothing ties count as one group each"""
    untraced: dict[str, str] = field(default_factory=dict)
    """modules without units inside, since they cannot be traced, and why"""
    index_seconds: float = 0.0
    masked_deviation: float = 0.0
    """of logits under `masked` from those after `apply_mask`, over their largest, over all masks"""
    engine_deviation: float = 0.0
    """likewise of the engine's"""
    units_pruned: int = 0
    """by the mask of whole groups that the network is made smaller by"""
    units_removed: int = 0
    """of those, the ones that are physically gone; the others stay as zeros"""
    parameters_after: int = 0
    shrunk_deviation: float = 0.0
    """of the smaller network's logits from those after `apply_mask`"""
    onnx_deviation: float | None = None
    """likewise of the ONNX model's; None where it was not made"""
    onnx_error: str | None = None


def run_networks(config: NetworksConfig) -> None:
    """Find the units of networks with random weights, and compare their logits under masks by every way there is."""
    if config.images < 1 or config.image_size < 1:
        raise ConfigError(f"--images {config.images}, --image-size {config.image_size}: expected at least 1")
    check_seed(config.seed)
    use_threads(config.threads)
    json_file = check_output(config.json, "--json") if config.json is not None else None
    if config.onnx:
        require_onnx()
    rows: list[Row] = []
    for name in config.networks:
        with console.status(f"{name} ..."):
            rows.append(_row(name, config))
        if json_file is not None:
            write_json(json_file, [asdict(row) for row in rows])
    wide = max(console.width, WIDTH)  # a file or a pipe has 80 columns otherwise
    Console(width=wide, markup=False, emoji=False).print(_table(rows))
    for row in rows:
        if error := row.error or row.onnx_error:
            console.print(f"{row.network}: {error}", soft_wrap=True, highlight=False)


def _row(name: str, config: NetworksConfig) -> Row:
    row = Row(name, SIZES.get(name, config.image_size))
    shape = (3, row.image_size, row.image_size)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        model = build_model(name, 3, 10)
        randomise(model, generator)
        start = time.perf_counter()
        index = index_units(model, shape)
        row.index_seconds = time.perf_counter() - start
        _describe(row, model, index)
        inputs = torch.rand(config.images, *shape, generator=generator)
        engine = Engine(model, index, inputs)
        for share in SHARES:
            mask = KeepMask(index, torch.rand(len(index), generator=generator) >= share)
            through_masked, through_engine = _deviations(model, engine, mask, inputs)
            row.masked_deviation = max(row.masked_deviation, through_masked)
            row.engine_deviation = max(row.engine_deviation, through_engine)
        kept = torch.rand(row.groups, generator=generator) >= SHARES[-1]
        _shrink(row, model, KeepMask(index, kept[index.groups]), inputs, config.onnx)
    except OnpError as error:
        row.error = str(error)
    return row


def _describe(row: Row, model: nn.Module, index: UnitIndex) -> None:
    row.parameters = parameter_count(model)
    row.units = {kind: sum(layer.size for layer in index if layer.kind == kind) for kind in KINDS}
    row.layers, row.groups = len(index.layers), int(index.groups.max()) + 1
    row.untraced = dict(index.untraced)
    print_untraced(index, console)


def _shrink(row: Row, model: nn.Module, mask: KeepMask, inputs: Tensor, onnx: bool) -> None:
    shrunk = shrink(model, mask, inputs)
    row.units_pruned, row.units_removed = mask.units_pruned, len(shrunk.removed)
    row.parameters_after, row.shrunk_deviation = parameter_count(shrunk.model), shrunk.deviation
    if onnx:
        apply_mask(model, mask)
        with TemporaryDirectory() as folder:
            try:
                expected = logits_of(model, inputs)
                row.onnx_deviation = export_onnx(shrunk.model, inputs, Path(folder) / "model.onnx", expected=expected)
            except ModelError as error:
                row.onnx_error = str(error)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw what starts out constant, in place, and put the network into eval mode.

    Scales of 1 (or of 1e-6), biases of 0, a head of zeros and blank batch-norm statistics would hide deviations.
    """
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            zero = not parameter.any()
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1) + (0.0 if zero else 0.5))
    for module in model.eval().modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))


@torch.no_grad()
def _deviations(model: nn.Module, engine: Engine, mask: KeepMask, inputs: Tensor) -> tuple[float, float]:
    """Largest deviations of logits, over the largest logit: through `masked` and the engine from `apply_mask`."""
    pruned = copy.deepcopy(model)
    apply_mask(pruned, mask)
    expected = pruned(inputs)
    with masked(model, mask):
        got = model(inputs)
    scale = expected.abs().max()
    first, second = ((logits - expected).abs().max() / scale for logits in (got, engine.logits(mask)))
    return float(first), float(second)


def _table(rows: list[Row]) -> Table:
    title = "networks with random weights; deviations of logits under masks of 1 % and 20 % of the units or groups"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("untraced", "index s", "masked", "engine", "removed", "M params", "shrunk", "ONNX")
    for name in ("network", "image", *(kind.rpartition("_")[2] for kind in KINDS), "groups", *columns):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for row in rows:
        name = Path(row.network).name
        if row.error is not None:
            table.add_row(name, str(row.image_size), "error")
            continue
        table.add_row(
            name, str(row.image_size), *(str(row.units[kind] or "-") for kind in KINDS), str(row.groups),
            str(len(row.untraced)), f"{row.index_seconds:.1f}", _scientific(row.masked_deviation),
            _scientific(row.engine_deviation), f"{row.units_removed / max(1, row.units_pruned):.0%}",
            f"{row.parameters / 1e6:.1f} > {row.parameters_after / 1e6:.1f}", _scientific(row.shrunk_deviation),
            "-" if row.onnx_deviation is None else _scientific(row.onnx_deviation),
        )  # fmt: skip
    return table


def _scientific(deviation: float) -> str:
    return f"{deviation:.0e}" if deviation else "0"
