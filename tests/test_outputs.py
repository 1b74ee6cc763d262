"""Where results cannot be written, commands say so before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onp.attacks.__main__ import AttackConfig, attack
from onp.bench.detect import DetectBenchConfig, run_detect_bench
from onp.bench.engine import EngineBenchConfig, run_engine_bench
from onp.bench.networks import NetworksConfig, run_networks
from onp.bench.relearn import RelearnConfig, run_relearn
from onp.bench.terms import TermsConfig, run_terms
from onp.checkpoints import write_json
from onp.commands import check_output
from onp.detect import DetectConfig, detect
from onp.errors import ConfigError
from onp.graph_command import GraphCommandConfig, draw
from onp.zoo import ZooConfig, zoo

NOWHERE = Path("nowhere.json")
"""an input that is not there: to look at it would be another error"""


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("job", "options"),
    [
        (detect, lambda path: DetectConfig(checkpoint=NOWHERE, json=path)),
        (detect, lambda path: DetectConfig(checkpoint=NOWHERE, html=path)),
        (detect, lambda path: DetectConfig(checkpoint=NOWHERE, triggers=path)),
        (draw, lambda path: GraphCommandConfig(checkpoint=NOWHERE, out=path)),
        (attack, lambda path: AttackConfig(model="unknown", out=path)),
        (zoo, lambda path: ZooConfig("make", ("digits-small_cnn-badnets",), root=path)),
        (zoo, lambda path: ZooConfig("export", ("digits-small_cnn-badnets",), out=path)),
        (run_detect_bench, lambda path: DetectBenchConfig(models=(NOWHERE,), out=path)),
        (run_relearn, lambda path: RelearnConfig(runs=(NOWHERE,), out=path)),
        (run_networks, lambda path: NetworksConfig(networks=("unknown",), json=path)),
        (run_engine_bench, lambda path: EngineBenchConfig(networks=("unknown",), json=path)),
    ],
)
def test_no_work_is_lost(occupied: Path, job: Callable[[Any], Any], options: Callable[[Path], Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--\w+ .*file/below is no (file|folder) that can be written"):
        job(options(occupied / "below"))
    assert occupied.read_text() == "mine" and len(list(occupied.parent.iterdir())) == 1


def test_correlations_of_terms(occupied: Path) -> None:
    suite = occupied.parent / "suite.json"
    suite.write_text('[{"name": "a", "model": "unknown", "checkpoint": "a", "trigger": "a", "data": "digits"}]')
    with pytest.raises(ConfigError, match="--json .*file/below is no file"):
        run_terms(TermsConfig(models=(suite,), json=occupied / "below"))


def test_what_may_be_written(occupied: Path) -> None:
    check_output(occupied, "--json")
    check_output(occupied.parent / "new" / "deeper" / "file.json", "--json")
    check_output(occupied.parent, "--out", folder=True)
    check_output(occupied.parent / "new", "--out", folder=True)
    check_output(Path("file.json"), "--json")
    for path, folder in ((occupied.parent, False), (occupied, True)):
        with pytest.raises(ConfigError, match=f"--out {path} is no {'folder' if folder else 'file'}"):
            check_output(path, "--out", folder)


def test_a_pipe_is_refused_and_a_link_followed(occupied: Path) -> None:
    pipe, link = occupied.parent / "pipe", occupied.parent / "link"
    os.mkfifo(pipe)
    link.symlink_to(occupied)
    with pytest.raises(ConfigError, match="--json .*pipe is no file that can be written"):
        check_output(pipe, "--json")
    write_json(check_output(link, "--json"), {})
    assert link.is_symlink() and occupied.read_text() == "{}\n"
