"""The evaluation engine against plain forward passes, side by side in one process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agents.ppo import build_agent
from envs.pruning import PruningEnv
from onp import load_defence_data
from onp.checkpoints import load_checkpoint, write_json
from onp.clues import Clues, find_clues
from onp.commands import check_output, console, release_freed_memory
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.engine import ActivationCache, Engine
from onp.errors import ConfigError
from onp.inputs import torch_device, use_threads
from onp.masks import KeepMask, masked
from onp.models import build_model
from onp.seeding import check_seed
from onp.trigger_recovery import RecoveredTrigger
from onp.units import index_units

SHAPE = (3, 32, 32)
NAIVE_BATCHES = (50, 125, 500)
Sequence = Literal["ppo", "added", "random"]


@dataclass(frozen=True)
class EngineBenchConfig:
    """Options of `python -m onp.bench engine`."""

    networks: tuple[str, ...] = ("wide_resnet16_1", "small_vgg", "cifar_resnet18")
    """registered networks, with random weights"""
    checkpoint: Path | None = None
    """weights for the network, where there is only one"""
    data: Path | None = None
    """folder of 32 x 32 images (train/CLASS/IMAGE) to evaluate on and find clues with; without it both are made up"""
    images: int = 500
    """how many images"""
    masks: int = 48
    """masks per sequence"""
    threads: int = 2
    """CPU threads"""
    devices: tuple[Literal["cpu", "cuda"], ...] = ()
    """where to measure; by default on the CPU, and on a GPU where there is one"""
    cache_gib: float = EnvConfig.cache_gib
    """memory bound of the engine, GiB"""
    seed: int = 0
    """seed of weights, images and masks"""
    json: Path | None = None
    """file for the figures, as a list of objects"""


@dataclass
class Row:
    """One network under one sequence of masks."""

    network: str
    device: str
    sequence: Sequence
    naive_per_second: float
    engine_per_second: float
    ratio: float
    remembered_per_second: float
    """evaluations of masks seen before, answered from memory; no part of the ratio"""
    largest_relative_deviation: float
    """of the loss, from the plain network's"""
    peak_bytes: int
    """what the engine's use added to the process's memory (to the device's, on a GPU)"""


def run_engine_bench(config: EngineBenchConfig) -> None:
    """Time the evaluation engine and plain forward passes side by side, over masks as PPO asks for them and others."""
    check_seed(config.seed)
    use_threads(config.threads)
    for name in ("images", "masks"):
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1")
    if config.checkpoint is not None and len(config.networks) != 1:
        raise ConfigError(
            f"--checkpoint {config.checkpoint} fits one network; give one in --networks, not {config.networks}"
        )
    json_file = check_output(config.json, "--json") if config.json is not None else None
    devices = [torch_device(name) for name in config.devices or ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]
    rows: list[Row] = []
    for name, device in product(config.networks, devices):
        torch.manual_seed(config.seed)
        model = build_model(name, SHAPE[0], 10).eval()
        if config.checkpoint is not None:
            load_checkpoint(model, config.checkpoint)
        model.to(device)
        data = _data(config).to(device)
        clues = (
            _made_up_clues(model, data) if config.data is None else find_clues(model, data, EnvConfig(), config.seed)
        )
        bench = _Bench(name, model, data, clues, config)
        rows += bench.rows()
        console.print(_table(rows[-3:], f"{name}, {config.images} images, {config.threads} threads, {device}"))
        bench.report_costs()
    if json_file is not None:
        write_json(json_file, [asdict(row) for row in rows])


class _Bench:
    """One network with its images."""

    def __init__(self, name: str, model: nn.Module, data: DefenceData, clues: Clues, config: EngineBenchConfig) -> None:
        self.name, self.model, self.data, self.clues, self.config = name, model, data, clues, config
        self.images = data.inputs
        self.index = index_units(model, SHAPE)
        whole = KeepMask.all_kept(self.index)
        self.batch = min(
            NAIVE_BATCHES, key=lambda size: min(self.seconds(lambda: self.naive(whole, size)) for _ in range(2))
        )

    def seconds(self, job: Callable[[], object]) -> float:
        start = time.perf_counter()
        job()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def naive(self, mask: KeepMask, batch: int | None = None) -> Tensor:
        """Logits by plain forward passes."""
        with torch.inference_mode(), masked(self.model, mask):
            return torch.cat([self.model(part) for part in self.images.split(batch or self.batch)])

    def engine(self, images: int | None = None) -> Engine:
        """A fresh engine, which has seen the unpruned network."""
        return Engine(self.model, self.index, self.images[:images], ActivationCache.of_gib(self.config.cache_gib))

    def rows(self) -> list[Row]:
        episodes, self.outside = self.record()
        generator = np.random.default_rng(self.config.seed)
        spaced = np.linspace(0, len(self.index) - 1, self.config.masks).astype(int)
        added = KeepMask.all_kept(self.index).without(generator.permutation(spaced).tolist()).path()[1:]
        whole = KeepMask.all_kept(self.index)
        random = [
            whole.without(generator.choice(len(self.index), 16, False).tolist()) for _ in range(self.config.masks)
        ]
        return [self.row("ppo", episodes), self.row("added", added), self.row("random", random)]

    def row(self, sequence: Sequence, masks: list[KeepMask]) -> Row:
        """Every mask through the engine, and every sixth through the plain network in between.

        That is the second time. The first shows the memory used, which only later comes without page faults, as it does
        in any run of some hundred masks.
        """
        with _peak_memory(self.images.device) as peak:
            engine = self.engine()
            for mask in masks:
                engine.logits(mask)
        engine, deviation = self.engine(), 0.0
        fast, slow, seen = list[float](), list[float](), set[KeepMask]()
        for mask in masks:
            if mask in seen:
                engine.touch(mask)  # answered from memory
                continue
            seen.add(mask)
            fast.append(self.seconds(partial(engine.logits, mask)))
            if len(seen) % 6 == 1:
                slow.append(self.seconds(partial(self.naive, mask)))
                pair = [self.loss(engine.logits(mask)), self.loss(self.naive(mask))]
                deviation = max(deviation, abs(pair[0] / pair[1] - 1))
        engine.logits(masks[-1])
        remembered = self.seconds(partial(engine.logits, masks[-1]))
        naive, quick = 1 / float(np.mean(slow)), 1 / float(np.mean(fast))
        device = self.images.device.type
        return Row(self.name, device, sequence, naive, quick, quick / naive, 1 / remembered, deviation, peak[0])

    def loss(self, logits: Tensor) -> float:
        return float(self.data.cross_entropy(logits.double()))

    def report_costs(self) -> None:
        """How the engine's cost grows with depth, images and masks, and what PPO costs besides."""
        naive = min(self.seconds(lambda: self.naive(KeepMask.all_kept(self.index))) for _ in range(3))
        whole, layers = KeepMask.all_kept(self.index), self.index.layers
        depths = [layers[round(part * (len(layers) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]
        engine = self.engine()
        table = Table(
            title=f"{self.name}: cost of one mask, in plain evaluations of {len(self.images)} images ({naive:.3f} s)"
        )
        table.add_column("what")
        table.add_column("cost", justify="right")

        def cost(engine: Engine, units: list[int]) -> float:
            masks = [whole.without([unit]) for unit in units]
            return self.seconds(lambda: [engine.logits(mask) for mask in masks]) / naive

        for layer in depths:
            table.add_row(f"one unit of {layer.name}", f"{cost(engine, [*layer.units[:3]]) / 3:.3f}")
        middle = depths[2]
        for images in (len(self.images) // 4, len(self.images) // 2, len(self.images)):
            part = self.engine(images)
            table.add_row(f"one unit of {middle.name}, {images} images", f"{cost(part, [*middle.units[:3]]) / 3:.3f}")
        for start, count in ((3, 1), (4, 4), (8, 16)):
            units = [middle.units[(start + i) % middle.size] for i in range(count)]
            table.add_row(f"{count} masks, one unit of {middle.name} each", f"{cost(engine, units):.3f}")
        effects = self.seconds(
            lambda: engine.effects(whole, lambda logits: logits.square().mean(), EnvConfig().effect_images)
        )
        images = min(EnvConfig().effect_images, len(self.images))
        table.add_row(f"first-order effects of all units, {images} images", f"{effects / naive:.3f}")
        table.add_row("PPO outside the engine, per step", f"{self.outside / naive:.3f}")
        with FlopCounterMode(display=False) as counter:
            self.naive(whole)
        work, size = counter.get_total_flops() / 2, 2048
        square = torch.rand(size, size, device=self.images.device)
        block = torch.rand(1 << 26, device=self.images.device)
        rate = size**3 / min(self.seconds(lambda: square @ square) for _ in range(5))
        copied = 2 * block.nbytes / min(self.seconds(block.clone) for _ in range(5))
        table.add_section()
        table.add_row("multiply-adds of a plain evaluation", f"{work / 1e9:.1f} G")
        table.add_row("the same per second", f"{work / naive / 1e9:.0f} G")
        table.add_row("multiply-adds per second of a matrix product", f"{rate / 1e9:.0f} G")
        table.add_row("activations kept for one mask", f"{engine.one_mask / 1e6:.0f} MB")
        table.add_row("bytes per second of a copy, read and written", f"{copied / 1e9:.1f} GB")
        console.print(table)

    def record(self) -> tuple[list[KeepMask], float]:
        """Masks in the order in which PPO asks for them, some repeatedly, and its seconds per step outside the engine.

        On random images a few are enough: which masks are asked for depends on them, what they cost elsewhere does not.
        """
        few = self.data if self.config.data else self.data.subset(torch.arange(min(32, len(self.data))))
        env = PruningEnv(self.model, few, EnvConfig(), self.clues, index=self.index)
        inside, asked = 0.0, list[KeepMask]()

        def timed(job: Callable[[KeepMask], Any]) -> Callable[[KeepMask], Any]:
            def run(mask: KeepMask) -> Any:
                nonlocal inside
                asked.append(mask)
                start = time.perf_counter()
                found = job(mask)
                inside += time.perf_counter() - start
                return found

            return run

        objective: Any = env.objective
        objective.score, objective.effects = timed(objective.score), timed(objective.effects)
        agent = build_agent(env, AgentConfig(), self.config.seed)
        start, steps = time.perf_counter(), 0
        while len(env.objective.scores) <= self.config.masks and steps < 100 * self.config.masks:
            agent.learn(agent.n_steps, reset_num_timesteps=False)
            steps += agent.n_steps
        outside = (time.perf_counter() - start - inside) / steps
        return asked, outside


def _data(config: EngineBenchConfig) -> DefenceData:
    if config.data is not None:
        return load_defence_data(config.data, size=config.images, seed=config.seed)
    labels = torch.arange(config.images) % 10
    return DefenceData(torch.rand(config.images, *SHAPE), labels, 10)


def _made_up_clues(model: nn.Module, data: DefenceData) -> Clues:
    patch = torch.zeros(1, 1, *SHAPE[1:], device=data.images.device)
    patch[..., -3:, -3:] = 1
    return Clues(model, RecoveredTrigger(0, patch, torch.rand_like(data.images[:1]), (1.0, 9.0)))


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Fills its list with the bytes by which memory in use grew at the most inside the block."""
    gc.collect()  # an agent and its environment refer to each other, and hold activations
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    release_freed_memory()
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for heading in ("masks", "plain /s", "engine /s", "ratio", "from memory /s", "loss deviates", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "masks" else "right")
    for row in rows:
        table.add_row(
            row.sequence,
            f"{row.naive_per_second:.2f}",
            f"{row.engine_per_second:.2f}",
            f"{row.ratio:.1f}",
            f"{row.remembered_per_second:.0f}",
            f"{row.largest_relative_deviation:.0e}",
            f"{row.peak_bytes / 2**20:.0f}",
        )
    return table
