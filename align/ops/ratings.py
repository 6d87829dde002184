"""How well the outputs of a regression reward model predict the ratings of people."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.types import NOT_RATED, checked

SAME = 1e-6
"""Sums of weighted ratings that lie no further apart are equal: the rest is rounding."""


def is_rated(label: Tensor) -> Tensor:
    """Where somebody rated, of the same shape."""
    return label != NOT_RATED


@checked
def summary(predicted_B: Float[Tensor, " B"], label_B: Float[Tensor, " B"]) -> dict[str, float]:
    """Of one attribute over the responses that are rated: mean squared error and Pearson correlation.

    Nothing where none is rated, and no correlation where predictions or labels are all alike.
    """
    rated_B = is_rated(label_B)
    predicted, label = predicted_B[rated_B].double(), label_B[rated_B].double()
    if not len(label):
        return {}
    found = {"mse": float((predicted - label).square().mean())}
    centred, other = predicted - predicted.mean(), label - label.mean()
    scale = float(centred.norm() * other.norm())
    return found | {"correlation": float(centred @ other) / scale} if scale > 0 else found


@checked
def goodness(attribute_BA: Float[Tensor, "B A"], weight_A: Float[Tensor, " A"]) -> Float[Tensor, " B"]:
    """``sum_k w_k r_k`` in float32; attributes of weight 0 are not read (HelpSteer2, arXiv 2406.08673)."""
    read = (weight_A != 0).nonzero().squeeze(1)
    return (attribute_BA[:, read].double() @ weight_A[read].double()).float()


@checked
def labelled_goodness(label_BA: Float[Tensor, "B A"], weight_A: Float[Tensor, " A"]) -> Float[Tensor, " B"]:
    """`goodness` of the labels, NaN where an attribute that has a weight is not rated."""
    return goodness(torch.where(is_rated(label_BA), label_BA, torch.nan), weight_A)


@checked
def differences(
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
