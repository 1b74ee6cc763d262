"""The evaluation engine: what a network says about fixed images under many masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onp.masks import KeepMask, masked


class Engine:
    """Logits of one network on one set of inputs, mask by mask.

    `inputs` has shape (n, channels, height, width), already normalised; the network is used in eval mode and
    left as it was.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, batch_size: int = 125) -> None:
        self.model = model.eval()
        self.inputs = inputs
        self.batch_size = batch_size

    def logits(self, mask: KeepMask) -> Tensor:
        """Logits under `mask`, shape (n, classes), float32, detached."""
        with torch.no_grad(), masked(self.model, mask):
            return torch.cat([self.model(batch) for batch in self.inputs.split(self.batch_size)]).float()
