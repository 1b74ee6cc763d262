"""Does it stay purified? Networks learn on, as with a later user, and the attack is measured on the way.

The attack model: someone fine-tunes the network on a small training set, for which the run's defence images stand, and
an attacker who knows the trigger got a few triggered images, labelled as the target, into it; none at all is the
harmless case. A network that never had a backdoor learns the same beside the purified ones: faster than that is what
pruning has left behind.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onp.attacks.triggers import Trigger
from onp.bench.relearn_report import HELD, TWIN, make_tables, write_results
from onp.bench.suite import Suspect, read_suites
from onp.checkpoints import load_checkpoint, read_json, sha256, write_json
from onp.commands import check_output, console
from onp.data import DefenceData
from onp.errors import ConfigError, MisfitError
from onp.finetuning import FinetuneConfig, learn_on
from onp.inputs import InputConfig, Inputs, open_inputs
from onp.judge import meant
from onp.masks import KeepMask, apply_mask
from onp.report import LABELS, Judge
from onp.run_folder import RunFolder, patient, trigger_path
from onp.sources import sources_sha256
from onp.stages import STAGES, rows_of
from onp.units import UnitIndex, index_units


@dataclass(frozen=True)
class RelearnConfig:
    """Options of `python -m onp.bench relearn`."""

    runs: tuple[Path, ...]
    """finished run folders, or folders of such (as a table's)"""
    twins: tuple[Path, ...] = ()
    """suites or entries of networks that never had a backdoor; the first that fits a run learns beside it"""
    methods: tuple[str, ...] = ("backdoored", "rnp_oracle", "onp", "onp_held")
    """rows of the run whose networks learn on; with _held behind it, pruned units stay away"""
    triggered: tuple[int, ...] = (0, 1, 5, 10, 50)
    """triggered images, labelled as the target, among those learned from"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the learning; which images are triggered, too"""
    steps: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    """steps behind which the network is measured, besides at the beginning"""
    images: int = 500
    """test images that it is measured on"""
    out: Path = Path("relearning")
    """folder for the records, relearn.json and relearn.png; what is there is not measured again"""
    folders: tuple[str, ...] = ()
    """where data lies that the twins' files only name, as cifar10=FOLDER gtsrb=FOLDER"""
    training: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(learning_rate=0.01, frozen=False))
    """how the networks learn on, from as many images as the defender has"""


def run_relearn(config: RelearnConfig) -> None:
    """Attack success rate of purified networks that learn on, along the steps. The same command goes on."""
    _check(config)
    out = check_output(config.out, "--out", folder=True)
    twins, records = read_suites(config.twins, config.folders) if config.twins else [], []
    for folder in find_runs(config.runs):
        subject = Subject(folder, twins)
        if twins and subject.twin is None:
            console.print(f"{folder.path.name}: none of --twins is such a network of as many classes", highlight=False)
        for method in (*config.methods, *([TWIN] if subject.twin else [])):
            for count in config.triggered:
                for seed in config.seeds:
                    path = out / folder.path.name / f"{method}-{count}-seed{seed}.json"
                    if not path.exists():
                        with console.status(f"{folder.path.name}, {path.stem} ..."):
                            write_json(path, measure_relearning(subject, method, count, seed, config))
                    records.append(record := read_json(path))
                    if record.get("subject") != subject.key(method, config):
                        raise ConfigError(f"{path} is of another network or other options; give another --out")
    write_results(out, records)
    for table in make_tables(records):
        console.print(table)
    console.print(f"Table: {out / 'relearn.md'}, {out / 'relearn.json'}, {out / 'relearn.png'}", soft_wrap=True)


def _check(config: RelearnConfig) -> None:
    for name, least in (("triggered", 0), ("steps", 1), ("seeds", 0)):
        if not (values := getattr(config, name)) or min(values) < least or len(set(values)) != len(values):
            raise ConfigError(f"--{name} {' '.join(map(str, values))}: expected different numbers from {least} on")
    known = [name for name in LABELS if name != "onp_gated"]
    if unknown := [name for name in config.methods if name.removesuffix(HELD) not in known]:
        raise ConfigError(f"--methods {' '.join(unknown)}: expected of {', '.join(known)}, perhaps with {HELD} behind")
    if config.images < 10:
        raise ConfigError(f"--images {config.images}: expected at least 10")


def find_runs(paths: tuple[Path, ...]) -> list[RunFolder]:
    """Finished runs with a trigger: the given folders, or those right inside them. Raises `ConfigError` without any."""
    reports = [found for path in paths for found in sorted([*path.glob("report.json"), *path.glob("*/report.json")])]
    folders = [RunFolder(report.parent.resolve()) for report in reports]
    folders = [folder for folder in folders if trigger_path(folder.options(), folder) is not None]
    if not folders:
        raise ConfigError(f"--runs {' '.join(map(str, paths))}: no finished run that was judged with a trigger")
    names = [folder.path.name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--runs: {', '.join(twice)} comes more than once; their records would be one")
    return folders


class Subject:
    """A finished run, and the twin that fits it, if any."""

    def __init__(self, folder: RunFolder, twins: list[Suspect]) -> None:
        options = folder.options()
        self.folder, self.trigger = folder, trigger_path(options, folder)
        self.config = patient(InputConfig.from_record(options), folder)
        self.twin = next((inputs for suspect in twins if (inputs := self._open(suspect)) is not None), None)

    def _open(self, twin: Suspect) -> Inputs | None:
        """The twin beside the run's own images; None where it is another network, or knows other classes."""
        if twin.model != self.config.model:
            return None
        try:
            return open_inputs(replace(self.config, checkpoint=twin.checkpoint, mean=twin.mean, std=twin.std))
        except MisfitError:
            return None

    @cached_property
    def own(self) -> Inputs:
        """The network that the run purified."""
        return open_inputs(self.config)

    @cached_property
    def data(self) -> DefenceData:
        """The run's defence images."""
        return self.own.defence_data()

    @cached_property
    def index(self) -> UnitIndex:
        return index_units(self.own.model, self.data.input_shape)

    @cached_property
    def judges(self) -> dict[bool, Judge]:
        """Judges of the run's networks, and, under True, of the twin; on the same images."""
        opened = {False: self.own, True: self.twin} if self.twin is not None else {False: self.own}
        return {twin: Judge(inputs, self.trigger) for twin, inputs in opened.items()}

    def key(self, method: str, config: RelearnConfig) -> str:
        """What a record depends on."""
        name = method.removesuffix(HELD)
        opened = self.twin.config if self.twin is not None and method == TWIN else self.config
        paths = (opened.checkpoint, self.trigger, self.folder.file("masks", f"{name}.json"), self.folder.weights(name))
        files = [sha256(path) for path in paths if path is not None and path.is_file()]
        return repr((files, opened, config.steps, config.images, config.training, sources_sha256(), torch.__version__))

    def learner(self, method: str) -> tuple[nn.Module, KeepMask]:
        """The network that a method left, and what of it stays pruned. Raises `ConfigError` where there is none."""
        name, kept = method.removesuffix(HELD), KeepMask.all_kept(self.index)
        network = copy.deepcopy(self.judges[method == TWIN].inputs.model)
        mask = kept if name in ("backdoored", TWIN) else self.folder.load_mask(name, self.index)
        if mask is None:
            raise ConfigError(f"{self.folder.path} has no mask of {name!r}; give --methods that it has")
        if name in rows_of(tuple(STAGES)):
            load_checkpoint(network, self.folder.weights(name))
        apply_mask(network, mask)
        return network, mask if method.endswith(HELD) else kept


def measure_relearning(
    subject: Subject, method: str, triggered: int, seed: int, config: RelearnConfig
) -> dict[str, Any]:
    """CA and ASR before and behind steps of learning, as fractions."""
    training = config.training
    taken = training.epochs * max(1, math.ceil((len(subject.data) - 1) / training.batch_size))  # no batch of one image
    if max(config.steps) > taken:
        raise ConfigError(
            f"--steps {max(config.steps)}: the training takes {taken} steps; lower it, or raise --training.epochs"
        )
    (network, mask), judge, path = subject.learner(method), subject.judges[method == TWIN], []
    data = replace(subject.data, normalise=judge.inputs.config.normalisation)
    assert judge.trigger is not None

    def watch(steps: int, network: nn.Module) -> None:
        if steps in (0, *config.steps) and (measured := judge.of(network, config.images)) is not None:
            path.append({"steps": steps, "ca": measured.ca, "asr": measured.asr})

    watch(0, network)
    if path[0]["asr"] is None:
        raise ConfigError(f"{subject.folder.path}: no test image can be triggered; all are of the target class")
    learn_on(network, mask, poisoned(data, judge.trigger, triggered, seed), training, seed, watch)
    return {
        "run": subject.folder.path.name, "method": method, "triggered": triggered, "seed": seed, "path": path,
        "subject": subject.key(method, config),
    }  # fmt: skip


def poisoned(data: DefenceData, trigger: Trigger, count: int, seed: int) -> DefenceData:
    """The same images, `count` of them with the trigger and the class that it is meant to give.

    Drawn with `seed` from those of other classes; raises `ConfigError` where there are not as many.
    """
    goals = meant(data.labels, trigger.target, data.num_classes)
    others = (goals != data.labels).nonzero().flatten()
    if count > len(others):
        raise ConfigError(f"--triggered {count}: only {len(others)} images are of another class than the target")
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = others[drawn.to(others.device)]
    images, labels = data.images.clone(), data.labels.clone()
    images[chosen] = trigger(images[chosen].cpu()).to(images.device)
    labels[chosen] = goals[chosen]
    return replace(data, images=images, labels=labels)
