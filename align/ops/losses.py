"""Losses as sums with their counts: the engine divides one by the other over the whole optimizer step."""

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
