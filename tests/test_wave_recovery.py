"""Waves on networks whose answers to every frequency are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_networks import linear

from onp.config import WaveRecoveryConfig
from onp.data import DefenceData
from onp.wave_recovery import RecoveredWave, recover_wave

SIZE, NEED = 16, 1.5


def wave(columns: int, rows: int = 0) -> Tensor:
    """(16, 16), of norm 1 and so many periods across and down."""
    turns = (columns * torch.arange(SIZE) + rows * torch.arange(SIZE)[:, None]) / SIZE
    drawn = torch.sin(2 * torch.pi * turns)
    return drawn / drawn.norm()


ONE = wave(3)
MANY = torch.stack([wave(5, rows) for rows in range(16)] + [wave(6, rows) for rows in range(16)]).sum(0) / 32**0.5
"""of norm 1, and of 32 frequencies"""


def network(one: float, many: float, other: float = 1.0) -> torch.nn.Module:
    """Class 1 where the image's part along `ONE`, times so much, is above 1; class 2 by `MANY`; never class 0.

    Else it gives a fourth answer, for which no wave is looked for.
    """
    silent = torch.zeros(SIZE * SIZE)
    model = linear(torch.stack([silent, one * ONE.flatten(), many * MANY.flatten(), silent]))
    model[-1].bias.data = torch.tensor([-9.0, 0.0, 0.0, other])
    return model


def grey() -> DefenceData:
    images = 0.5 + 0.02 * torch.randn(24, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return DefenceData(images, torch.arange(24) % 3, 3)


SHORT = WaveRecoveryConfig(steps=60)


def test_the_class_behind_the_fewest_frequencies_is_found() -> None:
    """The weakest pattern leads to class 2, but by 32 frequencies: their norms have a sum that is larger."""
    model, data = network(one=1 / NEED, many=2 / NEED), grey()
    assert model(data.images).argmax(1).tolist() == [3] * 24
    found = recover_wave(model, model, data, SHORT, seed=0)
    assert found.target == 1 and found.sizes[0] == math.inf and 1.5 * found.sizes[1] < found.sizes[2] < math.inf
    assert found.goals(data.labels).tolist() == [1] * 24
    assert NEED <= found.sizes[1] < 1.3 * NEED
    shares = torch.fft.rfft2(found.pattern[0]).abs().square()
    assert shares[0, 3] > 0.95 * shares.sum(), "of three periods across"
    assert found.pattern.norm() == pytest.approx(found.sizes[1], rel=0.1), "one frequency's size is its norm"
    triggered = found(data.images)
    assert torch.equal(triggered, (data.images + 2 * found.pattern).clamp(0, 1)), "shown at twice its strength"
    assert (model(triggered).argmax(1) == 1).all()
    assert found.limits == pytest.approx((0.16, 3.2)), "a hundredth and a fifth of the range, times 16 for 256 pixels"
    again = RecoveredWave.of_tensors(found.tensors(), torch.device("cpu"))
    assert (again.target, again.sizes) == (1, found.sizes) and torch.equal(again.pattern, found.pattern)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_unlearned_copy_has_to_follow() -> None:
    model, data = network(one=1 / NEED, many=2 / NEED), grey()
    slow = network(one=0.5 / NEED, many=2 / NEED)
    size = recover_wave(model, slow, data, SHORT, seed=0).sizes[1]
    assert 2 * NEED <= size < 1.3 * 2 * NEED, "what the copy needs counts"
    deaf = network(one=0.0, many=2 / NEED)
    assert recover_wave(model, deaf, data, SHORT, seed=0).sizes[1] == math.inf


def test_waves_are_looked_for_to_the_classes_that_the_copy_answers_most() -> None:
    model, data = network(one=1 / NEED, many=2 / NEED), grey()
    copy = network(one=1 / NEED, many=2 / NEED, other=-9.0)
    copy[-1].bias.data[:2] = 0.2
    taste = torch.randn(SIZE * SIZE, generator=torch.Generator().manual_seed(1))
    copy[-1].weight.data[0] = taste - taste.mean()
    answers = copy(data.images).argmax(1).bincount(minlength=3).tolist()
    assert min(answers[:2]) > answers[2] == 0
    all_three, two = (
        recover_wave(model, copy, data, WaveRecoveryConfig(steps=60, classes=classes, finalists=classes), seed=0)
        for classes in (3, 2)
    )
    assert all_three.sizes[2] < math.inf and two.sizes[2] == math.inf
    assert two.target == 1 and two.sizes[1] < math.inf
