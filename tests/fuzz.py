"""Fuzz every reader of files that may come from a stranger: whatever is in a file, it loads or raises `OnpError`.

    python tests/fuzz.py --inputs 20000

Inputs are valid files, changed where their structure is (a header's shapes, a pickle inside an archive, a chunk with
its checksum put right, a node of a JSON tree) and then, most of them, byte by byte. Each format has a process of its
own, so that a crash is seen; what loaded and what was refused is printed, and by how much memory grew at its highest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import hypothesis
import numpy as np
import torch
from fuzz_inputs import (
    INDEX,
    KEYS,
    WEIGHTS,
    damaged,
    network,
    npy_files,
    png_files,
    pytorch_files,
    safetensors_files,
    trees,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image

from onp.attacks.triggers import load_trigger
from onp.bench.suite import read_suites
from onp.checkpoints import load_checkpoint, read_json
from onp.errors import OnpError
from onp.images import image_size, read_image
from onp.masks import KeepMask

VARIANTS = 10
"""inputs that are made of each that Hypothesis draws: itself, and damaged copies"""
MOST_GROWTH = 512
"""MiB that the largest input may cost"""


def read_weights(path: Path) -> None:
    model = network()
    try:
        load_checkpoint(model, path)
    except OnpError:
        assert all(torch.equal(value, WEIGHTS[name]) for name, value in model.state_dict().items()), "half loaded"
        raise
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def read_picture(path: Path) -> None:
    size = image_size(path)
    assert read_image(path).size == size[::-1]


def trigger_reader(name: str) -> Callable[[Path], None]:
    """Reads a specification whose file `name` is the one that is fuzzed; the others are good and beside it."""

    def read(path: Path) -> None:
        beside = {"trigger.json": json.dumps(KEYS["trigger"] | ({"pattern": "fuzzed.npy"} if name == "npy" else {}))}
        for file, text in beside.items():
            if name == "npy" and not (path.parent / file).exists():
                (path.parent / file).write_text(text)
        if not (path.parent / "mask.png").exists():
            Image.new("L", (4, 4)).save(path.parent / "mask.png")
            np.save(path.parent / "pattern.npy", np.zeros((1, 4, 4), np.float32))
        trigger = load_trigger(path if name == "json" else path.parent / "trigger.json", (1, 4, 4), 2)
        assert bool(torch.isfinite(trigger(torch.rand(3, 1, 4, 4))).all())

    return read


@dataclass(frozen=True)
class Format:
    """Inputs of one format, and what reads them."""

    name: str
    """of the file"""
    inputs: st.SearchStrategy[bytes]
    read: Callable[[Path], object]


FORMATS = {
    "safetensors": Format("fuzzed.safetensors", safetensors_files(), read_weights),
    "pth": Format("fuzzed.pth", pytorch_files(), read_weights),
    "npy": Format("fuzzed.npy", npy_files(), trigger_reader("npy")),
    "png": Format("fuzzed.png", png_files(), read_picture),
    "mask": Format("fuzzed.json", trees(KEYS["mask"]), lambda path: KeepMask.from_json(INDEX, read_json(path))),
    "trigger": Format("fuzzed.json", trees(KEYS["trigger"]), trigger_reader("json")),
    "suite": Format("fuzzed.json", trees(KEYS["suite"]), lambda path: read_suites([path])),
    "entry": Format("entry.json", trees(KEYS["entry"]), lambda path: read_suites([path.parent])),
}


def fuzz(name: str, count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Try at least `count` different inputs of a format; returns how many loaded and how many were refused.

    Anything but loading and `OnpError` is raised, with the input that led to it, which also lies in `folder`.
    """
    form, path, seen, tally = FORMATS[name], folder / FORMATS[name].name, set[bytes](), Counter[str]()

    def check(content: bytes) -> None:
        random = Random(content)  # the same for the same content, so that Hypothesis can repeat a failure
        attempt(content)
        for _ in range(VARIANTS - 1):
            attempt(damaged(content, random))

    def attempt(content: bytes) -> None:
        if content in seen:
            return
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as for a user, for whom they are no errors
                form.read(path)
            tally["loaded"] += 1
        except OnpError:
            tally["refused"] += 1
        seen.add(content)  # not where it failed: Hypothesis will repeat it

    while len(seen) < count:
        examples = max(2, min(1000, (count - len(seen)) // VARIANTS))
        limits = settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
                          suppress_health_check=list(HealthCheck))  # fmt: skip
        hypothesis.seed(seed)(limits(hypothesis.given(form.inputs)(check)))()
        seed += 1
    return tally


def main() -> int:
    """Parse the command line, and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=sorted(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--inputs", type=int, default=20_000, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.formats) > 1:
        common = ["--inputs", str(options.inputs), "--seed", str(options.seed)]
        runs = [subprocess.run([sys.executable, __file__, name, *common], check=False) for name in options.formats]
        return max(abs(run.returncode) for run in runs)
    with tempfile.TemporaryDirectory() as folder:
        (name,) = options.formats
        fuzz(name, 10, Path(folder))  # what is loaded once is loaded now
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tally = fuzz(name, options.inputs, Path(folder), options.seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{name:12} tried {sum(tally.values()):6}",
        *(f"{key} {tally[key]:6}" for key in ("loaded", "refused")),
        f"{grown:4.0f} MiB",
    )
    return 0 if grown < MOST_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
