"""Stages behind pruning: fine-tuning and removal from the unlearned copy, by hand, and as part of runs and tables."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_run import tiny_options
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import TinyNet

import onp.stages
from baselines_rnp.removal import RemovalConfig, remove_backdoor
from onp.bench.table import TableConfig, run_table
from onp.checkpoints import load_checkpoint
from onp.data import DefenceData, Normalisation
from onp.errors import ConfigError, ModelError
from onp.evaluate import EvaluateConfig, evaluate
from onp.finetuning import FinetuneConfig, Worth, finetune, learn_on
from onp.masks import KeepMask, Rule, apply_mask, masked
from onp.models import build_model
from onp.purification import MethodResult, Purification, PurifyConfig
from onp.run_folder import RunFolder
from onp.stages import STAGES, rows_of, run_stage
from onp.train import TrainConfig, complete_run
from onp.units import UnitIndex, index_units

ROWS = ["onp_finetuned", "rnp_finetuned", "rnp_removal"]


@pytest.fixture
def tiny(randomised: Callable[..., nn.Module]) -> tuple[nn.Module, UnitIndex]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(TinyNet())
    return model, index_units(model, (1, 4, 4))


def tiny_data() -> DefenceData:
    """Images too small (4 x 4) to be cropped: without flips, augmentation changes nothing."""
    images = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return DefenceData(images, (images.mean((1, 2, 3)) * 30).long() % 3, 3, Normalisation((0.4,), (0.3,)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], two[key]) for key in one)


def test_two_steps_by_hand(tiny: tuple[nn.Module, UnitIndex]) -> None:
    """SGD with momentum and weight decay on all images at once; the pruned slices are set back behind each step."""
    model, index = tiny
    data, mask = tiny_data(), KeepMask.all_kept(index).without([1, 7])  # a channel, a hidden neuron
    config = FinetuneConfig(learning_rate=0.1, momentum=0.5, weight_decay=0.01, batch_size=24, epochs=2)
    result = learn_on(model, mask, data, config, 0)

    expected = copy.deepcopy(model)
    zeros = {"bn.weight": 1, "bn.bias": 1, "hidden.weight": 1, "hidden.bias": 1}
    velocity = {name: torch.zeros_like(value) for name, value in expected.named_parameters()}
    with torch.no_grad():
        for name, unit in zeros.items():
            expected.get_parameter(name)[unit] = 0
    for _ in range(2):
        loss = F.cross_entropy(expected.eval()((data.images - 0.4) / 0.3), data.labels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for (name, value), gradient in zip(expected.named_parameters(), gradients, strict=True):
                velocity[name] = 0.5 * velocity[name] + gradient + 0.01 * value
                value -= 0.1 * velocity[name]
            for name, unit in zeros.items():
                expected.get_parameter(name)[unit] = 0
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result.get_parameter("fc.weight"), model.get_parameter("fc.weight"), atol=1e-3)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rule", ["zero", "gamma"])
def test_pruned_units_stay_exactly_zero(tiny: tuple[nn.Module, UnitIndex], rule: Rule, frozen: bool) -> None:
    model, index = tiny
    data = tiny_data()
    mask = KeepMask.all_kept(index, rule).without([0, 4] if rule == "gamma" else [0, 4, 8])
    config = FinetuneConfig(learning_rate=0.05, batch_size=8, epochs=3, frozen=frozen)
    result = learn_on(model, mask, data, config, 0)
    assert result.get_parameter("bn.weight")[[0, 4]].tolist() == [0, 0]
    assert (result.get_parameter("bn.bias")[[0, 4]] == 0).all().item() is (rule == "zero")
    with torch.no_grad():
        logits = result(data.inputs)
        with masked(result, mask):
            assert torch.equal(result(data.inputs), logits), "masking once more changes something"
        if rule == "zero":
            assert not result.bn(result.conv(data.inputs))[:, [0, 4]].any()  # type: ignore[operator]
            assert not result.hidden(torch.randn(5, 6))[:, 2].any()  # type: ignore[operator]
    pruned = copy.deepcopy(model)
    apply_mask(pruned, mask)
    revived = learn_on(pruned, KeepMask.all_kept(index), data, config, 0)
    slices = {"gamma": revived.get_parameter("bn.weight")[[0, 4]], "zero": revived.get_parameter("hidden.bias")[2:]}
    assert slices[rule].all(), "negative control: nothing would have come back"


@pytest.mark.parametrize("name", ["wide_resnet16_1", "small_vgg"])
def test_other_kinds_of_units(name: str) -> None:
    """Batch-norms behind sums, and input positions of a linear layer, whose columns are zeroed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(name, 3, 4).eval()
    index = index_units(model, (3, 32, 32))
    units = [layer.offset + layer.size // 2 for layer in index]
    assert {layer.kind for layer in index} >= ({"batch_norm"} if name != "small_vgg" else {"conv", "linear_input"})
    mask, generator = KeepMask.all_kept(index).without(units), torch.Generator().manual_seed(0)
    data = DefenceData(torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8) % 4, 4)
    result = learn_on(model, mask, data, FinetuneConfig(epochs=2, batch_size=4, frozen=False), 0)
    again = copy.deepcopy(result)
    apply_mask(again, mask)
    assert same(state(result), state(again))
    assert not same(state(result), state(model))


@pytest.mark.parametrize(("learning_rate", "epochs"), [(0.02, 2), (0.3, 1), (1.5, 0)])
def test_the_other_half_says_when_to_stop(tiny: tuple[nn.Module, UnitIndex], learning_rate: float, epochs: int) -> None:
    """Of the networks behind 0, 1 ... epochs, each trained anew, the one with the least held-out loss."""
    model, index = tiny
    mask = KeepMask.all_kept(index).without([2])
    config = FinetuneConfig(learning_rate=learning_rate, batch_size=4, epochs=2)
    taught, held_out = tiny_data().halves(7)
    candidates = [copy.deepcopy(model)]
    apply_mask(candidates[0], mask)
    candidates += [learn_on(model, mask, taught, replace(config, epochs=number), 7) for number in (1, 2)]
    with torch.no_grad():
        losses = [float(F.cross_entropy(network(held_out.inputs), held_out.labels)) for network in candidates]
    assert losses.index(min(losses)) == epochs, "the case is not what it is for"
    assert same(state(finetune(model, mask, tiny_data(), config, 7)), state(candidates[epochs]))


def test_another_judgement_says_when_to_stop(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    mask, config = KeepMask.all_kept(index).without([2]), FinetuneConfig(batch_size=4, epochs=3)
    taught, held_out = tiny_data().halves(7)
    worths, seen = iter((0.0, -1.0, 2.0, 1.0)), list[Tensor]()

    def worth(network: nn.Module, data: DefenceData) -> float:
        assert not network.training
        seen.append(data.images)
        return next(worths)

    found = finetune(model, mask, tiny_data(), config, 7, worth)
    assert same(state(found), state(learn_on(model, mask, taught, replace(config, epochs=2), 7)))
    assert len(seen) == 4 and all(torch.equal(images, held_out.images) for images in seen)


def test_what_is_frozen(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    before = state(model)
    for frozen in (True, False):
        config = FinetuneConfig(epochs=1, frozen=frozen)
        result = state(learn_on(model, KeepMask.all_kept(index), tiny_data(), config, 0))
        assert torch.equal(result["bn.running_mean"], before["bn.running_mean"]) is frozen
        assert torch.equal(result["bn.running_var"], before["bn.running_var"]) is frozen
        assert not torch.equal(result["bn.weight"], before["bn.weight"])
    assert same(state(model), before), "the network itself was changed"


def test_seeds_decide_everything(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    mask, config = KeepMask.all_kept(index), FinetuneConfig(epochs=2, batch_size=8)
    random = torch.get_rng_state()
    one, two, other = (state(learn_on(model, mask, tiny_data(), config, seed)) for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)
    assert torch.equal(torch.get_rng_state(), random)


def test_every_step_can_be_watched(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    seen: list[tuple[int, float]] = []

    def watch(steps: int, network: nn.Module) -> None:
        network.eval()  # as measuring does
        seen.append((steps, network.get_parameter("fc.bias").sum().item()))

    config = FinetuneConfig(epochs=2, batch_size=8, frozen=False)
    result = learn_on(model, KeepMask.all_kept(index), tiny_data(), config, 0, watch)
    assert [steps for steps, _ in seen] == [1, 2, 3, 4, 5, 6] and len({total for _, total in seen}) == 6
    assert same(state(result), state(learn_on(model, KeepMask.all_kept(index), tiny_data(), config, 0)))


def test_what_cannot_be_learned(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    with pytest.raises(ModelError, match=r"diverged at step .* learning rate \(1e\+30\)"):
        finetune(model, KeepMask.all_kept(index), tiny_data(), FinetuneConfig(learning_rate=1e30, batch_size=8))
    for name, value in (
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("momentum", -1),
        ("weight_decay", -1),
    ):
        for wrong in (value, float("nan")):
            with pytest.raises(ConfigError, match=f"{name} {wrong}"):
                FinetuneConfig(**{name: wrong})  # type: ignore[arg-type]


def test_frozen_parameters_learn_all_the_same(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    mask, config = KeepMask.all_kept(index), FinetuneConfig(epochs=1, batch_size=8)
    learned = state(learn_on(model, mask, tiny_data(), config, 0))
    model.requires_grad_(False)
    assert same(state(learn_on(model, mask, tiny_data(), config, 0)), learned) and not same(state(model), learned)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_is_there_from_python(tiny: tuple[nn.Module, UnitIndex]) -> None:
    model, index = tiny
    mask = onp.KeepMask.all_kept(index).without([2])
    assert same(state(onp.finetune(model, mask, tiny_data())), state(finetune(model, mask, tiny_data())))


def test_removal_prunes_what_the_masks_name(tiny: tuple[nn.Module, UnitIndex]) -> None:
    """Channels 0 and 4 have fallen; unit 7 is a hidden neuron, which RNP does not know."""
    model, index = tiny
    values = torch.tensor([0.0, 0.3, 1.0, 0.9, 0.0, 1.0, 1.0, 0.0, 1.0])
    config = RemovalConfig(batch_size=8, epochs=2)
    network, mask = remove_backdoor(model, index, values, tiny_data(), config, seed=3)
    assert mask.rule == "gamma" and mask.pruned == {0, 4}
    assert network.get_parameter("bn.weight")[[0, 4]].tolist() == [0, 0]
    assert not torch.equal(network.get_parameter("bn.bias")[[0, 4]], model.get_parameter("bn.bias")[[0, 4]])
    _, more = remove_backdoor(model, index, values, tiny_data(), replace(config, threshold=0.3), seed=3)
    assert more.pruned == {0, 1, 4}


# --- in a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return tiny_options(tmp_path_factory.mktemp("inputs"))


def run(options: TrainConfig, path: Path, **changes: Any) -> Path:
    return complete_run(replace(options, run_dir=path, **changes), Console(quiet=True)).path


@pytest.fixture(scope="module")
def finished(options: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(options, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def copied(options: TrainConfig, finished: Path, tmp_path: Path) -> Path:
    """The finished run, in a folder of its own."""
    path = tmp_path / "run"
    for file in [file for file in finished.rglob("*") if file.is_file()]:
        (target := path / file.relative_to(finished)).parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes().replace(str(finished).encode(), str(path).encode()))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((path / "report.json").read_text())["rows"]}


def test_rows_of_stages() -> None:
    assert rows_of(tuple(STAGES)) == rows_of(("removal", "finetune")) == ROWS
    assert rows_of(()) == [] and rows_of(("removal",)) == ["rnp_removal"]


def test_a_finished_run_gets_what_it_lacks(options: TrainConfig, copied: Path) -> None:
    before, known = contents(copied), rows(copied)
    run(options, copied, stages=("finetune",))
    run(options, copied, stages=("removal", "finetune"))
    after = contents(copied)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"report.json", "report.md"}
    assert set(after) - set(before) == {
        *(f"stages/{row}.safetensors" for row in ROWS),
        *(f"{kind}/{row}.json" for kind in ("masks", "methods") for row in ROWS),
    }
    found = rows(copied)
    assert {name: found[name] for name in known} == known and set(found) - set(known) == set(ROWS)
    assert "ONP + fine-tuning" in after["report.md"].decode()
    for row, base in (("onp_finetuned", "onp"), ("rnp_finetuned", "rnp")):
        assert found[row]["units_pruned"] == known[base]["units_pruned"]
        assert found[row]["reward_evaluations"] == known[base]["reward_evaluations"]
    run(options, copied, stages=("removal", "finetune"))
    assert contents(copied) == after, "a run that lacks nothing was changed"
    assert evaluate(EvaluateConfig(copied)) == 0


def test_fine_tuning_may_not_wake_the_recovered_trigger(
    options: TrainConfig, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward of ONP's network, by plain PyTorch; RNP, which knows no recovered trigger, stops by the loss."""
    judgements, subjects = list[Worth | None](), list[Purification]()

    def watched(model: nn.Module, mask: KeepMask, *others: Any) -> nn.Module:
        judgements.append(others[-1])
        return finetune(model, mask, *others)

    def stage(row: str, purification: Purification, folder: RunFolder) -> MethodResult:
        subjects.append(purification)
        return run_stage(row, purification, folder)

    monkeypatch.setattr(onp.stages, "finetune", watched)
    monkeypatch.setattr("onp.train.run_stage", stage)
    run(options, copied, stages=("finetune",))
    judge, plain = judgements
    assert judge is not None and plain is None
    subject = subjects[0]
    clues, data, network = subject.timed_clues[0], subject.held_out, subject.model
    monkeypatch.setattr(type(clues), "trust", 0.7)
    goals = clues.guide.goals(data.labels)
    others = goals != data.labels
    with torch.no_grad():
        loss = float(F.cross_entropy(network(data.inputs), data.labels))
        shown = network(data.normalise(clues.guide(data.images[others]))).softmax(1)
    success = float(shown.gather(1, goals[others, None]).mean())
    log_odds = math.log(max(success, 0.001) / (1 - max(success, 0.001)))
    wanted = -0.3 * 0.7 * log_odds - 12 * loss
    assert onp.stages._worth(subject)(network, data) == pytest.approx(wanted, abs=1e-4)


def test_stages_are_the_same_at_once_and_afterwards(options: TrainConfig, copied: Path, tmp_path: Path) -> None:
    run(options, copied, stages=("finetune", "removal"))
    run(options, tmp_path / "at_once", stages=("finetune", "removal"))
    for name in (f"stages/{row}.safetensors" for row in ROWS):
        assert (copied / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    assert "stages" not in json.loads((tmp_path / "at_once" / "config.json").read_text())["options"]


def test_the_network_of_a_stage_is_what_was_measured(options: TrainConfig, copied: Path) -> None:
    """CA, ASR and DER by plain PyTorch, from the weights and the image files."""
    run(options, copied, stages=("finetune",))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    load_checkpoint(network.eval(), copied / "stages" / "onp_finetuned.safetensors")
    right = fooled = other = seen = 0
    for path in sorted(Path(options.data).glob("test/*/*.png")):
        label = int(path.parent.name[-1])
        image = torch.tensor(list(Image.open(path).get_flattened_data()), dtype=torch.float32)
        image = image.view(1, 8, 8, 3).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            right, seen = right + int(network(image).argmax() == label), seen + 1
            if label != 1:
                fooled, other = fooled + int(network(torch.ones(1, 3, 8, 8)).argmax() == 1), other + 1
    row, before = rows(copied)["onp_finetuned"], rows(copied)["backdoored"]
    assert (row["ca"], row["asr"]) == (right / seen, fooled / other)
    drops = max(0.0, before["asr"] - row["asr"]) - max(0.0, before["ca"] - row["ca"])
    assert row["der"] == pytest.approx((drops + 1) / 2)


def test_a_revived_unit_is_noticed(options: TrainConfig, copied: Path) -> None:
    run(options, copied, stages=("removal",))
    mask = json.loads((copied / "masks" / "rnp_removal.json").read_text())
    mask.update(pruned={"1": [0]}, units_pruned=1)  # a unit that the weights do not prune
    (copied / "masks" / "rnp_removal.json").write_text(json.dumps(mask))
    assert evaluate(EvaluateConfig(copied)) == 1


@pytest.mark.parametrize("number", [1, 3, 5, 9, 10, 11])
def test_a_stage_is_there_whole_or_not_at_all(
    options: TrainConfig, copied: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the n-th file gets its name: 3 of each of 3 rows, then the report's two."""
    renamed, replace_file = 0, os.replace

    def stop(source: Any, target: Any) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == number:
            raise KeyboardInterrupt
        replace_file(source, target)

    both = ("finetune", "removal")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run(options, copied, stages=both)
    monkeypatch.undo()
    whole = [row for row in ROWS if (copied / "methods" / f"{row}.json").exists()]
    assert whole == ROWS[: (number - 1) // 3]
    assert not set(ROWS) & set(rows(copied))
    kept = {name: data for name, data in contents(copied).items() if name.startswith("methods/")}
    assert evaluate(EvaluateConfig(copied)) == 0, "the run without stages is no longer what it was"
    run(options, copied, stages=both)
    assert set(ROWS) <= set(rows(copied))
    assert kept == {name: data for name, data in contents(copied).items() if name in kept}, "a row was made again"


def test_without_evidence_a_stage_leaves_the_network_alone(
    options: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onp.purification.check_skill", lambda *_: None)  # it knows nothing
    monkeypatch.setattr("baselines_rnp.label_detection.LEAST_CONFIDENCE", 1.1)
    path = run(options, tmp_path / "left", always=False, stages=("finetune", "removal"))
    assert json.loads((path / "clues.json").read_text())["verdict"] == "none"
    for row in ROWS:
        assert rows(path)[row]["ca"] is None and "left alone" in rows(path)[row]["note"]
    assert not (path / "stages").exists()
    assert evaluate(EvaluateConfig(path)) == 0


def test_a_stage_that_fails_says_so_in_its_row(
    options: TrainConfig, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onp.stages, "FinetuneConfig", lambda: FinetuneConfig(learning_rate=1e30, batch_size=2))
    run(options, copied, stages=("finetune",))
    row = rows(copied)["onp_finetuned"]
    assert row["ca"] is None and "diverged" in row["note"] and not (copied / "stages").exists()


def test_a_finished_table_gets_what_it_lacks(options: TrainConfig, tmp_path: Path) -> None:
    entry = {"name": "tiny", "model": options.model, "checkpoint": str(options.checkpoint), "data": options.data}
    (tmp_path / "suite.json").write_text(json.dumps([{**entry, "trigger": str(options.trigger)}]))
    purify = PurifyConfig(budget=24, env=options.env)
    config = TableConfig(
        (tmp_path / "suite.json",), tmp_path / "out", (0,), defence_size=12, threads=1, purify=purify
    )  # fmt: skip
    tables = []
    for stages in ((), ("removal", "finetune")):
        assert run_table(replace(config, stages=stages)) == 0
        tables.append({cell["method"]: cell for cell in json.loads((config.out / "table.json").read_text())["cells"]})
    first, second = tables
    assert {name: second[name] for name in first} == first and set(second) - set(first) == set(ROWS)
    found = rows(config.out / "tiny-seed0")
    for row in ROWS:
        assert (second[row]["ca"], second[row]["asr"], second[row]["der"]) == tuple(
            found[row][name] for name in ("ca", "asr", "der")
        )
    assert second["onp_finetuned"]["budget"] == 24 and second["rnp_removal"]["budget"] is None
    assert "| ONP + fine-tuning | 24 | 1 |" in (config.out / "table.md").read_text()
