"""A physically smaller network: the channels that a mask leaves silent are cut out, where the logits stay the same.

Where they would not (`onp.removable` says why), pruned units stay as zeros. The result is measured against the masked
network on real inputs before anybody gets it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onp.checkpoints import load_checkpoint, read_json, save_weights, write_json
from onp.errors import CheckpointError, FileError, ModelError, first_line, lacks_memory
from onp.logits import logits_of
from onp.masks import KeepMask, apply_mask
from onp.removable import ChannelMap, map_channels
from onp.tracing import BATCH_NORMS, CONVOLUTIONS
from onp.units import UnitIndex

LARGEST_DEVIATION = 1e-4
"""how far two networks that are to be the same may differ: see `deviation`"""

LAYERS = (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)
"""what can become smaller"""


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A smaller network, and what became of every pruned unit."""

    model: nn.Module
    """of the original's class and keys, on the CPU, in eval mode"""
    input_shape: tuple[int, ...]
    channels: dict[str, dict[str, int]]
    """`outputs` (and `inputs`) of every layer that is smaller now, by module path"""
    removed: tuple[int, ...]
    """pruned units that are physically gone"""
    kept_as_zeros: dict[int, str]
    """pruned units that stay as zeros, each with the reason"""
    deviation: float
    """largest difference of logits from the masked network's, over the largest of those, on the inputs given"""


def shrink(model: nn.Module, mask: KeepMask, inputs: Tensor) -> Shrunk:
    """Cut out of a copy of `model` what `mask` prunes, as far as the logits stay the same for every image.

    `inputs` are real images, normalised, of shape (n, channels, height, width). Where the smaller network fails on them
    or differs by more than `LARGEST_DEVIATION`, the masked network is the result. Raises `ModelError` where the network
    cannot be traced.
    """
    # On the CPU: a GPU's convolutions may round to TF32, and otherwise for other numbers of channels.
    inputs, pruned = inputs.cpu(), copy.deepcopy(model).cpu().eval()
    apply_mask(pruned, mask)
    expected = logits_of(pruned, inputs)
    found = map_channels(pruned, tuple(inputs.shape[1:]))
    smaller, channels = copy.deepcopy(pruned), dict[str, dict[str, int]]()
    for path, slot in found.slots.items():
        layer = smaller.get_submodule(path)
        before = _sizes(layer)
        _cut(layer, found.staying(slot.outputs), None if slot.inputs is None else found.staying(slot.inputs))
        if _sizes(layer) != before:
            channels[path] = _sizes(layer)
    stays = {unit: _reason(found, mask.index, unit) for unit in sorted(mask.pruned)}
    try:
        off = same("the smaller network", logits_of(smaller, inputs), expected)
    except Exception as error:  # whatever the forward() of a user's network raises
        if lacks_memory(error):
            raise
        smaller, channels, off = pruned, {}, 0.0
        stays = dict.fromkeys(stays, f"the network cannot be made smaller: {first_line(error)}")
    removed = tuple(unit for unit, reason in stays.items() if reason is None)
    zeros = {unit: reason for unit, reason in stays.items() if reason is not None}
    return Shrunk(smaller, tuple(inputs.shape[1:]), channels, removed, zeros, off)


def _reason(found: ChannelMap, index: UnitIndex, unit: int) -> str | None:
    """Why a pruned unit's channel stays; None where it goes."""
    layer = index.layers[int(index.layer_of[unit])]
    position = layer.kind == "linear_input"
    slot = found.slots.get(layer.module)
    ids = None if slot is None else slot.inputs if position else slot.outputs
    if ids is None:
        return "its channels cannot be followed through the network"
    reason = found.reasons[int(ids[unit - layer.offset])]
    return f"an input position goes with its whole channel alone: {reason}" if position and reason else reason


# --- files ------------------------------------------------------------------------------------------------


def save_shrunk(shrunk: Shrunk, path: str | Path) -> None:
    """Write the weights as safetensors and, beside them (`.json`), the sizes of the layers that are smaller."""
    path = Path(path)
    write_json(path.with_suffix(".json"), {"input_shape": shrunk.input_shape, "channels": shrunk.channels})
    save_weights(shrunk.model, path)


def load_shrunk(model: nn.Module, path: str | Path) -> nn.Module:
    """The network that `save_shrunk` wrote, from its original `model` (of any weights): on the CPU, in eval mode.

    Reads `path` (safetensors) and the JSON beside it. No layer becomes larger than in `model`, so a hostile file cannot
    make this allocate more than that. Raises `CheckpointError` where the files do not fit the network or each other (a
    network that branches on values shows some of that only when it is used).
    """
    path = Path(path)
    sizes = path.with_suffix(".json")
    try:
        record = read_json(sizes)
        channels, input_shape = record["channels"], record["input_shape"]
    except (FileError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{sizes} does not hold the sizes of a shrunken network ({error!r}); it belongs beside {path.name}"
        ) from error
    smaller = copy.deepcopy(model).cpu().eval()
    layers: dict[str, nn.Module] = {name: part for name, part in smaller.named_modules() if isinstance(part, LAYERS)}
    for name, size in _checked(channels, layers, sizes).items():
        inputs = torch.arange(size["inputs"]) if "inputs" in size else None
        _cut(layers[name], torch.arange(size["outputs"]), inputs)
    load_checkpoint(smaller, path)
    if not _is_shape(input_shape):
        raise CheckpointError(f"{sizes} gives images the shape {str(input_shape)[:80]}, which does not fit any")
    try:
        _run_without_data(model, input_shape)
    except Exception:  # it branches on values, or keeps some that are no buffers: then it cannot tell
        return smaller
    try:
        _run_without_data(smaller, input_shape)
    except Exception as error:
        raise CheckpointError(
            f"the sizes in {sizes} do not fit together or images of {input_shape} ({first_line(error)}); "
            "write the file again"
        ) from error
    return smaller


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(size) is int and 0 < size < 2**16 for size in value)


def _run_without_data(model: nn.Module, input_shape: Any) -> None:
    """One image through a copy without memory or computation, for the sizes alone; raises what `forward` raises."""
    blank = copy.deepcopy(model).to("meta")
    with torch.device("meta"), torch.no_grad():
        blank(torch.empty(1, *input_shape))


def _checked(channels: Any, layers: dict[str, nn.Module], path: Path) -> dict[str, dict[str, int]]:
    """The sizes that a file declares; raises `CheckpointError` where one is no smaller layer of the network."""
    declared: dict[str, Any] = channels if isinstance(channels, dict) else {"channels": channels}
    for name, size in declared.items():
        full = _sizes(layers[name]) if name in layers else {}
        fits = isinstance(size, dict) and set(size) == set(full)
        if not fits or any(type(size[side]) is not int or not 0 < size[side] <= full[side] for side in full):
            raise CheckpointError(
                f"{path} gives {name[:80]!r} the sizes {str(size)[:80]}; "
                f"the network has {full or 'no such layer'} there: whole numbers from 1 up to that are expected"
            )
    return declared


# --- sizes ------------------------------------------------------------------------------------------------


def _sizes(module: nn.Module) -> dict[str, int]:
    """`outputs` of a layer, and `inputs` of one that mixes channels."""
    if isinstance(module, nn.Linear):
        return {"outputs": module.out_features, "inputs": module.in_features}
    if isinstance(module, CONVOLUTIONS):
        inputs = {"inputs": module.in_channels} if module.groups == 1 else {}
        return {"outputs": module.out_channels, **inputs}
    assert isinstance(module, BATCH_NORMS)
    return {"outputs": module.num_features}


def _cut(module: nn.Module, outputs: Tensor, inputs: Tensor | None) -> None:
    """Leave a layer these positions of its outputs and, where it mixes channels, of its inputs."""
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 0:
            continue
        part = tensor.index_select(0, outputs)
        if inputs is not None and tensor.ndim > 1:
            part = part.index_select(1, inputs)
        is_parameter = name in dict(module.named_parameters())
        setattr(module, name, nn.Parameter(part) if is_parameter else part)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = len(outputs)
    elif isinstance(module, CONVOLUTIONS):
        module.groups = module.groups * len(outputs) // module.out_channels if module.groups > 1 else 1
        module.out_channels, module.in_channels = len(outputs), module.weight.shape[1] * module.groups


# --- measures ---------------------------------------------------------------------------------------------


def deviation(logits: Tensor, expected: Tensor) -> float:
    """Largest difference between `logits` and `expected`, both (n, classes), over the largest expected one."""
    off = (logits - expected).abs().max()
    return float(off / expected.abs().max()) if off != 0 else 0.0


def same(name: str, logits: Tensor, expected: Tensor) -> float:
    """The `deviation` of what `name` says; raises `ModelError` where it exceeds `LARGEST_DEVIATION`."""
    off = deviation(logits, expected)
    if not off <= LARGEST_DEVIATION:  # NaN counts as more
        raise ModelError(
            f"the logits of {name} deviate from the masked network's by {off:.1e} of the largest; "
            f"expected at most {LARGEST_DEVIATION:.0e}"
        )
    return off


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of the convolutions and linear layers for one image; `model` is on the CPU, in eval mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *input_shape))
    return counter.get_total_flops() // 2
