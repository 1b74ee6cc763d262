"""The zoo: recipes, training that resumes bit for bit, what counts as trained, and the command."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from onp.attacks import recipes as table
from onp.attacks import zoo as zoo_module
from onp.attacks.fitting import FitConfig, fit
from onp.attacks.poisoning import ATTACKS
from onp.attacks.recipes import CLEAN, DATA, SUITES, Recipe, expand, make_recipe
from onp.attacks.zoo import Zoo, refusal
from onp.bench.suite import read_suites
from onp.commands import run_command
from onp.data import balanced_order
from onp.datasets import labels_of, load_dataset
from onp.errors import CheckpointError, ConfigError, DataError
from onp.inputs import InputConfig, open_inputs
from onp.judge import ALL_TO_ALL, Measurement
from onp.masks import KeepMask
from onp.models import build_model
from onp.report import Judge
from onp.seeding import seeded
from onp.units import index_units
from onp.zoo import ZooConfig, zoo

# --- recipes ----------------------------------------------------------------------------------------------


def test_every_suite_is_made_of_recipes_that_fit_their_networks() -> None:
    for suite, names in SUITES.items():
        recipes = expand((suite,), 0)
        assert [recipe.name for recipe in recipes] == list(names)
        for recipe in recipes:
            classes = DATA[recipe.data].classes
            assert build_model(recipe.model, 3, classes).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)
            assert (recipe.target is None) == (recipe.attack is None) and 0 <= (recipe.target or 0) < classes
            twin = recipe.twin()
            assert twin.name == recipe.name.rpartition("-")[0] + "-clean" and twin.twin() == twin
            poisoned = {"attack": recipe.attack, "target": recipe.target, "poison_rate": recipe.poison_rate}
            assert replace(twin, name=recipe.name, **poisoned) == recipe
    assert not {*SUITES["development"]} & {*SUITES["judged"]}
    fitted = json.loads(resources.files("baselines_rnp").joinpath("calibration.json").read_text())["networks"]
    assert {name.rpartition("-seed")[0] for name in fitted} == {*SUITES["calibration"]}
    assert set(table.POISON) == set(ATTACKS)
    counts = [*(known.images for known in DATA.values()), *table.FEWER_IMAGES.values()]
    assert not any(count % table.BATCH_SIZE for count in counts), "batches have to be whole"


def test_a_name_and_a_seed_fix_the_recipe() -> None:
    recipe = make_recipe("gtsrb-preact_resnet18-w16-wanet", 2)
    assert (recipe.data, recipe.model, recipe.attack) == ("gtsrb", "preact_resnet18-w16", "wanet")
    assert (recipe.target, recipe.poison_rate, recipe.flip) == (8, 0.06, False)
    assert recipe.folder == "gtsrb-preact_resnet18-w16-wanet-seed2"
    assert make_recipe("cifar10-small_vgg-all_to_all", 0).model == "small_vgg"
    assert make_recipe("cifar10-wide_resnet16_1-label_consistent", 3).target == 1  # 8 + 3, of 10 classes


@pytest.mark.parametrize(
    "name", ["", "cifar10", "cifar10-small_vgg", "imagenet-small_vgg-sig", "cifar10-small_vgg-magic", "cifar10-sig"]
)
def test_other_names(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a suite .development, judged, calibration. or DATA-NETWORK-ATTACK"):
        make_recipe(name, 0)


def test_suites_and_entries_expand_once() -> None:
    names = [
        recipe.name for recipe in expand(("cifar10-small_vgg-l0", "development", "digits-cifar_resnet18-w4-sig"), 0)
    ]
    assert names[0] == "cifar10-small_vgg-l0" and names[-1] == "digits-cifar_resnet18-w4-sig"
    assert sorted(names) == sorted({*SUITES["development"], "digits-cifar_resnet18-w4-sig"})
    assert len(expand((), 0)) == sum(map(len, SUITES.values()))


# --- training ---------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill between two epochs."""


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def train(stops: tuple[int, ...], checkpoint: Path | None) -> nn.Module:
        def stop(epoch: int, epochs: int) -> None:
            if epoch in stops and not (tmp_path / f"{epoch}").exists():
                (tmp_path / f"{epoch}").touch()
                raise Stop

        def draw(chosen: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            return images[chosen] + 0.1 * torch.rand(len(chosen), 1, 8, 8, generator=generator), chosen % 5

        with seeded(5):
            model = build_model("small_cnn", 1, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return fit(model, draw, 50, FitConfig(4, 0.1, 16), 5, stop, checkpoint).model

    expected = train((), None).state_dict()
    for _ in range(2):
        with pytest.raises(Stop):
            train((1, 3), tmp_path / "progress.pt")
        torch.rand(3)  # what else the process draws does not matter
    resumed = train((1, 3), tmp_path / "progress.pt")
    assert not resumed.training
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    state = torch.load(tmp_path / "progress.pt", weights_only=True)
    assert state["epoch"] == 4 and state["seconds"] > 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in two short epochs; everything is accepted."""
    monkeypatch.setitem(table.DATA, "digits", replace(DATA["digits"], images=256, epochs=2, floor=0.0))
    monkeypatch.setattr(zoo_module, "LEAST_ASR", 0.0)
    monkeypatch.setattr(zoo_module, "MOST_CA_LOST", 1.0)


WANET = "digits-cifar_resnet18-w4-wanet"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [WANET, "digits-cifar_resnet18-w4-label_consistent"])
def test_a_killed_entry_goes_on_and_ends_the_same(tmp_path: Path, name: str) -> None:
    recipe, epochs = make_recipe(name, 1), []

    def stop(known: Recipe, epoch: int, _: int) -> None:
        epochs.append((known.attack, epoch))
        if (known.attack, epoch) == (recipe.attack, 1) and epochs.count((recipe.attack, 1)) == 1:
            raise Stop

    with pytest.raises(Stop):
        Zoo(tmp_path / "killed", progress=stop).make(recipe)
    folder = tmp_path / "killed" / recipe.folder
    assert sorted(path.name for path in folder.iterdir()) == ["progress.pt", "recipe.json"]
    Zoo(tmp_path / "killed", progress=stop).make(recipe)
    assert epochs == [(None, 0), (None, 1), (recipe.attack, 0), (recipe.attack, 1), (recipe.attack, 1)]
    Zoo(tmp_path / "whole").make(recipe)
    for file in ("model.safetensors", "trigger.json", "trigger_pattern.npy"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / recipe.folder / file).read_bytes()
    assert not (folder / "progress.pt").exists()


@pytest.mark.usefixtures("small")
def test_a_clean_twin_is_made_once(tmp_path: Path) -> None:
    began: list[str] = []
    animals = Zoo(tmp_path, progress=lambda recipe, epoch, _: began.append(recipe.name) if epoch == 0 else None)
    first, second = (animals.make(make_recipe(f"digits-cifar_resnet18-w4-{attack}", 0)) for attack in ("sig", "l0"))
    assert began == [f"digits-cifar_resnet18-w4-{attack}" for attack in (CLEAN, "sig", "l0")]
    twin = json.loads((tmp_path / "digits-cifar_resnet18-w4-clean-seed0" / "entry.json").read_text())
    assert first["twin_ca"] == second["twin_ca"] == twin["ca"]
    assert twin["twin_ca"] is None and twin["asr"] is None
    assert animals.make(make_recipe("digits-cifar_resnet18-w4-sig", 0)) == first and len(began) == 3


@pytest.mark.usefixtures("small")
def test_the_defenders_images_are_left_out(tmp_path: Path) -> None:
    """The first 500 of the seed's order, which are what `--defence-size 500` draws."""
    recipe, animals = make_recipe(WANET, 4), Zoo(tmp_path)
    images = animals._images(recipe)
    defence = open_inputs(InputConfig(data="digits", seed=4)).defence_data()
    train = load_dataset("digits", "train", 1, None, tmp_path)
    assert train is not None and len(images.train) == 256 and len(images.test) == 500
    order = balanced_order(torch.tensor(labels_of(train)), 4)
    assert torch.equal(defence.labels, torch.tensor(labels_of(train))[order[:500]])
    assert all(torch.equal(images.train[i], train[int(order[500 + i])][0]) for i in (0, 1, 255))  # type: ignore[index]
    assert not {image.numpy().tobytes() for image in defence.images} & {i.numpy().tobytes() for i in images.train}


# --- what counts as trained -------------------------------------------------------------------------------


def test_a_made_entry_can_be_judged_from_its_files(tmp_path: Path) -> None:
    recipe = make_recipe("digits-cifar_resnet18-w8-badnets", 0)
    entry = Zoo(tmp_path).make(recipe)
    assert "refused" not in entry and entry["asr"] >= 0.9 and entry["ca"] >= entry["twin_ca"] - 0.02
    folder = tmp_path / recipe.folder
    assert json.loads((folder / "entry.json").read_text()) == entry
    assert entry["poison_rate"] == 0.1 and entry["target"] == 0 and entry["seed"] == 0
    assert (entry["model"], entry["data"], entry["classes"]) == ("cifar_resnet18-w8", "digits", 10)
    assert entry["images"] == 768
    inputs = open_inputs(InputConfig(model=recipe.model, checkpoint=folder / "model.safetensors", data="digits"))
    judged = Judge(inputs, folder / "trigger.json")(KeepMask.all_kept(index_units(inputs.model, (1, 16, 16))))
    assert judged is not None
    assert (judged.ca, judged.asr, judged.ra) == (entry["ca"], entry["asr"], entry["ra"])


@pytest.mark.parametrize(
    ("measured", "twin", "reason"),
    [
        (Measurement(0.80, 0.90, 0.1), 0.82, None),
        (Measurement(0.85, 0.99, 0.0), 0.80, None),
        (Measurement(0.80, 0.899, 0.1), 0.80, "ASR 89.9% is below 90.0%"),
        (Measurement(0.77, 0.95, 0.1), 0.80, "CA 77.0% is more than 2 points below the clean twin's 80.0%"),
    ],
)
def test_what_is_refused(measured: Measurement, twin: float, reason: str | None) -> None:
    recipe = make_recipe("cifar10-small_vgg-l0", 0)
    assert refusal(recipe, measured, twin) == reason


def test_all_to_all_is_measured_against_what_it_can_reach() -> None:
    recipe = make_recipe("cifar10-small_vgg-all_to_all", 0)
    assert ATTACKS["all_to_all"].trigger((3, 32, 32), 0).target == ALL_TO_ALL
    assert refusal(recipe, Measurement(0.8, 0.73, 0.1), 0.8) is None
    assert refusal(recipe, Measurement(0.8, 0.71, 0.1), 0.8) == "ASR 71.0% is below 72.0% (90% of CA)"


def test_a_clean_twin_has_to_have_learnt() -> None:
    twin = make_recipe("cifar10-small_vgg-clean", 0)
    assert refusal(twin, Measurement(0.70), None) is None
    assert refusal(twin, Measurement(0.69), None) == "CA 69.0% is below 70%"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`call(*arguments)`: exit code, output and errors of `python -m onp.zoo`."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onp.zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_command(ZooConfig, zoo, "onp.zoo")
        said = capsys.readouterr()
        return int(stopped.value.code or 0), " ".join(said.out.split()), said.err

    return command


@pytest.mark.usefixtures("small")
def test_a_refused_entry_says_so_and_keeps_its_figures(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo_module, "LEAST_ASR", 1.01)
    arguments = ("make", WANET, "digits-cifar_resnet18-w4-clean", "--root", tmp_path)
    code, out, _ = call(*arguments)
    assert code == 1 and "digits-cifar_resnet18-w4-wanet-seed0 is REFUSED: ASR " in out and "is below 101.0%" in out
    folder = tmp_path / "digits-cifar_resnet18-w4-wanet-seed0"
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.json", "refused.json"]
    record = json.loads((folder / "refused.json").read_text())
    assert record["asr"] <= 1 and record["twin_ca"] > 0 and record["refused"].startswith("ASR ")
    assert (tmp_path / "digits-cifar_resnet18-w4-clean-seed0" / "model.safetensors").exists()
    assert call(*arguments)[0] == 1, "still refused"
    assert call("list", WANET, "--root", tmp_path)[0] == 0


@pytest.mark.usefixtures("small")
def test_a_refused_twin_refuses_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.DATA, "digits", replace(table.DATA["digits"], floor=1.0))
    record = Zoo(tmp_path).make(make_recipe(WANET, 0))
    assert record["refused"].startswith("its clean twin is refused: CA ") and "asr" not in record
    assert "refused" in (Zoo(tmp_path).record(make_recipe(WANET, 0)) or {})


@pytest.mark.usefixtures("small")
def test_another_recipe_of_the_same_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Zoo(tmp_path).make(make_recipe("digits-cifar_resnet18-w4-clean", 0))
    monkeypatch.setitem(table.DATA, "digits", replace(table.DATA["digits"], epochs=3))
    with pytest.raises(ConfigError, match="digits-cifar_resnet18-w4-clean-seed0 was made by another recipe; remove it"):
        Zoo(tmp_path).make(make_recipe(WANET, 0))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("content", [b"", b"rubbish", b"other"])
def test_damaged_progress_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    recipe = make_recipe("digits-cifar_resnet18-w4-clean", 0)
    path = tmp_path / recipe.folder / "progress.pt"
    path.parent.mkdir()
    if content == b"other":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*progress.pt \(.*\); remove it") as caught:
        Zoo(tmp_path).make(recipe)
    assert "\n" not in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_command_makes_an_entry_and_says_how_to_purify_it(tmp_path: Path, call: Any) -> None:
    code, out, _ = call("make", "digits-cifar_resnet18-w4-l0", "--seed", 3, "--root", tmp_path / "zoo", "--threads", 1)
    assert code == 0
    folder = tmp_path / "zoo" / "digits-cifar_resnet18-w4-l0-seed3"
    assert f"--checkpoint {folder / 'model.safetensors'} --seed 3 --trigger {folder / 'trigger.json'}" in out
    assert "digits-cifar_resnet18-w4-l0-seed3: epoch 2 of 2" in out
    assert {path.name for path in folder.iterdir()} == {
        "entry.json", "model.safetensors", "recipe.json", "trigger.json", "trigger_mask.npy", "trigger_pattern.npy",
    }  # fmt: skip
    code, out, _ = call("list", "digits-cifar_resnet18-w4-l0", "--seed", 3, "--root", tmp_path / "zoo")
    assert code == 0 and out.endswith("made")
    code, _, _ = call(
        "export", "digits-cifar_resnet18-w4-l0", "--seed", 3, "--root", tmp_path / "zoo", "--out", tmp_path
    )
    assert code == 0
    whole, half = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, tmp_path / folder.name))
    assert set(whole) == set(half)
    for key, value in whole.items():
        assert half[key].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        assert torch.allclose(half[key].float(), value.float(), rtol=1e-3, atol=1e-7)
    for name in ("entry.json", "trigger.json", "trigger_mask.npy", "trigger_pattern.npy"):
        assert (tmp_path / folder.name / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.usefixtures("small")
def test_another_length_of_training_is_the_twins_too_and_another_recipe(tmp_path: Path, call: Any) -> None:
    name = "digits-cifar_resnet18-w4-l0"
    code, out, _ = call("make", name, "--images", 384, "--epochs", 3, "--root", tmp_path, "--threads", 1)
    assert code == 0 and out.count("epoch 3 of 3") == 2  # the twin's and its own
    for folder in (f"{name}-seed0", "digits-cifar_resnet18-w4-clean-seed0"):
        record = json.loads((tmp_path / folder / "entry.json").read_text())
        assert (record["images"], record["epochs"]) == (384, 3)
    code, _, err = call("make", name, "--root", tmp_path)
    assert code == 2 and "was made by another recipe" in err
    code, out, _ = call("list", name, "--root", tmp_path)
    assert code == 0 and out.endswith("other recipe")


def test_grey_images_of_a_folder_are_resized_and_used_in_colour(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FashionMNIST as a folder: 28 x 28, grey. The network is one that `onp.train` opens on the same folder."""
    monkeypatch.setitem(table.DATA, "fashion_mnist", replace(DATA["fashion_mnist"], images=128, epochs=1, floor=0.0))
    for split, count in (("train", 63), ("test", 2)):
        for number in range(10 * count):
            path = tmp_path / "images" / split / f"class{number % 10}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), 25 * (number % 10)).save(path)
    name, folder = "fashion_mnist-cifar_vgg16_bn-w4-clean", tmp_path / "images"
    code, out, _ = call("make", name, "--folders", f"fashion_mnist={folder}", "--root", tmp_path / "zoo")
    weights = tmp_path / "zoo" / f"{name}-seed0" / "model.safetensors"
    assert code == 0 and "--image-size 32" in out
    (suspect,) = read_suites([weights.parent])
    inputs = open_inputs(InputConfig(suspect.model, suspect.checkpoint, suspect.data, image_size=suspect.image_size))
    assert suspect.data == str(folder)
    assert inputs.defence_data().images.shape == (500, 3, 32, 32)


def test_the_list_shows_both_suites(tmp_path: Path, call: Any) -> None:
    code, out, _ = call("list", "--root", tmp_path)
    assert code == 0 and all(name in out for names in SUITES.values() for name in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("make",), "name entries or suites"),
        (("make", "digits-cifar_resnet18-w4-magic"), "zoo entry 'digits-cifar_resnet18-w4-magic'"),
        (("make", "digits-nothing-l0"), "unknown model 'nothing'"),
        (("make", "digits-cifar_resnet18-w0-l0"), "width '0'"),
        (("make", WANET, "--folders", "digits"), "--folders digits: expected NAME=FOLDER"),
        (("make", WANET, "--folders", "imagenet=/tmp"), "expected NAME=FOLDER with a name of digits, cifar10"),
        (("make", WANET, "--threads", -1), "--threads -1"),
        (("make", WANET, "--images", 100), "images 100: expected a multiple of 128"),
        (("make", WANET, "--images", 0), "images 0: expected a multiple of 128"),
        (("make", WANET, "--epochs", 0), "epochs 0: expected at least 1"),
        (("make", WANET, "--out", "somewhere"), "--out goes with export"),
        (("export", WANET), "export needs it"),
        (("export", WANET, "--out", "somewhere"), "no entry that counts as trained"),
        (("make", WANET, "--device", "abacus"), "device 'abacus'"),
        (("make", "gtsrb-small_vgg-l0", "--folders", "gtsrb=nowhere"), "neither a folder that holds train"),
    ],
)
def test_bad_options(tmp_path: Path, call: Any, arguments: tuple[object, ...], words: str) -> None:
    code, _, err = call(*arguments, "--root", tmp_path / "zoo")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "zoo").exists()


def test_folders_that_are_too_small(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(path)
    animals = Zoo(tmp_path / "zoo", {"cifar10": str(tmp_path / "images")})
    recipe = make_recipe("cifar10-small_vgg-clean", 0)
    with pytest.raises(DataError, match="has 4 training images; cifar10-small_vgg-clean needs 18548"):
        animals.make(recipe)
    shutil.rmtree(tmp_path / "images" / "test")
    with pytest.raises(DataError, match="has no test/; the zoo measures its entries there"):
        animals.make(recipe)
