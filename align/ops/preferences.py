"""How well score differences predict preferences."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from align.types import checked

NUM_BINS = 10


@checked
def reliability(difference_P: Float[Tensor, " P"]) -> Float[Tensor, "bins 3"]:
    """Number of verdicts, sum of their confidence and number of right ones, by ten bins of equal width over confidence.

    With d = r(chosen) - r(rejected), a model that believes the Bradley-Terry probability sigmoid(|d|) of its own
    verdict is calibrated when verdicts of confidence c are right in a fraction c of cases. Confidence lies in [0.5, 1].
    """
    confidence_P = difference_P.abs().double().sigmoid()
    right_P = (difference_P > 0).double()
    bin_P = ((confidence_P - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    row_P3 = torch.stack([torch.ones_like(right_P), confidence_P, right_P], 1)
    return row_P3.new_zeros(NUM_BINS, 3).index_add(0, bin_P, row_P3)


@checked
def expected_calibration_error(difference_P: Float[Tensor, " P"]) -> float:
    """``ECE = sum_b n_b / P |accuracy_b - confidence_b|`` over the bins of `reliability` (Guo et al. 2017, arXiv
    1706.04599)."""
    bins = reliability(difference_P)
    return float((bins[:, 2] - bins[:, 1]).abs().sum() / len(difference_P))


@checked
def summary(difference_P: Float[Tensor, " P"]) -> dict[str, float]:
    """Accuracy (a tie is wrong), mean margin and calibration error."""
    return {
        "accuracy": float((difference_P > 0).double().mean()),
        "margin": float(difference_P.double().mean()),
        "calibration_error": expected_calibration_error(difference_P),
    }
