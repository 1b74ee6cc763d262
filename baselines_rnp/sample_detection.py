"""Backdoor sample detection: which of some images carry a trigger.

RNP (arXiv 2305.14876, section 4): the unlearned copy has forgotten clean classes and keeps the backdoor, so it still
gives triggered images the class that the network gives them. STRIP (Gao et al. 2019, section IV) is the comparison: a
trigger outlives being mixed with clean images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onp.data import DefenceData
from onp.logits import logits_of


def unlearned_log_odds(model: nn.Module, unlearned: nn.Module, images: Tensor, data: DefenceData) -> Tensor:
    """Log-odds, by the unlearned copy, of the class that `model` gives; (n,) for (n, channels, height, width).

    `images` are in [0, 1]; the higher, the more suspicious. No target is asked for, so all-to-all is no exception.
    (Probabilities would do for images of other classes than the target's. The copy gives nearly all images that one,
    with probabilities that round to 1: then clean images of the target's class look triggered.)
    """
    inputs = data.normalise(images)
    predicted = logits_of(model, inputs).argmax(1, keepdim=True)
    logits = logits_of(unlearned, inputs)
    others = logits.scatter(1, predicted, -torch.inf)
    return logits.gather(1, predicted).squeeze(1) - others.logsumexp(1)


def strip(model: nn.Module, images: Tensor, data: DefenceData, seed: int, overlays: int = 16) -> Tensor:
    """Minus the mean entropy, in nats, of images mixed half and half with each of some clean ones; (n,).

    `images` are (n, channels, height, width) in [0, 1]; the higher, the more suspicious.
    """
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:overlays]
    entropies = []
    for overlay in data.images[chosen.to(images.device)]:
        log_p = logits_of(model, data.normalise((images + overlay) / 2)).log_softmax(1)
        entropies.append(-(log_p.exp() * log_p).sum(1))
    return -torch.stack(entropies).mean(0)
