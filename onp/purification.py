"""The job: from a network and clean images to keep masks, by ONP and by what it is compared with.

Nothing here, or in anything imported from here, knows a trigger or a test image.
"""

from __future__ import annotations

import copy
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from stable_baselines3 import PPO
from torch import Tensor, nn

from agents.policy import blank_policy
from agents.ppo import LearningCurve, build_agent, roll_out, train_agent
from agents.search import SEARCHES
from baselines_rnp.label_detection import Evidence, check_skill, weigh
from baselines_rnp.rnp import RNPConfig, choose_threshold, run_rnp
from envs.pruning import PruningEnv
from envs.rewards import Objective
from onp.checkpoints import load_checkpoint, plain_weights, sha256
from onp.checks import check_network
from onp.clues import Clues, find_clues
from onp.config import AgentConfig, EnvConfig
from onp.data import DefenceData
from onp.engine import ActivationCache
from onp.errors import ConfigError, ModelError
from onp.graph import EDGE_FEATURES, FEATURES
from onp.journal import Journal, Values
from onp.layout import fastest_layout
from onp.masks import KeepMask, apply_mask
from onp.seeding import check_seed, restored
from onp.sources import sources_sha256
from onp.units import UnitIndex, index_units

METHODS = ("rnp", "random", "ranked", "greedy", "onp")
"""defences, in the order of the table"""
Progress = Callable[[str, int, int], None]
"""called with a method, reward evaluations used, and the budget"""
NO_EVIDENCE = "no evidence of a backdoor: left alone (--always prunes regardless)"


@dataclass(frozen=True)
class PurifyConfig:
    """Settings of the job; the same for every network."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        least = 3 * self.env.max_steps + 2 * self.agent.n_envs  # the last episode, and some to learn from
        if self.budget < least:
            raise ConfigError(
                f"--budget {self.budget}: expected at least {least} for episodes of {self.env.max_steps} steps"
            )
        if self.finalists < 1:
            raise ConfigError(f"--finalists {self.finalists}: expected at least 1")

    seed: int = 0
    """seed of everything random"""
    budget: int = 300
    """reward evaluations for each of random, ranked, greedy and onp: distinct masks scored, and sensitivity passes"""
    finalists: int = 16
    """best masks on the search half of the defence data that compete on the held-out half for being the final one"""
    always: bool = False
    """prune even where no evidence of a backdoor is found (the verdict of onp.detect)"""
    policy: Path | None = None
    """policy.safetensors of another run, of any network, for the agent to start from"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environment and reward"""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """policy and PPO"""
    rnp: RNPConfig = field(default_factory=RNPConfig)
    """the RNP baseline"""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method found, and what it took."""

    method: str
    mask: KeepMask | None
    """None where the method cannot be applied; `note` says why"""
    reward_evaluations: int = 0
    seconds: float = 0.0
    """wall time, including what the methods share (unlearned copy, recovered triggers) for each that uses it"""
    note: str = ""
    curve: LearningCurve | None = None
    agent: PPO | None = None
    rnp_values: Tensor | None = None
    """RNP's recovered mask values, (N,)"""
    network: nn.Module | None = None
    """where weights were learned on behind pruning (`onp.stages`), the network; else the mask says all"""


CLUES = 5
"""parts that clues and evidence are made of"""


class Purification:
    """One network under treatment: what the methods share, made when first needed.

    `log_dir` is for the learning's events, `journal_dir` for journals (`onp.journal`), one a method and one of clues.
    `on_clue` is called with what comes next while clues are found.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DefenceData,
        config: PurifyConfig,
        log_dir: Path | None = None,
        journal_dir: Path | None = None,
    ) -> None:
        self.on_clue: Callable[[str], None] = lambda stage: None
        self.model = model.eval().to(memory_format=fastest_layout(model, data.input_shape))
        self.config, self.log_dir, self.journal_dir = config, log_dir, journal_dir
        self.index: UnitIndex = index_units(model, data.input_shape)
        self.data = check_network(model, data)
        if config.policy is not None:
            load_checkpoint(blank_policy(config.agent, len(FEATURES), len(EDGE_FEATURES)), config.policy)
        self.search_data, self.held_out = self.data.halves(config.seed)
        self.cache = ActivationCache.of_gib(config.env.cache_gib)

    @cached_property
    def subject(self) -> str:
        """What a run depends on, as a SHA-256: network, clean images, settings, a given policy, code, threads.

        What the network makes of a few images stands for the code of its `forward`.
        """
        data, config = self.data, self.config
        settings = config.seed, config.env, config.rnp
        images = data.num_classes, data.normalise, str(data.images.device)
        structure = re.sub(" at 0x[0-9a-f]+", "", str(self.model))  # addresses differ from process to process
        policy = sha256(config.policy) if config.policy is not None else None
        about = (structure, settings, policy, images, sources_sha256(), torch.__version__, torch.get_num_threads())
        digest = hashlib.sha256(repr(about).encode())
        with torch.no_grad():
            logits = self.model(data.inputs[:8])
        tensors = {**plain_weights(self.model), "images": data.images, "labels": data.labels, "logits": logits}
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _journal(self, name: str) -> Journal:
        return Journal(self.journal_dir / name, self.subject) if self.journal_dir is not None else Journal()

    @cached_property
    def timed_clues(self) -> tuple[Clues, float]:
        """The unlearned copy and the recovered triggers, from the defence data, and the seconds they took."""
        start, journal = time.perf_counter(), self._journal("clues")
        clues = find_clues(self.model, self.data, self.config.env, self.config.seed, journal, self.on_clue)
        return clues, time.perf_counter() - start + journal.seconds

    def check(self) -> None:
        """Raise `ModelError` where there is nothing to judge, but with `config.always`."""
        if not self.config.always:
            check_skill(self.model, self.data)

    @cached_property
    def timed_evidence(self) -> tuple[Evidence, float]:
        """What the clues say about a backdoor, and the seconds that all of it took. Raises what `check` does."""
        self.check()
        clues, seconds = self.timed_clues
        start = time.perf_counter()
        evidence = weigh(self.model, self.data, clues)
        return evidence, seconds + time.perf_counter() - start

    @property
    def left_alone(self) -> bool:
        """Whether nothing is pruned, since nothing speaks for a backdoor."""
        return not self.config.always and not self.timed_evidence[0].found

    def run(self, method: str, progress: Progress = lambda method, used, budget: None) -> MethodResult:
        """Run one of `METHODS`. Where nothing speaks for a backdoor, ONP keeps every unit and no other is run."""
        if self.left_alone:
            mask = KeepMask.all_kept(self.index) if method == "onp" else None
            return MethodResult(method, mask, seconds=self.timed_evidence[1], note=NO_EVIDENCE)
        if method == "rnp":
            return self._run_rnp()
        clues, shared_seconds = self.timed_clues[0], self.timed_evidence[1]
        start, journal = time.perf_counter(), self._journal(method)
        env = PruningEnv(
            self.model, self.search_data, self.config.env, clues, index=self.index, cache=self.cache, journal=journal
        )
        report = partial(progress, method)
        curve = agent = None
        if method == "onp":
            curve, agent = self._train(env, report)
        else:
            SEARCHES[method](env, self.config.budget, self.config.seed, report)
        mask = choose_mask(env.objective, self._held_out_objective(clues), self.config.finalists)
        seconds = shared_seconds + time.perf_counter() - start + journal.seconds
        return MethodResult(method, mask, env.reward_evaluations, seconds, curve=curve, agent=agent)

    def _train(self, env: PruningEnv, report: Callable[[int, int], None]) -> tuple[LearningCurve, PPO]:
        config = self.config
        with restored():
            agent = build_agent(env, config.agent, config.seed, self.log_dir)
            if config.policy is not None:
                load_checkpoint(agent.policy, config.policy)
            # A step may cost a mask and a sensitivity pass; a part is left for an episode of the learned policy's own.
            reserve = config.env.max_steps + 2 * config.agent.n_envs - 1
            curve = train_agent(agent, config.agent, config.budget - reserve, report)
            roll_out(agent, env, config.budget)
        return curve, agent

    def _run_rnp(self) -> MethodResult:
        start, config, journal = time.perf_counter(), self.config, self._journal("rnp")

        def learn() -> Values:
            return {"values": run_rnp(self.model, self.index, self.data, config.rnp, config.seed).values}

        try:
            values = journal.recall("values", learn)["values"]
        except ModelError as error:
            return MethodResult("rnp", None, note=str(error))
        limit = config.rnp.max_accuracy_drop
        threshold, mask = choose_threshold(self.model, self.index, values, self.data, limit, self.cache)
        note = (
            f"threshold {threshold}"
            if threshold is not None
            else f"every threshold loses more than {limit:.0%} accuracy"
        )
        seconds = time.perf_counter() - start + journal.seconds
        return MethodResult("rnp", mask, 0, seconds, note, rnp_values=values)

    def _held_out_objective(self, clues: Clues) -> Objective:
        return Objective(self.model, clues, self.index, self.held_out, self.config.env.reward, cache=self.cache)


def choose_mask(search: Objective, held_out: Objective, finalists: int) -> KeepMask:
    """Of the masks scored best on the search half, the one that is best on the held-out half: the trigger-free stop.

    Keeping everything always competes. Ties go to the mask that prunes less.
    """
    ranked = sorted(search.scores.values(), key=lambda item: (-item[1].potential, item[0].units_pruned))
    candidates = [search.all_kept, *(mask for mask, _ in ranked[:finalists])]
    return max(candidates, key=lambda mask: (held_out.score(mask).potential, -mask.units_pruned))


@dataclass(frozen=True, eq=False)
class Purified:
    """A purified copy of the network, and the mask that was applied to it."""

    model: nn.Module
    mask: KeepMask
    evidence: bool
    """whether there is evidence of a backdoor: the verdict of `onp.detect`"""
    confidence: float
    """probability of a backdoor, if half of all networks had one"""
    suspect: int | None
    """class with the strongest evidence, whatever the verdict; None for an all-to-all attack"""
    result: MethodResult
    """what ONP found, and what it took"""


def purify(model: nn.Module, data: DefenceData, config: PurifyConfig | None = None) -> Purified:
    """Purify `model` (left as it is) by ONP, from clean images alone.

    Where there is no evidence of a backdoor, nothing is pruned, unless `config.always` says so. Raises `ModelError`
    where the network is damaged, or knows too little for a verdict (not with `config.always`).
    """
    purification = Purification(copy.deepcopy(model), data, config or PurifyConfig())
    result = purification.run("onp")
    assert result.mask is not None
    purified = copy.deepcopy(model).eval()
    apply_mask(purified, result.mask)
    evidence, _ = purification.timed_evidence
    return Purified(purified, result.mask, evidence.found, evidence.confidence, evidence.suspect, result)
