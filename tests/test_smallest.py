"""Which searches go on, and which code a result is of."""

from __future__ import annotations

import sys
from math import inf
from pathlib import Path

import pytest
import torch
from toy_networks import grey_images, linear

from onp import sources
from onp.config import TriggerRecoveryConfig
from onp.trigger_recovery import MaskSearch


def test_the_promising_are_the_smallest_and_then_the_nearest_to_working() -> None:
    data = grey_images()
    model = linear(torch.zeros(6, 64))
    search = MaskSearch(model, data, TriggerRecoveryConfig(), 0, torch.arange(6))
    search.sizes = torch.tensor([inf, inf, 9.0, 2.0, inf, inf])
    search.success = torch.tensor([0.1, 0.9, 1.0, 1.0, 0.94, 0.2])
    assert search.promising(torch.arange(6), 1).tolist() == [3]
    assert search.promising(torch.arange(6), 3).tolist() == [2, 3, 4]
    assert search.promising(torch.tensor([0, 2, 5]), 2).tolist() == [2, 5], "of those searched alone"
    assert search.promising(torch.tensor([0, 2]), 3).tolist() == [0, 2]


def test_results_are_of_the_code_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sources, "PACKAGES", ("made_up",))
    digest = sources.sources_sha256.__wrapped__
    seen = {digest()}
    for name, text in (("a.py", "1"), ("a.py", "2"), ("deeper/b.py", "2"), ("c.json", "2")):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
        seen.add(digest())
    assert len(seen) == 5
    (package / "notes.txt").touch()
    assert digest() in seen
