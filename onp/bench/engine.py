"""The evaluation engine against plain forward passes, side by side in one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from agents.ppo import build_agent
from envs.pruning import PruningEnv
from envs.rewards import Clues
from onp.checkpoints import load_checkpoint, write_atomically
from onp.commands import console
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.engine import ActivationCache, Engine
from onp.errors import ConfigError
from onp.masks import KeepMask, masked
from onp.models import build_model
from onp.trigger_recovery import RecoveredTrigger
from onp.units import UnitIndex, index_units

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
    images: int = 500
    """random images of 3 x 32 x 32"""
    masks: int = 48
    """masks per sequence"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """cpu or cuda"""
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
    torch.set_num_threads(config.threads)
    if config.checkpoint is not None and len(config.networks) != 1:
        raise ConfigError(
            f"--checkpoint {config.checkpoint} fits one network; give one in --networks, not {config.networks}"
        )
    device = torch.device(config.device)
    rows: list[Row] = []
    for name in config.networks:
        torch.manual_seed(config.seed)
        model = build_model(name, SHAPE[0], 10).eval()
        if config.checkpoint is not None:
            load_checkpoint(model, config.checkpoint)
        bench = _Bench(name, model.to(device), torch.rand(config.images, *SHAPE, device=device), config)
        rows += bench.rows()
        console.print(_table(rows[-3:], f"{name}, {config.images} images, {config.threads} threads, {device}"))
        bench.report_costs()
    if config.json is not None:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        write_atomically(config.json, lambda temporary: temporary.write_text(text))


class _Bench:
    """One network with its images."""

    def __init__(self, name: str, model: nn.Module, images: Tensor, config: EngineBenchConfig) -> None:
        self.name, self.model, self.images, self.config = name, model, images, config
        self.index = index_units(model, SHAPE)
        self.labels = torch.randint(10, (len(images),), generator=torch.Generator().manual_seed(1)).to(images.device)
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
        """A fresh engine that has seen the unpruned network."""
        engine = Engine(self.model, self.index, self.images[:images], ActivationCache.of_gib(self.config.cache_gib))
        return engine

    def rows(self) -> list[Row]:
        episodes, self.outside = _record(self.model, self.index, self.images[:32], self.labels[:32], self.config)
        generator = np.random.default_rng(self.config.seed)
        spaced = np.linspace(0, len(self.index) - 1, self.config.masks).astype(int)
        added = KeepMask.all_kept(self.index).without(generator.permutation(spaced).tolist()).path()[1:]
        whole = KeepMask.all_kept(self.index)
        random = [
            whole.without(generator.choice(len(self.index), 16, False).tolist()) for _ in range(self.config.masks)
        ]
        return [self.row("ppo", episodes), self.row("added", added), self.row("random", random)]

    def row(self, sequence: Sequence, masks: list[KeepMask]) -> Row:
        """Every mask through the engine, and every sixth through the plain network in between."""
        deviation, fast, slow = 0.0, [], []
        with _peak_memory(self.images.device) as peak:
            engine = self.engine()
            for i, mask in enumerate(masks):
                fast.append(self.seconds(lambda mask=mask: engine.logits(mask)))  # type: ignore[misc]
                if i % 6 == 0:
                    slow.append(self.seconds(lambda mask=mask: self.naive(mask)))  # type: ignore[misc]
                    losses = [
                        float(F.cross_entropy(logits, self.labels))
                        for logits in (engine.logits(mask), self.naive(mask))
                    ]
                    deviation = max(deviation, abs(losses[0] / losses[1] - 1))
        remembered = self.seconds(lambda: engine.logits(masks[-1]))
        naive, quick = 1 / float(np.mean(slow)), 1 / float(np.mean(fast))
        return Row(self.name, sequence, naive, quick, quick / naive, 1 / remembered, deviation, peak[0])

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
        for layer in depths:
            costs = [self.seconds(lambda unit=unit: engine.logits(whole.without([unit]))) for unit in layer.units[:3]]  # type: ignore[misc]
            table.add_row(f"one unit of {layer.name}", f"{np.mean(costs) / naive:.3f}")
        unit = depths[2].offset
        for images in (len(self.images) // 4, len(self.images) // 2, len(self.images)):
            part = self.engine(images)
            table.add_row(
                f"one unit of {depths[2].name}, {images} images",
                f"{self.seconds(lambda part=part: part.logits(whole.without([unit]))) / naive:.3f}",  # type: ignore[misc]
            )
        for count in (1, 4, 16):
            masks = [whole.without([depths[2].offset + 3 + count + i]) for i in range(count)]
            cost = self.seconds(lambda masks=masks: [engine.logits(mask) for mask in masks]) / naive  # type: ignore[misc]
            table.add_row(f"{count} masks, one unit of {depths[2].name} each", f"{cost:.3f}")
        effects = self.seconds(
            lambda: engine.effects(whole, lambda logits: logits.square().mean(), EnvConfig().effect_images)
        )
        table.add_row(f"first-order effects of all units, {EnvConfig().effect_images} images", f"{effects / naive:.3f}")
        table.add_row("PPO outside the engine, per step", f"{self.outside / naive:.3f}")
        console.print(table)


def _record(
    model: nn.Module, index: UnitIndex, images: Tensor, labels: Tensor, config: EngineBenchConfig
) -> tuple[list[KeepMask], float]:
    """Masks in the order in which PPO asks for them, and PPO's seconds per step outside the engine.

    A few images are enough: which masks are asked for depends on them, what they cost elsewhere does not.
    """
    generator = torch.Generator().manual_seed(config.seed)
    patch = torch.zeros(1, *SHAPE[1:], device=images.device)
    patch[:, -3:, -3:] = 1
    clues = Clues(
        model, RecoveredTrigger(0, patch, torch.rand(SHAPE, generator=generator).to(images.device), (1.0, 9.0))
    )
    env = PruningEnv(model, DefenceData(images, labels, 10), EnvConfig(), clues, index=index)
    inside = 0.0

    def timed(job: Callable[[KeepMask], object]) -> Callable[[KeepMask], object]:
        def run(mask: KeepMask) -> object:
            nonlocal inside
            start = time.perf_counter()
            found = job(mask)
            inside += time.perf_counter() - start
            return found

        return run

    env.objective.score, env.objective.effects = timed(env.objective.score), timed(env.objective.effects)  # type: ignore
    agent = build_agent(env, AgentConfig(), config.seed)
    start, steps = time.perf_counter(), 0
    while len(env.objective.scores) <= config.masks and steps < 100 * config.masks:
        agent.learn(agent.n_steps, reset_num_timesteps=False)
        steps += agent.n_steps
    outside = (time.perf_counter() - start - inside) / steps
    return [mask for mask, _ in env.objective.scores.values()][1 : config.masks + 1], outside


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Fills its list with the bytes by which memory in use grew at the most inside the block."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
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
