"""How far verdicts of a judge are from those of people.

A verdict on two responses is a row of three numbers: the score of the first, the score of the second (1 to 5), and the
ranking (1: the first is much better, 6: the second is). In a verdict that could not be read all are NaN; in a label,
NaN is a number that nobody gave.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.types import checked

MIDDLE = 3.5
"""The ranking that prefers neither response."""


@checked
def verdict_reward(
    verdict_B3: Float[Tensor, "B 3"],
    label_B3: Float[Tensor, "B 3"],
    format_penalty: float,
    score_weight: float,
    ranking_weight: float,
) -> Float[Tensor, " B"]:
    """``R = -c (|s_1 - s*_1| + |s_2 - s*_2|) - C2 |r - r*|``, and ``-C1`` for a verdict that cannot be read (Nemotron 3
    Nano's report, with C1 = 10 and c = C2 = 1). A term without a label is left out."""
    weight_3 = verdict_B3.new_tensor([score_weight, score_weight, ranking_weight])
    distance_B3 = torch.where(label_B3.isfinite(), (verdict_B3 - label_B3).abs(), 0.0)
    return torch.where(is_unreadable(verdict_B3), -format_penalty, -(distance_B3 * weight_3).sum(1))


@checked
def is_unreadable(verdict_B3: Float[Tensor, "B 3"]) -> Bool[Tensor, " B"]:
    """Which verdicts could not be read."""
    return verdict_B3.isnan().any(1)


@checked
def verdict_errors(verdict_B3: Float[Tensor, "B 3"], label_B3: Float[Tensor, "B 3"]) -> dict[str, float]:
    """Percent of verdicts that cannot be read (``format_violations``), and of the others the mean distance from the
    label: ``ranking_error``, and ``score_error`` where there are such labels."""
    distance_B3 = (verdict_B3 - label_B3).abs().double()
    metrics = {"format_violations": 100.0 * float(is_unreadable(verdict_B3).double().mean())}
    for name, error in (("ranking_error", distance_B3[:, 2]), ("score_error", distance_B3[:, :2])):
        labeled = error[error.isfinite()]
        metrics |= {name: float(labeled.mean())} if len(labeled) else {}
    return metrics


@checked
def verdict_agreement(verdict_B3: Float[Tensor, "B 3"], label_B3: Float[Tensor, "B 3"]) -> dict[str, float]:
    """How often verdicts side with people, in percent of pairs; rows 2i and 2i + 1 are a pair and the same pair in the
    other order.

    ``agreement``: by the mean of both rankings, the second one turned round. ``first_order``: by the first alone.
    A ranking that cannot be read prefers neither, and to prefer neither is wrong. ``order_consistency``: of the pairs
    both of whose verdicts can be read, where there are any, those of which both rankings prefer the same response, or
    neither.
    """
    lean_P2 = torch.where(is_unreadable(verdict_B3), 0.0, verdict_B3[:, 2] - MIDDLE).view(-1, 2)
    first_P, second_P = lean_P2[:, 0], -lean_P2[:, 1]
    label_P = label_B3[0::2, 2] - MIDDLE
    percent = lambda right_P: 100.0 * float(right_P.double().mean())  # noqa: E731
    metrics = {
        "agreement": percent((first_P + second_P) * label_P > 0),
        "first_order": percent(first_P * label_P > 0),
    }
    read_P = ~is_unreadable(verdict_B3).view(-1, 2).any(1)
    same_P = (first_P.sign() == second_P.sign())[read_P]
    return metrics | ({"order_consistency": percent(same_P)} if len(same_P) else {})
