"""SteerLM: labels from ratings, the probability of labels, and the group objective of SteerLM 2.0 (HelpSteer2, arXiv
2406.08673, section 4 and appendix).

With n samples y_i of Q'(y|a, x), P(y|x) of a model that is told no attributes, and Q the policy that learns:

    w'_i = softmax_i( log P(a|x, y_i) + log P(y_i|x) - log Q'(y_i|a, x) )
    b'_i = softmax_i( log Q(y_i|a, x) - log Q'(y_i|a, x) )
    L    = - sum_i (w'_i - b'_i) log Q(y_i|a, x)          no gradient through w' and b'

whose gradient is that of KL(w' || b').
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.config.steerlm import LABEL_MAX
from align.types import checked

CONCENTRATION = 24.0
"""alpha + beta of the Beta distribution of an attribute (HelpSteer2)."""
FLOOR = -100.0
"""Smallest log-probability of a label, nats: what a rating of exactly 0 or 4 leaves for the other labels, so that no
weight is infinite. Others lie below it only within 1e-26 of these."""
KL_EPSILON = 1e-8
"""Added to both weights in `divergence`; NeMo-Aligner."""

_NODES, _WEIGHTS = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(64))


@checked
def labels(rating_BA: Float[Tensor, "B A"]) -> Int[Tensor, "B A"]:
    """Ratings limited to 0 to 4 and rounded, halves to the even number, as NeMo-Aligner's annotation does."""
    return rating_BA.clamp(0, LABEL_MAX).round().long()


@checked
def beta_bins(rating_BA: Float[Tensor, "B A"]) -> Float[Tensor, "B A L"]:
    """log P(a = n | x, y) of the labels n = 0 to 4, float64, at least `FLOOR`.

    With r the rating limited to 0 to 4 and divided by 4, ``P(a = n) = F((n + 1) / 5) - F(n / 5)`` where F is the
    distribution function of Beta(24 r, 24 (1 - r)). Each bin is integrated separately (Gauss-Legendre with 64 nodes, in
    logarithms), so that small ones keep their digits; the bin at an end where the density may be infinite is what the
    others leave.
    """
    alpha_BA = CONCENTRATION * (rating_BA.double().clamp(0, LABEL_MAX) / LABEL_MAX)[..., None, None]
    beta_BA = CONCENTRATION - alpha_BA
    width = 1.0 / (LABEL_MAX + 1)
    label_L = torch.arange(LABEL_MAX + 1, device=rating_BA.device)
    node_N, weight_N = _NODES.to(rating_BA.device), _WEIGHTS.to(rating_BA.device)
    at_LN = width * (label_L.double()[:, None] + (node_N + 1) / 2)
    density = (alpha_BA - 1) * at_LN.log() + (beta_BA - 1) * (-at_LN).log1p()
    scale_BA = torch.lgamma(alpha_BA) + torch.lgamma(beta_BA) - torch.lgamma(alpha_BA + beta_BA)
    bin_BAL = (density - scale_BA + (weight_N * width / 2).log()).logsumexp(-1)
    low_BA = alpha_BA[..., 0, 0] < CONCENTRATION / 2
    end_BAL = torch.where(low_BA[..., None], label_L == 0, label_L == LABEL_MAX)
    others_BA = torch.where(end_BAL, 0.0, bin_BAL.exp()).sum(-1, keepdim=True)
    return torch.where(end_BAL, (-others_BA).log1p(), bin_BAL).clamp(min=FLOOR)


@checked
def attribute_logprob(rating_BA: Float[Tensor, "B A"], label_BA: Int[Tensor, "B A"]) -> Float[Tensor, " B"]:
    """log P(a|x, y), nats: the sum over attributes of `beta_bins` at their labels; NaN where a rating is not finite.

    float64.
    """
    known_B = rating_BA.isfinite().all(1)
    chosen_BA = beta_bins(rating_BA.nan_to_num()).gather(-1, label_BA[..., None]).squeeze(-1)
    return torch.where(known_B, chosen_BA.sum(1), torch.nan)


@checked
def shares(weight_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """softmax over the usable samples of each group; 0 for the others, and for all of a group without any."""
    share_PK = torch.where(usable_PK, weight_PK, -torch.inf).softmax(1)
    return torch.where(usable_PK, share_PK, 0.0)


@checked
def effective_samples(share_PK: Float[Tensor, "P K"]) -> float:
    """``1 / sum_i w_i^2``, the mean over groups that have weights: 1 where one sample has them all, K where all are
    alike; 0 without such a group."""
    squares_P = share_PK.double().square().sum(1)
    return float(squares_P[squares_P > 0].reciprocal().mean()) if bool(squares_P.any()) else 0.0


@checked
def group_loss(
    logprob_PK: Float[Tensor, "P K"],
    target_PK: Float[Tensor, "P K"],
    baseline_PK: Float[Tensor, "P K"],
    usable_PK: Bool[Tensor, "P K"],
    tokens_PK: Int[Tensor, "P K"],
) -> Float[Tensor, " P"]:
    """``- sum_i (w'_i - b'_i) log Q(y_i|a, x)`` of each group, divided by the mean number of tokens of its usable
    samples (NeMo-Aligner). Its value means little; its gradient is that of `divergence`."""
    each_PK = (target_PK - baseline_PK).detach() * torch.where(usable_PK, logprob_PK, 0.0)
    tokens_P = torch.where(usable_PK, tokens_PK, 0).sum(1) / usable_PK.sum(1).clamp(min=1)
    return -each_PK.sum(1) / tokens_P.clamp(min=1)


@checked
def divergence(
    target_PK: Float[Tensor, "P K"], baseline_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]
) -> Float[Tensor, " P"]:
    """``KL(w' || b') = sum_i w'_i log((w'_i + 1e-8) / (b'_i + 1e-8))`` over the usable samples, nats."""
    ratio_PK = ((target_PK + KL_EPSILON) / (baseline_PK + KL_EPSILON)).log()
    return torch.where(usable_PK, target_PK * ratio_PK, 0.0).sum(1)
