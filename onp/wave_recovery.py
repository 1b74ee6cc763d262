"""Recover the wave that a network may hide, from clean images.

A trigger may be spread over the whole image and be simple in its frequencies alone, as a sinusoid is (SIG, Barni et al.
2019). No mask is a part of it, and patterns that are weaker lead to other classes in clean networks too; but the
unlearned copy answers the backdoor's most. So for every class the pattern of the fewest and weakest frequencies is
optimised that leads both the network and its unlearned copy there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.config import WaveRecoveryConfig
from onp.data import DefenceData
from onp.freezing import frozen
from onp.logits import logits_of
from onp.smallest import SmallestSearch, SmallestTrigger


@dataclass(frozen=True, eq=False)
class RecoveredWave(SmallestTrigger):
    """The smallest wave that works, and the evidence against every class."""

    target: int
    """class with the smallest wave"""
    pattern: Tensor
    """(channels, height, width), in units of images in [0, 1]; 0 where no wave worked"""
    sizes: tuple[float, ...]
    """per class, the norms of the frequencies of its smallest wave, summed; infinite where none worked or was sought"""

    def __call__(self, images: Tensor) -> Tensor:
        """Add it to images of shape (n, channels, height, width) in [0, 1], doubled as a `Patch` is."""
        return (images + 2 * self.pattern).clamp(0, 1)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest size that a wave counts as: of a hundredth and a fifth of the pixels' range.

        In the root mean square, of one frequency. What is weaker is no wave, what is stronger no hidden one.
        """
        norm = self.pattern.numel() ** 0.5
        return 0.01 * norm, 0.2 * norm

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, for keeping."""
        return {"pattern": self.pattern.cpu(), "sizes": torch.tensor(self.sizes, dtype=torch.float64)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> RecoveredWave:
        """The inverse of `tensors`."""
        sizes = tensors["sizes"]
        return cls(int(sizes.argmin()), tensors["pattern"].to(device), tuple(sizes.tolist()))


def recover_wave(
    model: nn.Module, unlearned: nn.Module, data: DefenceData, config: WaveRecoveryConfig, seed: int
) -> RecoveredWave:
    """Optimise the waves of several classes side by side, and the most promising ones for as long again.

    Of many classes those that the `unlearned` copy of `model` answers most: a target is hardly ever far down.
    """
    logits = logits_of(unlearned.eval(), data.inputs)
    answers = logits.argmax(1).bincount(minlength=logits.shape[1]) + logits.softmax(1).mean(0)  # which settles ties
    most = answers[: data.num_classes].argsort(descending=True, stable=True)[: config.classes].sort().values.cpu()
    with frozen(model), frozen(unlearned):
        search = _Search((model, unlearned), data, config, seed, most)
        every = torch.arange(len(most))
        search.optimise(every)
        search.optimise(search.promising(every, config.finalists))
    sizes = torch.full((data.num_classes,), float("inf"))
    sizes[most] = search.sizes.cpu()
    return RecoveredWave(int(sizes.argmin()), search.patterns[search.sizes.argmin()], tuple(sizes.tolist()))


class _Search(SmallestSearch):
    """Smallest working waves so far, and where their optimisation stands, for each of `targets`."""

    def __init__(
        self,
        networks: tuple[nn.Module, ...],
        data: DefenceData,
        config: WaveRecoveryConfig,
        seed: int,
        targets: Tensor,
    ) -> None:
        super().__init__(networks, data, config, seed, targets)
        (channels, height, width), classes, device = data.input_shape, len(targets), data.images.device
        columns = width // 2 + 1
        # Adam leaves no frequency at 0, but a product of two numbers that shrink: real and imaginary parts of every
        # channel, and what they have in common.
        common = torch.full((classes, 1, height, columns, 1), config.first_amplitude**0.5, device=device)
        # Drawn for all classes, so that none begins otherwise because others are sought.
        parts = torch.randn(data.num_classes, channels, height, columns, 2, generator=self.generator)[targets].to(
            device
        )
        self.variables = common, (config.first_amplitude / (2 * channels)) ** 0.5 * parts
        mirrored = torch.ones(columns, device=device)
        mirrored[1 : (width + 1) // 2] = 2  # of a real image's spectrum half is kept
        self.weight_of_column = mirrored.sqrt()
        self.patterns = torch.zeros(classes, channels, height, width, device=device)
        self.found = (self.patterns,)

    def trigger(self, images: Tensor, *variables: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        common, parts = variables
        spectrum = common * parts
        patterns = torch.fft.irfft2(torch.view_as_complex(spectrum), s=images.shape[2:], norm="ortho")
        amplitudes = spectrum.square().sum((1, 4)).add(1e-12).sqrt()
        sizes = (amplitudes * self.weight_of_column).sum((1, 2))
        return (images + patterns[:, None]).clamp(0, 1), sizes, (patterns,)
