"""Accuracy, margin and calibration on cases worked by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from align.ops import losses


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def slow_calibration(differences: list[float]) -> float:
    """Ten bins of width 0.05 over [0.5, 1], pair by pair."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for d in differences:
        confidence = 1 / (1 + math.exp(-abs(d)))
        bins[min(9, int((confidence - 0.5) / 0.05))].append((confidence, float(d > 0)))
    error = 0.0
    for members in filter(None, bins):
        accuracy = sum(right for _, right in members) / len(members)
        error += len(members) / len(differences) * abs(accuracy - sum(c for c, _ in members) / len(members))
    return error


def test_a_calibrated_model_has_no_error():
    # Four verdicts of confidence 3/4, of which three are right.
    d = logit(0.75)
    error = losses.expected_calibration_error(torch.tensor([d, d, -d, d], dtype=torch.float64))
    assert error == pytest.approx(0, abs=1e-12)


def test_two_bins_by_hand():
    # Confidence 0.77 three times, right once: |1/3 - 0.77| * 3/5. Confidence 0.92 twice, right twice: 0.08 * 2/5.
    a, b = logit(0.77), logit(0.92)
    error = losses.expected_calibration_error(torch.tensor([a, -a, -a, b, b], dtype=torch.float64))
    assert error == pytest.approx(0.6 * (0.77 - 1 / 3) + 0.4 * 0.08, abs=1e-12)


def test_confidences_of_one_bin_are_pooled_and_of_two_bins_are_not():
    # 0.71 wrong and 0.74 right share [0.70, 0.75): |1 - 1.45| / 2. 0.74 and 0.76 do not: (0.74 + 0.24) / 2.
    pooled = losses.expected_calibration_error(torch.tensor([-logit(0.71), logit(0.74)], dtype=torch.float64))
    apart = losses.expected_calibration_error(torch.tensor([-logit(0.74), logit(0.76)], dtype=torch.float64))
    assert pooled == pytest.approx(0.225, abs=1e-12)
    assert apart == pytest.approx(0.49, abs=1e-12)


def test_certain_verdicts_fall_into_the_last_bin():
    assert losses.expected_calibration_error(torch.tensor([100.0, 100.0, -100.0, 100.0])) == pytest.approx(0.25)


def test_a_tie_is_a_wrong_verdict_of_confidence_one_half():
    # It shares the first bin with a right verdict of confidence 0.52: |1 - 1.02| / 2.
    error = losses.expected_calibration_error(torch.tensor([0.0, logit(0.52)], dtype=torch.float64))
    assert error == pytest.approx(0.01, abs=1e-12)


def test_against_a_loop():
    chance = random.Random(0)
    differences = [chance.gauss(0.4, 1.5) for _ in range(500)]
    error = losses.expected_calibration_error(torch.tensor(differences, dtype=torch.float64))
    assert error == pytest.approx(slow_calibration(differences), abs=1e-12)
    assert error > 0.01


def test_summary_counts_a_tie_as_wrong():
    # Right 2 of 4; mean of 2, -1, 0, 3 is 1.
    summary = losses.preference_metrics(torch.tensor([2.0, -1.0, 0.0, 3.0]))
    assert (summary["accuracy"], summary["margin"]) == (0.5, 1.0)
    assert summary["calibration_error"] == pytest.approx(slow_calibration([2.0, -1.0, 0.0, 3.0]), abs=1e-7)
    assert set(summary) == {"accuracy", "margin", "calibration_error"}
