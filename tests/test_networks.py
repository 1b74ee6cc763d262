"""torchvision's families: every hidden layer has its units, and masks mean the same by every way."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from envs.pruning import PruningEnv
from onp.bench.networks import randomise
from onp.checks import check_network
from onp.config import EnvConfig, TriggerRecoveryConfig, UnlearnConfig, WarpRecoveryConfig, WaveRecoveryConfig
from onp.data import DefenceData
from onp.engine import Engine
from onp.errors import ModelError
from onp.masks import KeepMask, apply_mask, masked
from onp.models import build_model
from onp.shrinking import shrink
from onp.units import index_units


def vgg16(batch_norm: bool) -> nn.Module:
    """Without the 100 million weights of its classifier."""
    layers = make_layers(cfgs["D"], batch_norm=batch_norm)
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(512, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10))


def vision_transformer() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (lambda name=name: build_model(name, 3, 10), 32) for name in (
        "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "googlenet",
        "convnext_tiny")},
    "inception_v3": (lambda: build_model("inception_v3", 3, 10), 75),
    "vgg16": (lambda: vgg16(batch_norm=False), 32),
    "vgg16_bn": (lambda: vgg16(batch_norm=True), 32),
    "vision_transformer": (vision_transformer, 32),
}  # fmt: skip


def hidden_outputs(model: nn.Module) -> int:
    """Output channels and neurons of all layers but the last, and but auxiliary classifiers and attentions' own."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.lower().startswith("aux") and "out_proj" not in name
    ]
    return sum(module.weight.shape[0] for _, module in layers[:-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model, generator = build(), torch.Generator().manual_seed(0)
    randomise(model, generator)
    index = index_units(model, (3, size, size))
    assert index.untraced == ()
    assert sum(layer.size for layer in index if layer.kind in ("conv", "linear")) == hidden_outputs(model)
    norms = [module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
             if not path.lower().startswith("aux")]  # fmt: skip
    assert int(index.batch_norm_units.sum()) == sum(norm.num_features for norm in norms)
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    heads = sum(layer.size for layer in index if layer.kind == "head")
    assert heads == sum(attention.num_heads for attention in attentions)
    blind = {layer.name for layer in index.layers[1:] if layer.reads is None}  # the first reads the image
    assert blind == set()

    inputs = torch.rand(2, 3, size, size, generator=generator)
    engine = Engine(model, index, inputs)
    logits = []
    for share in (0.0, 0.01, 0.2):
        mask, pruned = KeepMask(index, torch.rand(len(index), generator=generator) >= share), copy.deepcopy(model)
        apply_mask(pruned, mask)
        with torch.no_grad(), masked(model, mask):
            logits.append(pruned(inputs))
            assert torch.equal(model(inputs), logits[-1])
        assert (engine.logits(mask) - logits[-1]).abs().max() <= 1e-5 * logits[-1].abs().max()
    assert (logits[2] - logits[0]).abs().max() > 1e-3 * logits[0].abs().max()


@pytest.mark.parametrize(("name", "hidden"), [("vision_transformer", ".mlp.0"), ("convnext_tiny", ".block.3")])
def test_hidden_neurons_between_tokens_are_cut_out(name: str, hidden: str) -> None:
    """And no other unit: the stream, which layer-norm reads, keeps its width, and so do heads."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model, generator = build(), torch.Generator().manual_seed(0)
    randomise(model, generator)
    index = index_units(model, (3, size, size))
    mask = KeepMask(index, torch.rand(len(index), generator=generator) >= 0.3)
    shrunk = shrink(model, mask, torch.rand(2, 3, size, size, generator=generator))
    own = {unit for layer in index if layer.name.endswith(hidden) for unit in layer.units}
    assert set(shrunk.removed) == own & mask.pruned != set()
    apply_mask(model, mask)
    others = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(shrunk.model(others), model(others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "vision_transformer"])
def test_the_environment_prunes_them(name: str) -> None:
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model, generator = build(), torch.Generator().manual_seed(0)
    randomise(model, generator)
    data = DefenceData(torch.rand(20, 3, size, size, generator=generator), torch.arange(20) % 10, 10)
    short = EnvConfig(
        max_steps=3,
        unlearn=UnlearnConfig(max_epochs=1),
        recovery=TriggerRecoveryConfig(steps=2),
        warp=WarpRecoveryConfig(steps=2),
        wave=WaveRecoveryConfig(steps=2),
    )
    env = PruningEnv(model, data, short)
    observation, _ = env.reset()
    assert observation["kept"].all() and bool(env.graph.x.isfinite().all())
    last = {layer.kind: layer.offset for layer in env.index}
    unit = last["head" if "head" in last else "linear_input"]
    observation, reward, _, _, info = env.step(unit)
    assert info["units_pruned"] == 1 and observation["kept"][unit] == 0 and np.isfinite(reward)
    bulk = max(range(len(env.actions.bulks)), key=lambda number: env.actions.bulks[number].count)
    _, _, _, _, info = env.step(len(env.index) + bulk)
    assert info["units_pruned"] == 1 + env.actions.bulks[bulk].count and info["invalid_actions"] == 0


def test_the_command_lists_networks_and_those_that_it_cannot_treat(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n\n\n"
        "def refused():\n    return Net(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))\n\n\n"
        "def good():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "onp.bench", "networks", "--networks", "mine.py:refused", "mine.py:good", "nonsense",
         "--image-size", "8", "--threads", "1", "--no-onnx", "--json", "rows.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, good, unknown = json.loads((tmp_path / "rows.json").read_text())
    assert "cannot trace Net" in refused["error"] and "mine.py:refused: cannot trace Net" in done.stdout
    assert "unknown model 'nonsense'" in unknown["error"]
    assert good["error"] is None and good["untraced"] == {}
    assert good["units"] == {"conv": 4, "batch_norm": 0, "linear": 0, "linear_input": 144, "head": 0}
    assert (good["parameters"], good["groups"], good["masked_deviation"]) == (3 * 4 * 9 + 4 + 144 * 2 + 2, 148, 0)
    assert good["engine_deviation"] < 1e-5 and good["onnx_deviation"] is None


class Auxiliary(nn.Module):
    """Gives its features beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convolution(images).relu().flatten(1)
        return self.linear(features), features


def test_a_network_that_gives_more_than_logits() -> None:
    with pytest.raises(ModelError, match="Auxiliary gives something else than one tensor; wrap it"):
        index_units(Auxiliary(), (3, 8, 8))
    data = DefenceData(torch.rand(6, 3, 8, 8), torch.arange(6) % 3, 3)
    with pytest.raises(ModelError, match=r"Auxiliary gives a tuple for 2 images; expected logits of shape \(2, cla"):
        check_network(Auxiliary(), data)
