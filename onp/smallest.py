"""How recovered triggers become small: the search of Neural Cleanse (Wang et al. 2019, section 4).

Triggers are optimised side by side on clean images. A trigger's size is a term of its loss, whose weight rises while
the trigger works more surely than it needs to, and falls while it does not work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onp.config import TriggerRecoveryConfig, WarpRecoveryConfig, WaveRecoveryConfig
from onp.data import DefenceData
from onp.layout import fastest_layout

AT_ONCE = 2**22
"""pixel values that go through the networks at once, unless one search alone needs more"""


class SmallestTrigger(ABC):
    """The smallest trigger to a class, and how large that to any other class has to be."""

    target: int
    """class with the smallest trigger"""
    sizes: tuple[float, ...]
    """per class, the size of its smallest trigger; infinite where none worked or was looked for"""

    @property
    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """The least and the largest size that a trigger of this kind counts as."""

    @property
    def lead(self) -> float:
        """How many times as large as the smallest trigger that of the runner-up's class is."""
        smallest, rival = sorted(self.sizes)[:2]
        return lead(smallest, rival, *self.limits)

    def goals(self, labels: Tensor) -> Tensor:
        """The classes that it leads images of classes `labels` to, (n,)."""
        return torch.full_like(labels, self.target)


def lead(size: float, rival: float, least: float, most: float) -> float:
    """How many times as large as `size` the rival's is, at least 1; both count as within `least` and `most`."""
    first, second = (min(max(value, least), most) for value in (size, rival))
    return max(second / first, 1.0)


class SmallestSearch(ABC):
    """Of searches side by side, one for each of `targets`, the smallest triggers so far that worked.

    A trigger works where it leads at least the fraction `enough` of the images astray. A weight rises by half where it
    leads more than `ample` of them, and falls by a third where fewer than `enough`. A subclass says what triggers are
    made of.
    """

    enough, ample = 0.95, 0.98
    betas = (0.5, 0.9)
    """of Adam"""
    variables: tuple[Tensor, ...]
    """what Adam steps on, (searches, ...) each"""
    found: tuple[Tensor, ...]
    """what the smallest triggers are made of, (searches, ...) each"""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        data: DefenceData,
        config: TriggerRecoveryConfig | WarpRecoveryConfig | WaveRecoveryConfig,
        seed: int,
        targets: Tensor,
    ) -> None:
        self.networks, self.data, self.config = networks, data, config
        self.generator = torch.Generator().manual_seed(seed)
        self.layout = fastest_layout(networks[0], data.input_shape, learns=False)
        self.targets = targets.to(data.images.device)
        self.weights, self.success, self.sizes = torch.empty(3, len(targets), device=data.images.device)
        for number in range(len(targets)):
            self.forget(number)

    @abstractmethod
    def trigger(self, images: Tensor, *variables: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Triggered `images`, (n, batch, channels, height, width), sizes, (n,), and what the triggers are made of."""

    def aim(self, inputs: Tensor, targets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and success, (n,) each, of `inputs`: the images `numbers` with a trigger. Every network has to agree."""
        answers = [towards(network(inputs), targets) for network in self.networks]
        losses, hits = (torch.stack(values) for values in zip(*answers, strict=True))
        return losses.sum(0), hits.all(0)

    def forget(self, number: int) -> None:
        """Begin search `number` anew."""
        self.weights[number], self.success[number], self.sizes[number] = self.config.size_weight, 0.0, float("inf")

    def promising(self, searches: Tensor, count: int) -> Tensor:
        """The `count` of `searches` with the smallest triggers; of those without, the ones that are nearest to one."""
        order = sorted(searches.tolist(), key=lambda number: (float(self.sizes[number]), -float(self.success[number])))
        return torch.tensor(sorted(order[:count]))

    def optimise(self, searches: Tensor) -> None:
        """Shrink the triggers of `searches`, (n,)."""
        config, data = self.config, self.data
        searches = searches.to(data.images.device)
        batch = min(config.batch_size, len(data))
        width = max(1, AT_ONCE // (batch * data.images[0].numel()))
        variables = [values[searches].clone().requires_grad_() for values in self.variables]
        optimizer = torch.optim.Adam(variables, config.learning_rate, betas=self.betas)
        for step in range(config.steps):
            chosen = torch.randint(len(data), (batch,), generator=self.generator).to(searches.device)
            optimizer.zero_grad()
            parts = [
                self._climb(searches[part], [values[part] for values in variables], chosen)
                for part in torch.arange(len(searches), device=searches.device).split(width)
            ]
            sizes, hits, *made = (torch.cat(values) for values in zip(*parts, strict=True))
            better = self._record(searches, sizes, hits, step)
            for smallest, values in zip(self.found, made, strict=True):
                smallest[searches[better]] = values[better]
            optimizer.step()
        for kept, values in zip(self.variables, variables, strict=True):
            kept[searches] = values.detach()

    def _climb(self, searches: Tensor, variables: list[Tensor], chosen: Tensor) -> list[Tensor]:
        """Add to the gradients what `searches` say on the images `chosen`.

        Returns sizes, the fractions of the images that were led astray, and what the triggers are made of, (n, ...).
        """
        triggered, sizes, made = self.trigger(self.data.images[chosen], *variables)
        inputs = self.data.normalise(triggered.flatten(0, 1)).contiguous(memory_format=self.layout)
        targets = self.targets[searches].repeat_interleave(len(chosen))
        losses, hits = (
            values.float().view(len(searches), len(chosen)).mean(1)
            for values in self.aim(inputs, targets, chosen.repeat(len(searches)))
        )
        (losses + self.weights[searches] * sizes).sum().backward()
        return [values.detach() for values in (sizes, hits, *made)]

    def _record(self, searches: Tensor, sizes: Tensor, hits: Tensor, step: int) -> Tensor:
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


def towards(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and success, (n,) each, where class `targets` is searched for."""
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets
