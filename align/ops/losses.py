"""Losses of supervised fine-tuning and reward models, and how well scores predict preferences and ratings.

A loss is a sum with its count; the engine divides the sum by the count over the whole optimizer step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.types import NOT_RATED, checked


@checked
def cross_entropy(
    logprob_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Negative log-likelihood ``-sum_t log pi(token t)``, nats, and the number of tokens."""
    return -torch.where(mask_BT, logprob_BT, 0.0).sum(), mask_BT.sum()


@checked
def bradley_terry(difference_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """``-log sigmoid(d)`` with d = r(chosen) - r(rejected) (Bradley & Terry 1952)."""
    return -F.logsigmoid(difference_P)


@checked
def margin_bradley_terry(difference_P: Float[Tensor, " P"], strength_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """``-log sigmoid(d - m)`` with m the strength of the preference (Touvron et al. 2023, arXiv 2307.09288, section
    3.2.2)."""
    return -F.logsigmoid(difference_P - strength_P)


@checked
def scaled_bradley_terry(difference_P: Float[Tensor, " P"], strength_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """``-m log sigmoid(d)`` with m the strength of the preference (HelpSteer2-Preference, arXiv 2410.01257, section 3).

    The mean over pairs is not divided by the sum of m: a pair of strength 3 counts as three pairs.
    """
    return -strength_P * F.logsigmoid(difference_P)


@checked
def centering(chosen_P: Float[Tensor, " P"], rejected_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """``(r(chosen) + r(rejected))^2``: keeps the scores of a pair around 0, which preferences alone leave open
    (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return (chosen_P + rejected_P).square()


@checked
def squared_error(
    attribute_BA: Float[Tensor, "B A"], label_BA: Float[Tensor, "B A"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """``sum (r - y)^2`` over the attributes that are rated, and how many are (HelpSteer2, arXiv 2406.08673)."""
    rated_BA = label_BA != NOT_RATED
    return torch.where(rated_BA, attribute_BA - label_BA, 0.0).square().sum(), rated_BA.sum().to(attribute_BA.dtype)


# How well score differences predict preferences.

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
def preference_metrics(difference_P: Float[Tensor, " P"]) -> dict[str, float]:
    """Accuracy (a tie is wrong), mean margin and calibration error."""
    return {
        "accuracy": float((difference_P > 0).double().mean()),
        "margin": float(difference_P.double().mean()),
        "calibration_error": expected_calibration_error(difference_P),
    }


# How well the outputs of a regression reward model predict human ratings.

SAME = 1e-6
"""Sums of weighted ratings that lie no further apart are equal: the rest is rounding."""


def is_rated(label: Tensor) -> Tensor:
    """Where somebody rated, of the same shape."""
    return label != NOT_RATED


@checked
def rating_metrics(predicted_B: Float[Tensor, " B"], label_B: Float[Tensor, " B"]) -> dict[str, float]:
    """Of one attribute over the responses that are rated: mean squared error and Pearson correlation.

    Nothing where none is rated, and no correlation where predictions or labels are all alike.
    """
    rated_B = is_rated(label_B)
    predicted, label = predicted_B[rated_B].double(), label_B[rated_B].double()
    if not len(label):
        return {}
    metrics = {"mse": float((predicted - label).square().mean())}
    centred, other = predicted - predicted.mean(), label - label.mean()
    scale = float(centred.norm() * other.norm())
    return metrics | {"correlation": float(centred @ other) / scale} if scale > 0 else metrics


@checked
def goodness(attribute_BA: Float[Tensor, "B A"], weight_A: Float[Tensor, " A"]) -> Float[Tensor, " B"]:
    """``sum_k w_k r_k`` in float32; attributes of weight 0 are not read (HelpSteer2, arXiv 2406.08673)."""
    weighted = (weight_A != 0).nonzero().squeeze(1)
    return (attribute_BA[:, weighted].double() @ weight_A[weighted].double()).float()


@checked
def label_goodness(label_BA: Float[Tensor, "B A"], weight_A: Float[Tensor, " A"]) -> Float[Tensor, " B"]:
    """`goodness` of the labels, NaN where an attribute that has a weight is not rated."""
    return goodness(torch.where(is_rated(label_BA), label_BA, torch.nan), weight_A)


@checked
def rated_differences(
    score_B: Float[Tensor, " B"], label_B: Float[Tensor, " B"], prompt_B: Int[Tensor, " B"]
) -> Float[Tensor, " P"]:
    """Score of the better response less that of the other, for every two responses to one prompt whose labels differ.

    Responses to one prompt are neighbours. A label that is NaN takes part in no pair.
    """
    pairs = [score_B[:0]]
    for apart in range(1, int(prompt_B.bincount().max())):
        better_P = label_B[:-apart] - label_B[apart:]
        known_P = (prompt_B[:-apart] == prompt_B[apart:]) & (better_P.abs() > SAME)
        pairs.append((better_P.sign() * (score_B[:-apart] - score_B[apart:]))[known_P])
    return torch.cat(pairs)
