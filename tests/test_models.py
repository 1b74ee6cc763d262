"""Our networks, their widths, and the keys that published checkpoints have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from onp.errors import ModelError
from onp.inputs import InputConfig, open_inputs
from onp.models import MODELS, WIDTHS, build_model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("plain", "wide"), [(name, f"{name}-w{1.0 if 'mobile' in name else 64}") for name in WIDTHS])
def test_the_plain_name_is_the_usual_width(plain: str, wide: str) -> None:
    assert shapes(build_model(plain, 3, 10)) == shapes(build_model(wide, 3, 10))


@pytest.mark.parametrize("name", ["cifar_resnet18-w16", "preact_resnet18-w16", "cifar_vgg16_bn-w16"])
def test_a_quarter_of_the_width_is_a_quarter_of_every_channel(name: str) -> None:
    narrow, usual = (build_model(name.replace("-w16", suffix), 3, 10) for suffix in ("-w16", ""))
    for one, other in zip(narrow.modules(), usual.modules(), strict=True):
        if isinstance(one, nn.Conv2d) and isinstance(other, nn.Conv2d):
            assert (4 * one.out_channels, one.stride) == (other.out_channels, other.stride)
    assert narrow.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_mobilenet_is_torchvisions_but_for_its_strides() -> None:
    ours, theirs = build_model("cifar_mobilenet_v2-w0.5", 3, 10), mobilenet_v2(num_classes=10, width_mult=0.5)
    assert shapes(ours) == shapes(theirs)
    assert ours.get_submodule("features.18")(ours.get_submodule("features")[:18](torch.zeros(2, 3, 32, 32))).shape[
        2:
    ] == (4, 4)


def test_the_keys_are_those_of_the_well_known_code() -> None:
    keys = shapes(build_model("preact_resnet18", 3, 10))
    assert keys["conv1.weight"] == (64, 3, 3, 3) and keys["linear.weight"] == (10, 512)
    assert keys["layer4.0.shortcut.0.weight"] == (512, 256, 1, 1)
    assert keys["layer1.0.bn1.weight"] == (64,) and "layer1.0.shortcut.0.weight" not in keys
    keys = shapes(build_model("cifar_vgg16_bn", 3, 10))
    assert keys["features.0.weight"] == (64, 3, 3, 3) and keys["features.40.weight"] == (512, 512, 3, 3)
    assert keys["features.41.running_mean"] == (512,) and keys["classifier.weight"] == (10, 512)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar_resnet18-w0", "width '0' is not channels of the first stage, a whole number above 0 and up to 512"),
        ("cifar_resnet18-w-4", "width '-4'"),
        ("cifar_resnet18-w1.5", "width '1.5' is not"),
        ("cifar_resnet18-w", "width '' is not"),
        ("preact_resnet18-w513", "width '513' is not"),
        ("cifar_vgg16_bn-wide", "width 'ide' is not"),
        ("cifar_mobilenet_v2-w0", "width '0' is not a factor, a number above 0 and up to 8"),
        ("cifar_mobilenet_v2-wnan", "width 'nan' is not"),
        ("cifar_mobilenet_v2-winf", "width 'inf' is not"),
        ("small_cnn-w16", "small_cnn has one width; networks that take -wWIDTH are cifar_resnet18, "),
        ("cifar_resnet19-w16", "unknown model 'cifar_resnet19-w16'"),
    ],
)
def test_bad_widths(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        build_model(name, 3, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "small_vgg"), "preact_resnet18-w4"])
def test_our_networks_take_grey_images(name: str) -> None:
    size = 32 if name == "cifar_vgg16_bn" else None
    assert open_inputs(InputConfig(model=name, data="digits", image_size=size)).channels == 1


def test_an_own_file_is_a_module_as_any_other(tmp_path: Path) -> None:
    """What lies beside it can be imported; dataclasses with postponed annotations look their module up."""
    (tmp_path / "parts_of_mine.py").write_text("from torch import nn\nhead = nn.Linear(4, 3)\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from parts_of_mine import head\n"
        "@dataclass\nclass Sizes:\n    width: int = 4\n"
        "def make(): return nn.Sequential(nn.Flatten(), head)\n"
        "def leave(): raise SystemExit(7)\n"
    )
    before = list(sys.path)
    model = build_model(f"{tmp_path}/mine.py:make", 1, 3)
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 3)
    with pytest.raises(ModelError, match="mine.py:leave failed with SystemExit: 7"):
        build_model(f"{tmp_path}/mine.py:leave", 1, 3)
    assert sys.path == before
