"""Do a network and clean images fit?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from onp.data import DefenceData
from onp.errors import DataError, ModelError


def check_network(model: nn.Module, data: DefenceData) -> DefenceData:
    """`data` with as many classes as the network has outputs: a backdoor may lead to one that no image is of.

    Raises `ModelError` or `DataError` where weights or outputs are not finite, or outputs do not fit the labels.
    `model` is in eval mode then.
    """
    for name, weight in model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"weight {name} holds NaN or infinite values; the network is damaged")
    with torch.no_grad():
        logits = model.eval()(few := data.inputs[:2])
    check_logits(model, logits, len(few))
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{type(model).__name__} gives outputs that are not finite on the defence images")
    if int(data.labels.max()) >= logits.shape[1]:
        last = int(data.labels.max())
        raise DataError(f"labels go up to {last}; the network has {logits.shape[1]} outputs; leave the others out")
    return replace(data, num_classes=logits.shape[1])


def check_logits(model: nn.Module, logits: object, images: int) -> None:
    """Raise `ModelError` where what `model` gives for so many images is not logits of two classes or more.

    Probabilities are told by their sum; the logarithms of such are logits.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images:
        given = f"the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"{type(model).__name__} gives {given} for {images} images; expected logits of shape ({images}, classes) "
            "and nothing else: wrap it in a module that returns them alone"
        )
    if logits.shape[1] < 2:
        raise ModelError(f"{type(model).__name__} has one output; a classifier of two classes or more is expected")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        raise ModelError(f"{type(model).__name__} gives probabilities; expected logits, as they come before softmax")
