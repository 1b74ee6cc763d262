"""Optimized Neuron Pruning (ONP, arXiv 2405.17746): remove a backdoor from a network with clean images alone.

model = onp.load_model("wide_resnet16_1", "suspect.pth")
data = onp.load_defence_data("images", size=500)
purified = onp.purify(model, data)
print(purified.mask.to_json()["pruned"])
torch.save(purified.model.state_dict(), "purified.pth")
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import envs as envs  # registers onp/NeuronPruning-v0

# PyTorch Geometric compiles a few functions by a deprecated way; nothing that a user could act on.
warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)

if TYPE_CHECKING:
    from onp.data import DefenceData as DefenceData
    from onp.data import Normalisation as Normalisation
    from onp.export import export_onnx as export_onnx
    from onp.export import export_program as export_program
    from onp.finetuning import FinetuneConfig as FinetuneConfig
    from onp.finetuning import finetune as finetune
    from onp.inputs import load_defence_data as load_defence_data
    from onp.inputs import load_model as load_model
    from onp.masks import KeepMask as KeepMask
    from onp.masks import apply_mask as apply_mask
    from onp.masks import masked as masked
    from onp.purification import PurifyConfig as PurifyConfig
    from onp.purification import purify as purify
    from onp.shrinking import load_shrunk as load_shrunk
    from onp.shrinking import save_shrunk as save_shrunk
    from onp.shrinking import shrink as shrink
    from onp.units import UnitIndex as UnitIndex
    from onp.units import index_units as index_units

_HOMES = {
    "DefenceData": "onp.data",
    "FinetuneConfig": "onp.finetuning",
    "KeepMask": "onp.masks",
    "Normalisation": "onp.data",
    "PurifyConfig": "onp.purification",
    "UnitIndex": "onp.units",
    "apply_mask": "onp.masks",
    "export_onnx": "onp.export",
    "export_program": "onp.export",
    "finetune": "onp.finetuning",
    "index_units": "onp.units",
    "load_defence_data": "onp.inputs",
    "load_model": "onp.inputs",
    "load_shrunk": "onp.shrinking",
    "masked": "onp.masks",
    "purify": "onp.purification",
    "save_shrunk": "onp.shrinking",
    "shrink": "onp.shrinking",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the parts may import each other.

    No module of the package may have such a name: once imported, it would take its place.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'onp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
