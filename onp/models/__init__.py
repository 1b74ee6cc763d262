"""The network registry: names that `--model` takes, and networks from a user's own file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torchvision
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from onp.errors import ModelError
from onp.models.mobilenet import CifarMobileNetV2
from onp.models.preact_resnet import PreActResNet18
from onp.models.resnet import CifarResNet18
from onp.models.small import SmallCNN, SmallVGG
from onp.models.vgg import CifarVGG16
from onp.models.wide_resnet import WideResNet16x1

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_vgg": SmallVGG,
    "wide_resnet16_1": WideResNet16x1,
    "cifar_resnet18": CifarResNet18,
    "preact_resnet18": PreActResNet18,
    "cifar_vgg16_bn": CifarVGG16,
    "cifar_mobilenet_v2": CifarMobileNetV2,
}
"""our networks: name -> constructor of (input channels, classes)"""
WIDTHS: dict[str, tuple[Callable[..., nn.Module], type[int] | type[float], float]] = {
    "cifar_resnet18": (CifarResNet18, int, 512),
    "preact_resnet18": (PreActResNet18, int, 512),
    "cifar_vgg16_bn": (CifarVGG16, int, 512),
    "cifar_mobilenet_v2": (CifarMobileNetV2, float, 8),
}
"""networks that take a width, as in `cifar_resnet18-w16`: constructor, type and largest value of `width`"""


def build_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Build a registered network, or call `path/to/file.py:function`, without weights.

    A suffix sets the width of those in `WIDTHS`: channels of the first stage (`preact_resnet18-w16`; 64 without it),
    or for MobileNetV2 the factor of all channels (`cifar_mobilenet_v2-w0.5`; 1 without it).
    The function takes no arguments and returns a module that gives logits. It is the user's own code and is
    executed as such. torchvision's classifiers take three input channels.
    Raises `ModelError` for an unknown name, a width that makes no sense, a missing file or function, or a function
    that fails.
    """
    if name in MODELS:
        return MODELS[name](in_channels, num_classes)
    if ":" in name:
        return _from_file(name)
    if name in torchvision.models.list_models(module=torchvision.models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    base, suffix, width = name.partition("-w")
    if suffix and base in MODELS:
        return _of_width(base, width)(in_channels, num_classes)
    raise ModelError(
        f"unknown model {name!r}; choose from {', '.join(MODELS)}, a torchvision classifier such as resnet18, "
        "or give path/to/file.py:function"
    )


def is_ours(name: str) -> bool:
    """Whether `name` is one of `MODELS`, of whatever width; these take any number of input channels."""
    return name.partition("-w")[0] in MODELS


def _of_width(base: str, text: str) -> Callable[[int, int], nn.Module]:
    if base not in WIDTHS:
        raise ModelError(f"{base} has one width; networks that take -wWIDTH are {', '.join(WIDTHS)}")
    build, kind, largest = WIDTHS[base]
    try:
        width = kind(text)
    except ValueError:
        width = kind(0)
    if not 0 < width <= largest:
        what = "channels of the first stage, a whole number" if kind is int else "a factor, a number"
        raise ModelError(f"{base}-w{text}: the width {text!r} is not {what} above 0 and up to {largest}")
    return partial(build, width=width)


def _from_file(name: str) -> nn.Module:
    path, _, function_name = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("onp_user_model", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ModelError(f"model file {path!r} is not a Python file; expected path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class up by its module
    beside = str(Path(path).resolve().parent)
    sys.path.insert(0, beside)  # what lies there can be imported, as by `python FILE`
    try:
        spec.loader.exec_module(module)
        model = getattr(module, function_name)()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} failed with {type(error).__name__}: {error}") from error
    finally:
        if beside in sys.path:  # the file may have changed it
            sys.path.remove(beside)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module that gives logits")
    tensors = (*model.parameters(), *model.buffers())
    if any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in tensors):
        raise ModelError(
            f"{name} has layers of sizes not known yet (nn.Lazy...); run it on an image before returning it"
        )
    return model
