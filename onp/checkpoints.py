"""Reading and writing weights: strict about keys and shapes, and never unpickling freely."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from onp.errors import CheckpointError, FileError

WRAPPERS = ("state_dict", "net", "model")
"""keys under which published checkpoints keep their weights"""


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights into `model`, which has to have just these keys and shapes.

    Reads safetensors, or PyTorch files with `weights_only=True` and no other way. Weights may lie under
    `state_dict`, `net` or `model`; a `module.` prefix is dropped. Raises `CheckpointError`, with `model`
    unchanged, where the file cannot be read, keys or shapes differ, or a weight is not finite.
    """
    weights = _unwrap(_read(path), path)
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(weights) - optional)
    unexpected = sorted(set(weights) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: missing keys {_some(missing)}, "
            f"unexpected keys {_some(unexpected)}"
        )
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in weights
        if weights[key].shape != expected[key].shape
    ]
    if shapes:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {_some(shapes)}")
    broken = [key for key, value in weights.items() if not bool(torch.isfinite(value.to(expected[key].dtype)).all())]
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinite weights in {_some(broken)}; the file is damaged")
    model.load_state_dict({**expected, **weights})


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist; give a .safetensors or PyTorch file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path} is not a file of plain weights ({reason[0][:120]}); save model.state_dict() and give that file"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path} holds no state dict (a mapping of names to tensors), neither bare nor under {', '.join(WRAPPERS)}"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _some(items: list[str], limit: int = 5) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) + rest) or "none"


def plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, copied to the CPU, every tensor contiguous and in memory of its own."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, atomically."""
    weights = plain_weights(module)
    write_atomically(path, lambda temporary: safetensors.torch.save_file(weights, temporary))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path` and rename it: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, atomically."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises `FileError` where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is no readable JSON ({error}); restore it") from error
