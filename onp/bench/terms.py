"""How well each reward term, which sees clean images alone, predicts the true attack success rate over many masks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy.stats import spearmanr

from agents.search import SEARCHES
from envs.pruning import PruningEnv
from envs.rewards import TERMS
from onp.bench.suite import Suspect, read_suites
from onp.checkpoints import write_json
from onp.commands import console
from onp.errors import ConfigError
from onp.inputs import InputConfig, open_inputs
from onp.purify import Purification, PurifyConfig
from onp.report import Judge

COLUMNS = (*TERMS, "potential")


@dataclass(frozen=True)
class TermsConfig:
    """Options of `python -m onp.bench terms`."""

    models: tuple[Path, ...]
    """suites or entries, as for `onp.bench table`; clean networks are left out"""
    seed: int = 0
    """seed of everything random"""
    masks: int = 100
    """reward evaluations that each of a random and a greedy search makes masks by"""
    images: int = 500
    """test images that ASR is measured on"""
    defence_size: int = InputConfig.defence_size
    """clean images that the defender has"""
    threads: int = InputConfig.threads
    """CPU threads for PyTorch; 0 leaves its default"""
    json: Path | None = None
    """file for the correlations: per network, by term"""
    purify: PurifyConfig = field(default_factory=PurifyConfig)
    """settings of environment and reward"""


def run_terms(config: TermsConfig) -> None:
    """Spearman's rank correlation of every reward term with minus the true ASR, network by network; 1 is perfect."""
    if config.purify.seed != PurifyConfig.seed:
        raise ConfigError(f"--purify.seed {config.purify.seed}: give --seed {config.purify.seed}")
    for name in ("masks", "images"):
        if (value := getattr(config, name)) < 10:
            raise ConfigError(f"--{name} {value}: expected at least 10")
    suspects = [suspect for suspect in read_suites(config.models) if suspect.trigger is not None]
    if not suspects:
        raise ConfigError("--models: no network with a trigger; without one there is no ASR to predict")
    records = []
    table = Table(title="rank correlation with minus ASR", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("network", "masks", *COLUMNS):
        table.add_column(name.replace("_", " "), justify="left" if name == "network" else "right")
    for suspect in suspects:
        with console.status(f"{suspect.name} ..."):
            records.append(record := correlate(suspect, config))
        cells = (record[name] for name in COLUMNS)
        table.add_row(suspect.name, str(record["masks"]), *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    console.print(table)
    if config.json is not None:
        write_json(config.json, records)


def correlate(suspect: Suspect, config: TermsConfig) -> dict[str, Any]:
    """One network: `network`, `masks`, and by term its correlation, None where the term or ASR never changes."""
    values = {**vars(suspect), "seed": config.seed, "defence_size": config.defence_size, "threads": config.threads}
    trigger, name = values.pop("trigger"), values.pop("name")
    inputs = open_inputs(InputConfig(**values).resolved())
    judge = Judge(inputs, trigger)
    purification = Purification(inputs.model, inputs.defence_data(), replace(config.purify, seed=config.seed))
    clues, _ = purification.timed_clues
    data, settings = purification.search_data, config.purify.env
    env = PruningEnv(purification.model, data, settings, clues, index=purification.index, cache=purification.cache)
    for search in ("random", "greedy"):
        SEARCHES[search](env, env.reward_evaluations + config.masks, config.seed, lambda used, budget: None)
    scored = list(env.objective.scores.values())
    rates = [-(measured.asr or 0.0) for mask, _ in scored if (measured := judge(mask, config.images)) is not None]
    if len(rates) < len(scored):
        raise ConfigError(f"{suspect.data} has no test/; the terms are compared with ASR there")
    figures = {name: [score.terms[name] for _, score in scored] for name in TERMS}
    figures["potential"] = [score.potential for _, score in scored]
    varied = {name for name, column in figures.items() if len(set(column)) > 1 < len(set(rates))}
    correlations = {name: float(spearmanr(figures[name], rates)[0]) if name in varied else None for name in COLUMNS}
    return {"network": name, "masks": len(scored), **correlations}
