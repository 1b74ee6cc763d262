"""Files that run without this project: a `torch.export` program and an ONNX model.

Both take images in [0, 1], of shape (n, channels, height, width), any n > 0: the input normalisation is part of them.
Each is read back and run on real images before it appears under its name.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from onp.checkpoints import write_atomically
from onp.data import Normalisation
from onp.errors import ConfigError, ModelError, first_line, lacks_memory
from onp.logits import logits_of
from onp.shrinking import same

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NONE = Normalisation()
Network = Callable[[Tensor], Tensor]


class Deployable(nn.Module):
    """A network behind its input normalisation: images in [0, 1] to logits, on the CPU, in eval mode."""

    def __init__(self, model: nn.Module, normalise: Normalisation) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu()
        self.normalise = normalise
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))


def export_program(
    model: nn.Module, images: Tensor, path: str | Path, normalise: Normalisation = NONE, expected: Tensor | None = None
) -> float:
    """Write a `torch.export` program (.pt2) of `model`, to be read with `torch.export.load(path).module()`.

    `images` are real ones in [0, 1], of shape (n, channels, height, width). Returns the `deviation` of its logits on
    them from those `expected`, (n, classes); by default the model's own. Raises `ModelError`, and leaves no file, where
    the network cannot be exported or deviates by more than `LARGEST_DEVIATION`.
    """
    network = Deployable(model, normalise)

    def write(file: Path) -> None:
        content = io.BytesIO()  # a file's name would become part of its content
        torch.export.save(_program(network, images), content)
        file.write_bytes(content.getvalue())

    return _write(path, write, lambda file: torch.export.load(file).module(), network, images, expected)


def export_onnx(
    model: nn.Module, images: Tensor, path: str | Path, normalise: Normalisation = NONE, expected: Tensor | None = None
) -> float:
    """Write an ONNX model, with input `images` and output `logits`, and check it with ONNX's checker and onnxruntime.

    Otherwise like `export_program`. Raises `ConfigError` where the packages for ONNX are not installed.
    """
    require_onnx()
    import onnx
    import onnxruntime

    network = Deployable(model, normalise)

    def write(file: Path) -> None:
        program = _program(network, images)
        torch.onnx.export(
            program, (), file, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "n"},),
        )  # fmt: skip
        onnx.checker.check_model(str(file), full_check=True)

    def read(file: Path) -> Network:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    return _write(path, write, read, network, images, expected)


def require_onnx() -> None:
    """Raise `ConfigError` where a package for ONNX is not installed."""
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or leave onnx out")


def _program(network: Deployable, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("n", min=1)
    program = torch.export.export(network, (images[:1].cpu().repeat(2, 1, 1, 1),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write(
    path: str | Path,
    write: Callable[[Path], object],
    read: Callable[[Path], Network],
    network: Deployable,
    images: Tensor,
    expected: Tensor | None,
) -> float:
    """Write a file that, read back, does on `images` what is expected (by default what `network` does), or none."""
    path, images, deviations = Path(path), images.cpu(), list[float]()

    def write_and_check(file: Path) -> None:
        wanted = logits_of(network, images) if expected is None else expected.cpu()
        try:
            write(file)
            reread = read(file)
            one, all_of_them = reread(images[:1]), logits_of(reread, images)
        except Exception as error:  # whatever the exporters and runtimes raise
            if isinstance(error, OSError) or lacks_memory(error):
                raise
            reason = first_line(error)[:200]
            raise ModelError(f"{type(network.model).__name__} cannot be written as {path.name}: {reason}") from error
        deviations.extend(same(path.name, *pair) for pair in ((one, wanted[:1]), (all_of_them, wanted)))

    write_atomically(path, write_and_check)
    return max(deviations)
