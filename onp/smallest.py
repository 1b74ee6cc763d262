"""How recovered triggers become small: the rule of Neural Cleanse (Wang et al. 2019, section 4).

A trigger's size is a term of the loss that it is optimised by. The weight of the term rises while the trigger works
more surely than it needs to, and falls while it does not work.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Smallest:
    """Of `count` searches side by side, the sizes of the smallest triggers so far that worked.

    A trigger works where it leads at least the fraction `enough` of the images astray. A weight rises by half where it
    leads more than `ample` of them, and falls by a third where fewer than `enough`.
    """

    def __init__(self, count: int, weight: float, enough: float, ample: float, device: torch.device) -> None:
        self.first_weight, self.enough, self.ample = weight, enough, ample
        self.weights, self.success, self.sizes = torch.empty(3, count, device=device)
        for number in range(count):
            self.forget(number)

    def forget(self, number: int) -> None:
        """Begin search `number` anew."""
        self.weights[number], self.success[number], self.sizes[number] = self.first_weight, 0.0, float("inf")

    def record(self, searches: Tensor, sizes: Tensor, hits: Tensor, step: int) -> Tensor:
        """Take in a step of `searches`: sizes, and the fractions of a batch that were led astray; (n,) each.

        Returns whose triggers are the smallest so far that worked, (n,) bool. Weights adapt every five steps.
        """
        success = self.success[searches] = 0.8 * self.success[searches] + 0.2 * hits
        better = (torch.minimum(success, hits) >= self.enough) & (sizes < self.sizes[searches])
        self.sizes[searches[better]] = sizes[better]
        if step % 5 == 4:
            weights = self.weights[searches]
            lowered = torch.where(success < self.enough, weights / 1.5, weights)
            self.weights[searches] = torch.where(success > self.ample, weights * 1.5, lowered)
        return better
