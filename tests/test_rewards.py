"""Reward terms against computations by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.rewards import (
    TERMS,
    Outputs,
    clean_accuracy,
    clean_fidelity,
    trigger_resistance,
    unlearning,
)
from onp.config import RewardConfig


def logits(*probabilities: list[float]) -> Tensor:
    """Logits of the given rows of probabilities, shifted by what softmax has to ignore."""
    return torch.tensor(probabilities).log() + 3


def outputs(**changes: Any) -> Outputs:
    sure = logits([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    kept = torch.ones(3, dtype=torch.bool)
    given = Outputs(torch.tensor([0, 1]), sure, sure, sure, sure, torch.tensor([2, 2]), trust=0.5, kept=kept)
    return replace(given, **changes)


# --- terms ----------------------------------------------------------------------------------------------


def test_clean_accuracy() -> None:
    right_wrong = logits([0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    assert float(clean_accuracy(outputs(pruned=right_wrong))) == 0.5
    assert float(clean_accuracy(outputs())) == 1.0


def test_clean_fidelity_is_minus_the_divergence_from_the_original() -> None:
    pruned = logits([0.25, 0.5, 0.25], [0.25, 0.25, 0.5])
    # KL(original || pruned): row 0: .5 ln 2 - .25 ln 2; row 1: .5 ln 2 - .25 ln 2
    assert float(clean_fidelity(outputs(pruned=pruned))) == pytest.approx(-0.25 * math.log(2), abs=1e-6)
    assert float(clean_fidelity(outputs())) == pytest.approx(0, abs=1e-6)
    lopsided = logits([0.8, 0.1, 0.1], [0.25, 0.5, 0.25])  # not symmetric: which is the reference matters
    expected = -(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(2.5)) / 2
    assert float(clean_fidelity(outputs(pruned=lopsided))) == pytest.approx(expected, abs=1e-6)


def test_unlearning_is_minus_log_cross_entropy_with_a_floor() -> None:
    collapsed = logits([0.01, 0.01, 0.98], [0.02, 0.02, 0.96])
    loss = -(math.log(0.01) + math.log(0.02)) / 2
    assert float(unlearning(outputs(unlearned=collapsed, trust=0.0))) == pytest.approx(-math.log(loss), abs=1e-5)
    floored = -math.log(0.5 * math.log(3))
    for confidence in (0.9, 0.999):  # cross-entropies below half of a uniform guess's
        rest = (1 - confidence) / 2
        healed = logits([confidence, rest, rest], [rest, confidence, rest])
        assert float(unlearning(outputs(unlearned=healed, trust=0.0))) == pytest.approx(floored, abs=1e-6)
    above = logits([0.55, 0.225, 0.225], [0.225, 0.55, 0.225])  # -log 0.55 = 0.598 > 0.549
    assert float(unlearning(outputs(unlearned=above, trust=0.0))) == pytest.approx(-math.log(-math.log(0.55)), abs=1e-5)
    for trust, part in ((0.5, 0.55), (1.0, 0.1)):  # a trusted trigger leaves it a tenth
        assert float(unlearning(outputs(unlearned=collapsed, trust=trust))) == pytest.approx(
            -part * math.log(loss), abs=1e-5
        )


def test_trigger_resistance_is_minus_the_log_odds_of_success_times_trust() -> None:
    triggered = logits([0.1, 0.1, 0.8], [0.3, 0.3, 0.4])  # success 0.6: odds 3 to 2
    assert float(trigger_resistance(outputs(triggered=triggered))) == pytest.approx(-0.5 * math.log(1.5), abs=1e-6)
    for target in (0, 1):  # success 0.2: odds 1 to 4
        other = outputs(triggered=triggered, goals=torch.tensor([target, target]), trust=1.0)
        assert float(trigger_resistance(other)) == pytest.approx(math.log(4), abs=1e-6)
    assert float(trigger_resistance(outputs(triggered=triggered, trust=0.0))) == 0
    apart = outputs(triggered=triggered, goals=torch.tensor([0, 2]), trust=1.0)  # success 0.25: odds 1 to 3
    assert float(trigger_resistance(apart)) == pytest.approx(math.log(3), abs=1e-6)
    one_of_two = logits([0.999, 0.0005, 0.0005], [0.0005, 0.0005, 0.999])
    odds = 0.9995 / 1.0005  # of the mean over images; the mean of the two log-odds is another number
    assert float(trigger_resistance(outputs(triggered=one_of_two))) == pytest.approx(-0.5 * math.log(odds), abs=1e-5)


@pytest.mark.parametrize(
    ("success", "odds"),
    [(0.99, 99), (0.999, 999), (0.002, 1 / 499), (0.001, 1 / 999), (0.0009, 1 / 999), (0.00001, 1 / 999)],
)
def test_trigger_resistance_tells_high_successes_apart_and_low_ones_not(success: float, odds: float) -> None:
    rest = (1 - success) / 2
    row = [rest, rest, success]
    found = float(trigger_resistance(outputs(triggered=logits(row, row))))
    assert found == pytest.approx(-0.5 * math.log(odds), abs=1e-4)


def test_trigger_resistance_stays_finite_where_probabilities_underflow() -> None:
    sure = torch.tensor([[0.0, 0.0, 200.0], [0.0, 0.0, 200.0]])  # 2 e^-200 against 1
    assert float(trigger_resistance(outputs(triggered=sure))) == pytest.approx(-0.5 * (200 - math.log(2)), rel=1e-5)
    assert float(trigger_resistance(outputs(triggered=-sure))) == pytest.approx(0.5 * math.log(999), abs=1e-5)


def test_terms_carry_the_names_of_their_weights() -> None:
    assert set(TERMS) == set(vars(RewardConfig()))
