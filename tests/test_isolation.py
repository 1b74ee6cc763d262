"""The defending path never loads what makes triggers: `onp.attacks` is for test models and for judging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
"""
PURIFY = """
import runpy, torch
from onp.config import EnvConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.data import DefenceData
from onp.finetuning import finetune
from onp.purification import METHODS, Purification, PurifyConfig, purify

torch.manual_seed(0)
network = runpy.run_path("network.py")["tiny"]()
data = DefenceData(torch.rand(12, 3, 8, 8), torch.arange(12) % 3, 3)
env = EnvConfig(max_steps=2, unlearn=UnlearnConfig(max_epochs=1), recovery=TriggerRecoveryConfig(steps=2))
config = PurifyConfig(budget=24, env=env, always=True)
purified = purify(network, data, config)
report("result", purified.result.reward_evaluations)
report("finetuned", len(finetune(purified.model, purified.mask, data).state_dict()))
report("results", [Purification(network, data, config).run(method).reward_evaluations for method in METHODS])
"""
COMMAND = """
import runpy, sys

sys.argv = ["{module}", *{arguments}]
try:
    runpy.run_module("{module}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    report("code", stop.code)
"""
REPORT = """
import json, sys

def report(name, value):
    with open("modules.jsonl", "a") as file:
        modules = sorted(module for module in sys.modules if module.split(".")[0] == "onp")
        file.write(json.dumps([name, value, modules]) + "\\n")
"""


def loaded_by(folder: Path, script: str) -> dict[str, tuple[object, set[str]]]:
    """For every `report(name, value)` of a script in a process of its own, the value and our modules loaded by then."""
    (folder / "modules.jsonl").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", REPORT + script], cwd=folder,
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = map(json.loads, (folder / "modules.jsonl").read_text().splitlines())
    return {name: (value, set(modules)) for name, value, modules in records}


def attacks(modules: set[str]) -> set[str]:
    return {name for name in modules if name in ("onp.attacks", "onp.zoo") or name.startswith("onp.attacks.")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny network, a tiny image folder and a trigger."""
    (tmp_path / "network.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    labels = torch.arange(12) % 3
    images = torch.randint(100, (12, 3, 8, 8), dtype=torch.uint8)
    images[torch.arange(12), labels] += 150  # a class is a colour
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images / 255), labels).backward()
        optimizer.step()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    for split in ("train", "test"):
        for number, image in enumerate(images):
            path = tmp_path / "images" / split / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "patch.png")
    (tmp_path / "trigger.json").write_text('{"target": 1, "mode": "add", "pattern": "patch.png"}')
    return tmp_path


def command(*extra: str) -> str:
    small = {"--budget": 24, "--env.max-steps": 2, "--env.recovery.steps": 2, "--env.unlearn.max-epochs": 1}
    files = {"--model": "network.py:tiny", "--checkpoint": "weights.safetensors", "--data": "images"}
    options = {**files, "--defence-size": 9, **small, "--threads": 1, "--run-dir": "run"}
    return COMMAND.format(
        module="onp.train",
        arguments=[*(str(part) for option in options.items() for part in option), "--always", *extra],
    )


def test_defending_never_imports_the_attacks(folder: Path) -> None:
    loaded = loaded_by(folder, PURIFY + command("--stages", "finetune", "removal"))
    for name in ("result", "finetuned", "results"):
        modules = loaded[name][1]
        assert {"onp.purification", "onp.units", "onp.trigger_recovery"} <= modules, "nothing was run"
        assert attacks(modules) == set()
        assert not modules & {"onp.judge", "onp.report"}, "the defending path imports what sees test images"
    code, modules = loaded["code"]
    assert code == 0 and (folder / "run" / "report.json").is_file()
    assert (folder / "run" / "stages" / "rnp_removal.safetensors").is_file()
    assert {"onp.judge", "onp.report"} <= modules
    assert attacks(modules) == set()


def test_detecting_never_imports_the_attacks(folder: Path) -> None:
    small = ("recovery.steps", "warp.steps", "wave.steps", "unlearn.max-epochs")
    options = {
        "--model": "network.py:tiny", "--checkpoint": "weights.safetensors", "--data": "images", "--defence-size": "9",
        "--samples": "images/test", "--html": "page.html", **{f"--detection.{name}": "2" for name in small},
    }  # fmt: skip
    arguments = [part for option in options.items() for part in option]
    code, modules = loaded_by(folder, COMMAND.format(module="onp.detect", arguments=arguments))["code"]
    assert code in (0, 3) and (folder / "page.html").is_file()
    assert {"onp.warp_recovery", "onp.wave_recovery", "onp.detect_page"} <= modules
    assert attacks(modules) == set()
    assert not modules & {"onp.judge", "onp.report"}


def test_the_check_would_notice(folder: Path) -> None:
    """Negative controls: a direct import, and the same command with a trigger to judge with."""
    loaded = loaded_by(folder, "import onp.attacks\nreport('import', 0)\n" + command("--trigger", "trigger.json"))
    assert attacks(loaded["import"][1]) == {"onp.attacks"}
    code, modules = loaded["code"]
    assert code == 0
    assert "onp.attacks.triggers" in attacks(modules)
