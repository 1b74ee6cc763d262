"""Reading and writing weights: strict about keys and shapes, and never unpickling freely."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from onp.errors import CheckpointError, FileError, MisfitError, first_line, lacks_memory

WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
"""keys under which published checkpoints keep their weights"""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load weights into `model`, which has to have just these keys and shapes.

    Reads safetensors, or PyTorch files with `weights_only=True` and no other way. Weights may lie under
    `state_dict`, `net` or `model`; a `module.` prefix of all keys is dropped; the log says so. Raises
    `CheckpointError`, with `model` unchanged, where the file cannot be read or a weight is not finite, and its
    `MisfitError` where keys, types or shapes differ. What it costs in memory is bounded by the file and the network,
    whatever the file declares (PyTorch's format of before 1.6 may reserve more, which is never touched).
    """
    path = Path(path)
    weights = _unwrap(_read(path), path)
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(weights) - optional)
    unexpected = sorted(set(weights) - set(expected))
    if missing or unexpected:
        raise MisfitError(
            f"{path} does not fit {type(model).__name__}: missing keys {_some(missing)}, "
            f"unexpected keys {_some(unexpected)}"
        )
    types = [
        f"{key} is {_kind(value)}, expected {_kind(expected[key])}"
        for key, value in weights.items()
        if not _is_plain(value) or not _may_become(value.dtype, expected[key].dtype)
    ]
    if types:
        raise MisfitError(f"{path} does not fit {type(model).__name__}: {_some(types)}; give plain, dense weights")
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in weights
        if weights[key].shape != expected[key].shape
    ]
    if shapes:
        raise MisfitError(f"{path} does not fit {type(model).__name__}: {_some(shapes)}")
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
        return _read_pytorch(path)
    except Exception as error:
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"{path} is not a file of plain weights ({_reason(error)}); give one of model.state_dict(), "
            "and load no pickled model where a stranger's program could do harm (SECURITY.md)"
        ) from error


def _reason(error: Exception) -> str:
    """Of PyTorch's refusals without its advice how to load the file all the same."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)[:120]
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {found[1]}, which would run on loading" if found else "it holds more than tensors"


def _read_pytorch(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:  # PyTorch compresses nothing; what claims to hold more than the file would fill the memory
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its part {damaged} is damaged")
    with _no_further_types():
        # Mapped, a storage ends where the file does, whatever size it declares.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


@contextmanager
def _no_further_types() -> Iterator[None]:
    """Inside, `weights_only=True` allows what PyTorch needs for tensors, and nothing that a library has added."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def _may_become(found: torch.dtype, wanted: torch.dtype) -> bool:
    return found == wanted or found in (FLOATS if wanted.is_floating_point else INTEGERS)


def _is_plain(value: Tensor) -> bool:
    dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    return dense and value.device.type == "cpu" and type(value) in (Tensor, nn.Parameter)


def _kind(value: Tensor) -> str:
    return f"{'' if _is_plain(value) else f'a {value.layout} {type(value).__name__} of '}{value.dtype}".replace(
        "torch.", ""
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    found = []
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            found.append(f"weights under {key!r}")
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise CheckpointError(
            f"{path} holds no state dict (a mapping of names to tensors), neither bare nor under {', '.join(WRAPPERS)}"
        )
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
        found.append("prefix 'module.' dropped")
    if found:
        logger.info("%s: %s", path, ", ".join(found))
    return dict(content)


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
    write_tensors(path, plain_weights(module))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    content = safetensors.torch.save(tensors)  # written by Python, which says what is wrong with a disk
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The content of a safetensors file of ours; raises `FileError` where it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise FileError(f"{path} is no readable safetensors file ({error}); restore it") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path` and rename it: the file is there whole or not at all.

    Raises `OSError` where it cannot be written; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut might leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # rather than the temporary one, or none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whatever the locale's encoding, atomically; bytes of file names that are none are escaped."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, atomically."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises `FileError` where it cannot be read."""
    if not path.is_file():  # a pipe would wait for ever
        raise FileError(f"{path} is no readable JSON (there is no such file); restore it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is no readable JSON ({error}); restore it") from error
