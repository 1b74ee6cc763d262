"""The job: the same result for the same seed, one half to search and one to choose on, and the verdict before it."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents.policy import blank_policy
from agents.ppo import roll_out
from agents.search import ranked_units
from baselines_rnp.label_detection import Evidence, find_evidence
from baselines_rnp.recover import RecoverConfig
from baselines_rnp.rnp import RNPConfig
from envs.pruning import PruningEnv
from envs.rewards import Objective
from onp.checkpoints import save_weights
from onp.clues import Clues
from onp.config import (
    AgentConfig,
    DetectionConfig,
    EnvConfig,
    TriggerRecoveryConfig,
    UnlearnConfig,
    WarpRecoveryConfig,
    WaveRecoveryConfig,
)
from onp.data import DefenceData
from onp.errors import ConfigError, ModelError
from onp.graph import EDGE_FEATURES, FEATURES
from onp.masks import masked
from onp.purification import CLUES, METHODS, Purification, PurifyConfig, purify
from onp.trigger_recovery import RecoveredTrigger
from onp.untargeted_recovery import UntargetedTrigger
from onp.warp_recovery import RecoveredWarp

QUICK = PurifyConfig(
    budget=30,
    always=True,
    finalists=4,
    env=EnvConfig(
        max_steps=4,
        unlearn=UnlearnConfig(max_epochs=3, stop_on="batch", milestones=()),
        recovery=TriggerRecoveryConfig(steps=15, batch_size=4),
    ),
    agent=AgentConfig(hidden=8, n_steps=8, batch_size=4, n_epochs=1),
    rnp=RNPConfig(UnlearnConfig(max_epochs=2), RecoverConfig(epochs=2), max_accuracy_drop=0.5),
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).eval()  # fmt: skip


@pytest.fixture
def data() -> DefenceData:
    generator = torch.Generator().manual_seed(1)
    return DefenceData(torch.rand((24, 1, 8, 8), generator=generator), torch.arange(24) % 3, 3)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_deterministic_and_leave_the_network_alone(method: str, data: DefenceData) -> None:
    results = []
    for disturbance in (0, 1):
        model = network()
        weights, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
        torch.manual_seed(disturbance)  # global generators have no say
        np.random.seed(disturbance)
        results.append(Purification(model, data, QUICK).run(method))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert not any(module.training for module in model.modules())
    one, two = results
    assert one.mask is not None and two.mask is not None
    assert (one.mask.key, one.mask.order, one.note) == (two.mask.key, two.mask.order, two.note)
    assert one.method == method
    assert one.reward_evaluations == two.reward_evaluations <= (0 if method == "rnp" else QUICK.budget)
    assert one.seconds > 0
    if method == "rnp":
        assert one.rnp_values is not None and two.rnp_values is not None
        assert torch.equal(one.rnp_values, two.rnp_values)
    if method == "onp":
        assert one.agent is not None and two.agent is not None and one.curve is not None
        assert one.curve == two.curve
        parameters = [result.agent.policy.state_dict() for result in (one, two)]  # type: ignore[union-attr]
        assert all(torch.equal(parameters[0][key], parameters[1][key]) for key in parameters[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [20, 21, 30, 47])
def test_methods_stay_within_the_budget(method: str, budget: int, data: DefenceData) -> None:
    result = Purification(network(), data, replace(QUICK, budget=budget)).run(method)
    assert result.reward_evaluations <= budget
    if method == "onp":
        assert result.curve is not None and result.curve.returns
        # Learning itself goes on until only what is left for the final episode remains.
        assert result.reward_evaluations >= budget - (QUICK.env.max_steps + QUICK.agent.n_envs)


def test_the_final_episode_of_the_learned_policy_is_among_the_masks_to_choose_from(
    data: DefenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where learning ended in the middle of an episode."""
    seen: list[PruningEnv] = []
    construct = PruningEnv.__init__

    def watched(self: PruningEnv, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(PruningEnv, "__init__", watched)
    result = Purification(network(), data, replace(QUICK, budget=33)).run("onp")
    (env,) = seen
    assert result.agent is not None
    last, used = env.mask, env.reward_evaluations
    roll_out(result.agent, env)
    assert env.mask == last
    assert env.reward_evaluations == used  # it has been there before


def test_the_callers_generators_draw_on_as_before(data: DefenceData) -> None:
    draws = []
    for search in (False, True):
        purification = Purification(network(), data, QUICK)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        if search:
            purification.run("onp")
        draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert draws[0] == draws[1]


def test_what_a_run_is_about(data: DefenceData, tmp_path: Path) -> None:
    """An address in what a network says of itself is no part of it; what the policy begins with is."""

    class Activation(nn.ReLU):
        def extra_repr(self) -> str:
            return repr(lambda: None)

    def subject(config: PurifyConfig = QUICK) -> str:
        model = network()
        model[2] = Activation()  # type: ignore[index]
        return Purification(model, data, config).subject

    assert subject() == subject()
    subjects = set()
    for value in (0.0, 1.0):
        policy = blank_policy(QUICK.agent, len(FEATURES), len(EDGE_FEATURES))
        with torch.no_grad():
            policy.mlp_extractor.prior_weight.fill_(value)  # type: ignore[operator, union-attr]
        save_weights(policy, tmp_path / "policy.safetensors")
        subjects.add(subject(replace(QUICK, policy=tmp_path / "policy.safetensors")))
    assert len({*subjects, subject()}) == 3


@pytest.mark.parametrize(("settings", "word"), [({"budget": 13}, "--budget 13"), ({"finalists": 0}, "--finalists 0")])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        replace(QUICK, **settings)


@pytest.mark.parametrize("method", ["random", "greedy", "ranked", "onp"])
def test_methods_search_one_half_and_choose_on_the_other(
    method: str, data: DefenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Objective] = []
    construct = Objective.__init__

    def watched(self: Objective, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Objective, "__init__", watched)
    result = Purification(network(), data, QUICK).run(method)
    search, held_out = seen
    assert len(search.data) == len(held_out.data) == 12
    rows = {tuple(image.flatten().tolist()) for image in torch.cat([search.data.images, held_out.data.images])}
    assert len(rows) == 24  # no image is in both halves
    assert len(held_out.scores) <= QUICK.finalists + 1
    assert set(held_out.scores) <= set(search.scores)
    assert search.evaluations == result.reward_evaluations <= QUICK.budget
    assert result.mask is not None
    best = max(score.potential for _, score in held_out.scores.values())
    assert held_out.score(result.mask).potential == best


def test_purify_returns_a_pruned_copy(data: DefenceData) -> None:
    model = network()
    weights = copy.deepcopy(model.state_dict())
    done = purify(model, data, QUICK)
    assert done.model is not model
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    with torch.no_grad(), masked(model, done.mask):
        expected = model(data.inputs)
    with torch.no_grad():
        assert torch.equal(done.model(data.inputs), expected)
    assert done.result.mask is done.mask


def test_ranking_of_a_real_network_sorts_its_scores(data: DefenceData) -> None:
    torch.manual_seed(3)
    model = network()
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :3, :3] = 1
    clues = Clues(network(5), RecoveredTrigger(1, mask, torch.ones(1, 1, 8, 8), (6.0, 4.0, 9.0)))
    env = PruningEnv(model, data, EnvConfig(), clues)
    scores = env.effects["score"].tolist()
    assert [scores[unit] for unit in ranked_units(env)] == sorted(scores, reverse=True)
    assert sorted(ranked_units(env)) == list(range(len(env.index)))


# --- the verdict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "warps", "untargeted", "evidence"),
    [
        ((2.0, 20.0, 30.0), (0.9, 0.9, 0.9), 30.0, True),
        ((30.0, 30.0, 30.0), (0.9, 0.1, 0.9), 30.0, True),
        ((30.0, 30.0, 30.0), (0.9, 0.9, 0.9), 3.0, True),
        ((30.0, 30.0, 29.0), (0.9, 0.9, 0.9), 30.0, False),
    ],
)
def test_without_evidence_nothing_is_pruned_and_nothing_else_is_run(
    masks: tuple[float, ...],
    warps: tuple[float, ...],
    untargeted: float,
    evidence: bool,
    data: DefenceData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The verdict is that of `onp.detect`: a mask, a warp or an untargeted mask that stands out, or nothing."""
    mask = RecoveredTrigger(masks.index(min(masks)), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), masks)
    warp = RecoveredWarp(warps.index(min(warps)), torch.zeros(2, 8, 8), warps, agreement=1.0)
    everyone = UntargetedTrigger(mask.masks[0], mask.patterns[0], untargeted, torch.eye(3).roll(1, 1))
    given = Evidence(network(1), mask, everyone, warp, collapse=(0.1, 0.8, 0.1), clean_accuracy=0.9)
    monkeypatch.setattr("onp.purification.find_clues", lambda *_: given)
    monkeypatch.setattr("onp.purification.weigh", lambda *_: given)
    monkeypatch.setattr("onp.purification.check_skill", lambda *_: None)
    config = replace(QUICK, always=False)
    for method in METHODS:
        result = Purification(network(), data, config).run(method)
        if evidence:
            assert result.mask is not None and "--always" not in result.note
            continue
        assert (result.mask is not None) == (method == "onp")
        assert result.mask is None or result.mask.units_pruned == 0
        assert result.reward_evaluations == 0 and result.agent is None and "--always" in result.note
    assert Purification(network(), data, replace(config, always=True)).run("greedy").reward_evaluations > 0
    purified = purify(network(), data, config)
    assert (purified.evidence, purified.confidence, purified.suspect) == (evidence, given.confidence, given.suspect)
    assert (purified.mask.units_pruned > 0) <= evidence


def test_the_verdict_is_that_of_detection_and_is_journalled(data: DefenceData, tmp_path: Path) -> None:
    """With more variants of the trigger for the reward, from the same computations; asked again, from the journal."""
    env = replace(
        QUICK.env,
        recovery=TriggerRecoveryConfig(steps=20),
        warp=WarpRecoveryConfig(steps=5),
        wave=WaveRecoveryConfig(steps=5),
    )
    config = replace(QUICK, env=env, always=True)
    skilled = network()
    with torch.no_grad():
        skilled[-1].bias -= skilled(data.inputs).mean(0)  # every class is somebody's
    known = DefenceData(data.images, skilled(data.inputs).argmax(1), data.num_classes)
    detection = DetectionConfig(
        unlearn=env.unlearn, recovery=replace(env.recovery, variants=1), warp=env.warp, wave=env.wave
    )
    announced = list[str]()
    alone = find_evidence(skilled, known, detection, config.seed, announced.append)
    for journal in (None, tmp_path, tmp_path):
        purification, clues = Purification(skilled, known, config, journal_dir=journal), list[str]()
        purification.on_clue = clues.append
        evidence, seconds = purification.timed_evidence
        assert clues == announced and len(clues) == CLUES
        assert seconds > 0 and math.isfinite(min(evidence.mask.sizes))
        for name in ("mask", "warp", "wave"):
            assert getattr(evidence, name).sizes == getattr(alone, name).sizes
        assert evidence.untargeted is not None and alone.untargeted is not None and evidence.warp is not None
        assert evidence.untargeted.size == alone.untargeted.size and evidence.collapse == alone.collapse
        assert alone.warp is not None and evidence.warp.agreement == alone.warp.agreement
        assert (evidence.confidence, evidence.suspect) == (alone.confidence, alone.suspect)
    size = (tmp_path / "clues").stat().st_size
    Purification(skilled, known, config, journal_dir=tmp_path).timed_evidence  # noqa: B018
    assert (tmp_path / "clues").stat().st_size == size


def test_where_masks_are_conclusive_neither_reward_nor_verdict_has_more(
    data: DefenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = RecoveredTrigger(0, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), (2.0, 20.0, 30.0))
    monkeypatch.setattr("onp.clues.recover_trigger", lambda *_: masks)
    for name in ("onp.clues.recover_untargeted_trigger", "onp.clues.recover_warp", "onp.clues.recover_wave"):
        monkeypatch.setattr(name, None)
    purification = Purification(network(), data, QUICK)
    clues, _ = purification.timed_clues
    assert set(clues.triggers) == {"mask"} and (clues.trigger, clues.trust) == (clues.mask, 1)
    assert purification.timed_evidence[0].masks_alone and purification.timed_evidence[0].suspect == 0


def test_where_there_is_nothing_to_judge_nothing_is_pruned_but_on_demand(data: DefenceData) -> None:
    """A network that always says the same would have a trigger of no size."""
    same = network()
    with torch.no_grad():
        list(same.parameters())[-1][0] += 1e3
    with pytest.raises(ModelError, match="nothing to judge"):
        Purification(same, data, replace(QUICK, always=False)).run("onp")
    assert Purification(same, data, QUICK).run("random").mask is not None
