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


def example(heading: str, **names: Any) -> dict[str, Any]:
    """What the first Python example below a heading leaves behind, run with the given names."""
    _, found, section = README.partition(f"\n## {heading}\n")
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found and code
    exec(code[1], names)
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
    env = example("The environment in your own research", **given)["env"].unwrapped
    assert isinstance(env, PruningEnv) and len(env.index) == env.graph.num_nodes == 9


def test_rnp(given: dict[str, Any]) -> None:
    weights = {key: value.clone() for key, value in given["model"].state_dict().items()}
    left = example("RNP by itself", **given)
    assert left["rnp"].values.shape == (9,) and left["chosen"].rule == left["mask"].rule == "gamma"
    assert left["threshold"] == 0.9 and 0 <= float(left["agreement"]) <= 1
    assert all(torch.equal(given["model"].state_dict()[key], value) for key, value in weights.items())
