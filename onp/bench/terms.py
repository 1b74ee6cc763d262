"""How well each reward term, which sees clean images alone, predicts the true attack success rate over many masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from agents.search import SEARCHES
from envs.pruning import PruningEnv
from envs.rewards import TERMS
from onp.bench.suite import Suspect, read_suites
from onp.bench.table_report import terminal_table
from onp.checkpoints import write_json
from onp.commands import check_output, console
from onp.config import EnvConfig
from onp.errors import ConfigError
from onp.inputs import InputConfig, open_inputs
from onp.purification import Purification, PurifyConfig
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
    folders: tuple[str, ...] = ()
    """where data lies that the networks' files only name, as cifar10=FOLDER gtsrb=FOLDER"""
    defence_size: int = InputConfig.defence_size
    """clean images that the defender has"""
    device: str = InputConfig.device
    """cpu, cuda, cuda:1, ... or auto (cuda where there is one)"""
    threads: int = InputConfig.threads
    """CPU threads for PyTorch; 0 leaves its default"""
    json: Path | None = None
    """file for the correlations, per network and by term; written after every network"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environment and reward"""


def run_terms(config: TermsConfig) -> None:
    """Spearman's rank correlation of every reward term with minus the true ASR, network by network; 1 is perfect."""
    for name in ("masks", "images"):
        if (value := getattr(config, name)) < 10:
            raise ConfigError(f"--{name} {value}: expected at least 10")
    suspects = [suspect for suspect in read_suites(config.models, config.folders) if suspect.trigger is not None]
    if not suspects:
        raise ConfigError("--models: no network with a trigger; without one there is no ASR to predict")
    json_file = check_output(config.json, "--json") if config.json is not None else None
    records, rows = [], []
    for suspect in suspects:
        with console.status(f"{suspect.name} ..."):
            records.append(record := correlate(suspect, config))
        cells = (record[name] for name in COLUMNS)
        rows.append([suspect.name, str(record["masks"]), *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
        if json_file is not None:
            write_json(json_file, records)
    heading = ("network", "masks", *(name.rpartition("_")[2] for name in COLUMNS))
    console.print(terminal_table("Rank correlation with minus ASR", heading, rows))


def correlate(suspect: Suspect, config: TermsConfig) -> dict[str, Any]:
    """One network: `network`, `masks`, and by term its correlation, None where the term or ASR never changes."""
    common = {name: getattr(config, name) for name in ("seed", "defence_size", "device", "threads")}
    values = {**vars(suspect), **common}
    trigger, name = values.pop("trigger"), values.pop("name")
    inputs = open_inputs(InputConfig(**values).resolved())
    judge = Judge(inputs, trigger)
    purification = Purification(inputs.model, inputs.defence_data(), PurifyConfig(config.seed, env=config.env))
    clues, _ = purification.timed_clues
    data = purification.search_data
    env = PruningEnv(purification.model, data, config.env, clues, index=purification.index, cache=purification.cache)
    for search in ("random", "greedy"):
        SEARCHES[search](env, env.reward_evaluations + config.masks, config.seed, lambda used, budget: None)
    scored = list(env.objective.scores.values())
    rates = []
    for mask, _ in scored:
        measured = judge(mask, config.images)
        if measured is None or measured.asr is None:
            raise ConfigError(f"{suspect.name}: no test image is of another class than the trigger's")
        rates.append(-measured.asr)
    figures = {name: [score.terms[name] for _, score in scored] for name in TERMS}
    figures["potential"] = [score.potential for _, score in scored]
    varied = {name for name, column in figures.items() if len(set(column)) > 1 < len(set(rates))}
    correlations = {name: float(spearmanr(figures[name], rates)[0]) if name in varied else None for name in COLUMNS}
    return {"network": name, "masks": len(scored), **correlations}
