"""The Python examples of README and docs/environment.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_networks import TinyNet

import onp
from agents.restarts import ReturnToBest
from envs.pruning import PruningEnv
from onp.clues import Clues, find_clues
from onp.config import EnvConfig, TriggerRecoveryConfig

ROOT = Path(__file__).parents[1]


def section(heading: str) -> str:
    _, found, rest = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")
    assert found
    return rest.partition("\n## ")[0]


def run_examples(text: str, **names: Any) -> dict[str, Any]:
    """What the Python examples in a text leave behind, run one after the other with the given names."""
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert codes
    for code in codes:
        exec(code, names)
    return names


def test_every_document_that_is_named_is_there() -> None:
    named = set[str]()
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        named |= set(re.findall(r"docs/\w+\.md", page.read_text()))
    assert len(named) >= 6 and all((ROOT / name).is_file() for name in named), named


@pytest.fixture
def given() -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.rand((24, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return {"model": TinyNet().eval(), "data": onp.DefenceData(images, torch.arange(24) % 3, 3)}


def test_the_environment(given: dict[str, Any]) -> None:
    left = run_examples(section("The environment in your own research"), **given)
    env = left["env"].unwrapped
    assert isinstance(env, PruningEnv) and len(env.index) == env.graph.num_nodes == 9
    assert left["agent"].num_timesteps == 64 and env.config.reward.clean_fidelity == 6
    assert left["score"] == env.objective.score(left["mask"])


def test_the_environment_further(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clues = find_clues(given["model"], given["data"], EnvConfig(recovery=TriggerRecoveryConfig(steps=2)), seed=0)
    other = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(180, 3)).eval()
    text = (ROOT / "docs" / "environment.md").read_text()
    others = {"other_model": other, "other_clues": Clues(other, clues.mask)}
    left = run_examples(text, **given, clues=clues, **others)
    env, own = left["env"].unwrapped, left["own"].unwrapped
    start = env.objective.all_kept
    assert left["mask"].units_pruned == 2 and left["score"] == env.objective.score(left["mask"])
    assert own.score.potential == pytest.approx(env.objective.score(start).potential + 0.5)
    assert left["twins"].num_envs == 4 and left["branch"].steps == 1
    assert left["again"].num_timesteps > left["agent"].num_timesteps > 0
    assert isinstance(left["again"].get_env().envs[0].env, ReturnToBest)
    assert left["moved"].policy.graph is left["other"].unwrapped.graph
    assert left["moved"].predict(left["other"].reset()[0])[0] < left["other"].action_space.n


def test_rnp(given: dict[str, Any]) -> None:
    weights = {key: value.clone() for key, value in given["model"].state_dict().items()}
    left = run_examples(section("RNP by itself"), **given)
    assert left["rnp"].values.shape == (9,) and left["chosen"].rule == left["mask"].rule == "gamma"
    assert left["threshold"] == 0.9 and 0 <= float(left["agreement"]) <= 1
    assert all(torch.equal(given["model"].state_dict()[key], value) for key, value in weights.items())
