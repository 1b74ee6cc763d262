"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_networks import TinyNet

import onp
from envs.pruning import PruningEnv

README = (Path(__file__).parents[1] / "README.md").read_text()


def examples(heading: str, **names: Any) -> dict[str, Any]:
    """What the Python examples below a heading leave behind, run one after the other with the given names."""
    _, found, rest = README.partition(f"\n## {heading}\n")
    codes = re.findall(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)
    assert found and codes
    for code in codes:
        exec(code, names)
    return names


def test_every_document_that_is_named_is_there() -> None:
    root, named = Path(__file__).parents[1], set[str]()
    for page in [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]:
        named |= set(re.findall(r"docs/\w+\.md", page.read_text()))
    assert len(named) >= 6 and all((root / name).is_file() for name in named), named


@pytest.fixture
def given() -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.rand((24, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return {"model": TinyNet().eval(), "data": onp.DefenceData(images, torch.arange(24) % 3, 3)}


def test_the_environment(given: dict[str, Any]) -> None:
    left = examples("The environment in your own research", **given)
    env = left["env"].unwrapped
    assert isinstance(env, PruningEnv) and len(env.index) == env.graph.num_nodes == 9
    assert left["agent"].num_timesteps == 64 and env.config.reward.clean_fidelity == 6
    assert left["score"] == env.objective.score(left["mask"])


def test_rnp(given: dict[str, Any]) -> None:
    weights = {key: value.clone() for key, value in given["model"].state_dict().items()}
    left = examples("RNP by itself", **given)
    assert left["rnp"].values.shape == (9,) and left["chosen"].rule == left["mask"].rule == "gamma"
    assert left["threshold"] == 0.9 and 0 <= float(left["agreement"]) <= 1
    assert all(torch.equal(given["model"].state_dict()[key], value) for key, value in weights.items())
