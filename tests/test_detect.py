"""`python -m onp.detect` and `onp.bench detect`, on small networks whose backdoor is known because it was built in."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from documented import undocumented
from PIL import Image

import onp.detect
from onp.bench import __main__ as bench
from onp.commands import run_command
from onp.detect import DetectConfig, detect
from onp.images import read_image
from onp.trigger_recovery import Patch
from onp.verdict import percent

NETWORK = """
from torch import nn

def linear():
    return nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(64, 3))

def in_place():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = linear()

        def forward(self, x):
            features = self.body[1](self.body[0](x))
            features.mul_(2)  # not assigned: the traced copy has not doubled what comes next
            return self.body[2](features)
    return Doubled()

def untraceable():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = linear()

        def forward(self, x):
            return self.body(x) if x.sum() > -1 else x
    return Branch()
"""
FAST = ("--defence-size", "12", "--threads", "1")


def weights(backdoor: bool) -> dict[str, torch.Tensor]:
    """Class c is known by the brightness of rows 2 c and 2 c + 1; the backdoor is one pixel, below them, to class 2."""
    weight = torch.zeros(3, 8, 8)
    for label in range(3):
        weight[label, 2 * label : 2 * label + 2] = 0.2
    if backdoor:
        weight[2, 7, 7] = 20
    return {"0.weight": torch.ones(1, 1, 1, 1), "2.weight": weight.flatten(1), "2.bias": torch.zeros(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, some with the trigger, and networks with and without the backdoor."""
    folder = tmp_path_factory.mktemp("detect")
    (folder / "network.py").write_text(NETWORK)
    safetensors.torch.save_file(weights(True), folder / "bad.safetensors")
    safetensors.torch.save_file(weights(False), folder / "clean.safetensors")
    wrapped = {f"body.{key}": value for key, value in weights(True).items()}
    safetensors.torch.save_file(wrapped, folder / "wrapped.safetensors")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for number in range(24):
            pixels = 0.1 * torch.rand(8, 8, generator=generator)
            label = number % 3
            pixels[2 * label : 2 * label + 2] += 0.8
            pixels[6:] = 0
            save(pixels, folder / "images" / split / f"<i>{label}" / f"{number:02}.png")
            if split == "test" and label == 0:
                pixels[7, 7] = number % 2
                save(pixels, folder / "samples" / f"{('clean', 'triggered')[number % 2]}{number}.png")
    pattern, mask = torch.ones(8, 8), torch.zeros(8, 8)
    mask[7, 7] = 1
    save(pattern, folder / "pattern.png")
    save(mask, folder / "mask.png")
    spec = {"target": 2, "mode": "blend", "pattern": "pattern.png", "mask": "mask.png"}
    (folder / "trigger.json").write_text(json.dumps(spec))
    common = {"model": "network.py:linear", "data": "images"}
    suite = [
        {"name": "bad", "checkpoint": "bad.safetensors", "trigger": "trigger.json", **common},
        {"name": "clean", "checkpoint": "clean.safetensors", "trigger": None, **common},
    ]
    (folder / "suite.json").write_text(json.dumps(suite))
    return folder


def save(pixels: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(path)


def run(folder: Path, *options: str, checkpoint: str = "bad", network: str = "linear") -> tuple[int, str]:
    """Exit code and output of the command."""
    given = ("--model", f"{folder}/network.py:{network}", "--data", f"{folder}/images", *FAST)
    return call(
        lambda: run_command(DetectConfig, detect, "onp.detect"),
        "onp.detect", *given, "--checkpoint", f"{folder}/{checkpoint}.safetensors", *options,
    )  # fmt: skip


def call(job: Any, *arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", list(arguments))
        with pytest.raises(SystemExit) as stop:
            job()
    return int(stop.value.code or 0), out.getvalue()


class Page(HTMLParser):
    """What a page refers to, its tags and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = list[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_backdoor_is_evidence_towards_its_class_by_its_samples(folder: Path) -> None:
    record_file, page_file = folder / "out" / "bad.json", folder / "out" / "bad.html"
    files = ("--json", f"{record_file}", "--html", f"{page_file}", "--triggers", f"{folder}/out/triggers")
    code, out = run(folder, *files, "--samples", f"{folder}/samples")
    assert code == 3 and "Evidence of a backdoor towards class 2 (<i>2), by a mask" in out
    record = json.loads(record_file.read_text())
    assert (record["verdict"], record["target"]) == ("evidence", 2) and record["confidence"] >= 0.5
    assert not undocumented("verdict.json", record)
    assert record["masks_alone"] and "The masks say enough" in out and "Mask without a target" not in out
    assert all(row["warp"] is None for row in record["classes"]) and record["untargeted_mask"] is None
    assert "mask, pixels" in out and "warp" not in out and "wave" not in out
    assert set(record["outliers"]) == {"mask"} and record["spread"] is None
    sizes = [row["mask"] for row in record["classes"]]
    assert sizes[2] < 1 < min(sizes[:2]), "one pixel is enough"
    assert sum(row["collapse"] for row in record["classes"]) == pytest.approx(1)
    assert record["recovered"]["network"]["success"] == 1 and record["recovered"]["network"]["pixels"] == sizes[2]
    saved = {path.name: np.asarray(read_image(path))[..., 0] for path in (folder / "out" / "triggers").iterdir()}
    assert set(saved) == {f"{source}_{what}.png" for source in ("network", "unlearned") for what in ("mask", "pattern")}
    for source in ("network", "unlearned"):
        mask = saved[f"{source}_mask.png"] / 255
        assert mask.argmax() == 63 and mask.sum() == pytest.approx(record["recovered"][source]["pixels"], abs=0.1)
    scores = {Path(sample["path"]).name: sample["score"] for sample in record["samples"]}
    assert len(scores) == 8 and list(scores.values()) == sorted(scores.values(), reverse=True)
    assert [name.startswith("triggered") for name in scores] == [True] * 4 + [False] * 4
    assert all(0 <= sample["percentile"] <= 1 for sample in record["samples"])
    page = Page(page_file.read_text())
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags and "i" not in page.tags, "class names are text"
    assert "From the network (Neural Cleanse)" in page.text and "Through the unlearned copy (RNP)" in page.text
    assert "<i>2" in page.text and record["checkpoint_sha256"] in page.text
    assert not re.search(r"url\(|@import", page_file.read_text())
    assert "the masks say enough" in page.text and "agreement" not in page.text and "spread" not in page.text
    assert "smallest mask, pixels" in page.text and "smallest warp, pixels" not in page.text


def test_a_clean_network_is_no_evidence(folder: Path) -> None:
    record_file, page_file = folder / "out" / "clean.json", folder / "out" / "clean.html"
    code, out = run(folder, "--json", f"{record_file}", "--html", f"{page_file}", checkpoint="clean")
    assert code == 0 and "No evidence of a backdoor" in out and "warp, pixels" in out and "wave, norm" in out
    record = json.loads(record_file.read_text())
    assert (record["verdict"], record["target"], record["samples"]) == ("none", None, None)
    assert record["confidence"] < 0.5 and record["suspicious_units"] == []
    text = Page(page_file.read_text()).text
    assert (
        "No evidence of a backdoor" in text
        and "smallest warp, pixels" in text
        and "smallest wave, norm" in text
        and "agreement" in text
    )
    assert 0 <= record["agreement"] <= 1


@pytest.mark.parametrize(
    ("probability", "words"), [(1.0, "> 99 %"), (0.994, "99 %"), (0.5, "50 %"), (0.006, "1 %"), (1e-9, "< 1 %")]
)
def test_a_probability_is_never_certainty(probability: float, words: str) -> None:
    assert percent(probability) == words


@pytest.mark.parametrize("network", ["untraceable", "in_place"])
def test_a_network_that_cannot_be_traced_gets_a_verdict_without_units(folder: Path, network: str) -> None:
    page_file = folder / "out" / "wrapped.html"
    code, _ = run(folder, "--html", f"{page_file}", checkpoint="wrapped", network=network)
    assert code == 3
    assert "Suspicious units" not in Page(page_file.read_text()).text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--samples", "nowhere"), "no images found"),
        (("--triggers", __file__), "is no folder that can be written"),
        (("--checkpoint", "nowhere.pth"), "nowhere.pth"),
        (("--detection.warp.steps", "0"), "steps 0: expected at least 1"),
        (("--detection.recovery.conclusive", "0.5"), "conclusive 0.5: expected a probability of at least 0.8"),
        (("--detection.recovery.conclusive", "nan"), "conclusive nan"),
    ],
)
def test_bad_inputs_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    code, out = run(folder, *options, "--json", f"{tmp_path}/verdict.json")
    assert code == 2 and expected in out and len(out.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--json", "out.json", "--html", "out.json"), "--json and --html are the same file"),
        (("--json", "checkpoint"), "--checkpoint and --json are the same file"),
        (("--html", "link"), "--checkpoint and --html are the same file"),
        (("--html", "network.py"), "--model and --html are the same file"),
    ],
)
def test_no_output_is_written_over_another_or_over_the_network(
    folder: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    before = (folder / "bad.safetensors").read_bytes()
    named = {
        "network.py": folder / "network.py",
        "checkpoint": folder / "bad.safetensors",
        "link": folder / "images" / ".." / "bad.safetensors",
    }
    given = (option if option.startswith("--") else str(named.get(option, tmp_path / option)) for option in options)
    code, out = run(folder, *given)
    assert code == 2 and expected in out and len(out.strip().splitlines()) == 1
    assert (folder / "bad.safetensors").read_bytes() == before and not (tmp_path / "out.json").exists()


def test_pictures_of_an_earlier_verdict_go(folder: Path, tmp_path: Path) -> None:
    for source in ("network", "unlearned"):
        for what in ("mask", "pattern"):
            (tmp_path / f"{source}_{what}.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"mine")
    patch = Patch(torch.zeros(1, 8, 8), torch.ones(1, 8, 8))
    onp.detect._save_pictures(tmp_path, "network", patch)
    onp.detect._save_pictures(tmp_path, "unlearned", None)
    assert {path.name for path in tmp_path.iterdir()} == {"network_mask.png", "network_pattern.png", "mine.png"}
    assert int(np.asarray(read_image(tmp_path / "network_mask.png")).max()) == 0


def test_no_checkpoint_is_an_error() -> None:
    code, out = call(lambda: run_command(DetectConfig, detect, "onp.detect"), "onp.detect")
    assert code == 2 and "no --checkpoint" in out


def test_the_bench_compares_with_the_truth_and_measures_nothing_twice(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "records"
    arguments = ("onp.bench", "detect", "--models", f"{folder}/suite.json", "--out", f"{out}", "--images", "12", *FAST)
    code, text = call(bench.main, *arguments)
    assert code == 0, text
    record = json.loads((out / "bad-seed0.json").read_text())
    assert (record["backdoored"], record["target"], record["suspect"]) == (True, 2, 2)
    assert record["patches"]["network"]["IoU"] == 1 and record["patches"]["network"]["success"] == 1
    assert set(record["patches"]) == {"network", "unlearned"}
    assert "clean: 0 false alarms of 1" in text
    assert "evidence for 1 of 1, with the right class for 1" in text
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert call(bench.main, *arguments)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")} == times
    assert {path.name for path in out.iterdir()} == {"bad-seed0.json", "clean-seed0.json", "detection.md"}
    rows = [line.split(" | ") for line in (out / "detection.md").read_text().splitlines() if line.startswith("| bad ")]
    assert [row[1] for row in rows] == ["class 2", "network", "unlearned"]
    code, text = call(bench.main, *arguments, "--detection.warp.steps", "9")
    assert code == 2 and "of another network, options or version" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onp.bench.records.sources_sha256", lambda: "of other code")
        assert call(bench.main, *arguments)[0] == 2
    fit = ("onp.bench", "calibrate", "--out", f"{tmp_path}/fit.json", "--records")
    assert call(bench.main, *fit, f"{out}")[0] == 2, "the masks of one were conclusive"
    whole = ("--out", f"{tmp_path}/whole", "--detection.recovery.conclusive", "2")
    assert call(bench.main, *arguments[:4], *arguments[6:], *whole)[0] == 0
    code, text = call(bench.main, *fit, f"{tmp_path}/whole")
    assert code == 0 and "1 clean and 1 backdoored networks; 0 and 0 are taken" in text
    assert json.loads((tmp_path / "fit.json").read_text())["networks"] == ["bad-seed0", "clean-seed0"]


def test_the_bench_of_samples_takes_clean_images_of_all_classes(folder: Path, tmp_path: Path) -> None:
    """24 test images of three classes: clean all of them, triggered those that are not of the target's."""
    seen = []
    out, options = tmp_path / "records", ("--images", "24", "--defence-size", "24", "--threads", "1")

    def rates(truth: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
        seen.append((truth.tolist(), scores.tolist()))
        return {"auroc": 0.75, "tpr": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onp.bench.samples.rates", rates)
        code, text = call(
            bench.main, "onp.bench", "samples", "--models", f"{folder}/suite.json", "--out", f"{out}", *options
        )
    assert code == 0 and "all 1 runs" in text and text.count("0.75") == 4
    assert {path.name for path in out.iterdir()} == {"bad-seed0.json", "samples.md"}, "a clean one has no such samples"
    assert "| bad | 1 | 0.75 | 0.50 | 0.75 | 0.50 | 1.00 |" in (out / "samples.md").read_text()
    assert [truth for truth, _ in seen] == [[False] * 24 + [True] * 16] * 2
    assert min(seen[0][1][24:]) > max(seen[0][1][:24]), "of one class or not, clean images rank below"
    record = json.loads((out / "bad-seed0.json").read_text())
    assert record["strip"] == {"auroc": 0.75, "tpr": 0.5}
    assert record["copy"]["triggered"] == 1 and record["copy"]["clean"] < 1
