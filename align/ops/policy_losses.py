"""Losses of policy and critic at each token, and how tokens become the sum and count of `align.roles.Loss`.

A is the advantage, rho the ratio of new to old probability. Every loss is to be minimized, is 0 where there is no
token, and passes its gradient through the new log-probabilities or values only.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.ops.kl import EXPONENT_LIMIT
from align.ops.logprobs import masked_mean, masked_sum
from align.types import checked

Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_token_mean", "constant"]
"""What one step's loss is the mean of; see `aggregate`."""

RatioReduction = Literal["sum", "mean"]
"""How the log-ratio of a sequence is made of those of its tokens; see `sequence_clipped`."""


@checked
def reinforce(
    logprob_BT: Float[Tensor, "B T"], advantage_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """``-A_t log pi(token t)`` (Williams 1992): one step per rollout, no ratio to an older policy."""
    advantage_BT = torch.where(mask_BT, advantage_BT.detach(), 0.0)
    return -advantage_BT * torch.where(mask_BT, logprob_BT, 0.0)


@checked
def clipped(
    logprob_BT: Float[Tensor, "B T"],
    old_BT: Float[Tensor, "B T"],
    advantage_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    clip: tuple[float, float],
    dual_clip: float | None,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """PPO: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``, rho = pi / pi_old of a token (Schulman et al. 2017, arXiv
    1707.06347, section 3).

    With ``dual_clip`` c > 1 a token of negative advantage loses at most ``-c A`` (Ye et al. 2020, arXiv 1912.09729,
    "dual-clip PPO"); None leaves it without bound. Also returns the tokens whose gradient a clip has made 0.
    """
    advantage_BT = torch.where(mask_BT, advantage_BT.detach(), 0.0)
    log_ratio_BT = torch.where(mask_BT, logprob_BT - old_BT.detach(), 0.0)
    return _surrogate(log_ratio_BT, advantage_BT, clip, dual_clip)


@checked
def sequence_clipped(
    logprob_BT: Float[Tensor, "B T"],
    old_BT: Float[Tensor, "B T"],
    advantage_B: Float[Tensor, " B"],
    mask_BT: Bool[Tensor, "B T"],
    clip: tuple[float, float],
    reduction: RatioReduction,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """PPO's loss with one ratio a sequence, ``rho_i = exp(sum_t or mean_t log pi / pi_old)``.

    ``sum`` is the ratio of the responses' probabilities (TRL's RLOO), ``mean`` its geometric mean over tokens (GSPO,
    Zheng et al. 2025, arXiv 2507.18071, section 4.1). Each token carries its sequence's loss, so that `aggregate` by
    ``sequence_mean_token_mean`` gives the mean of loss_i. Also returns the tokens of the sequences whose gradient a
    clip has made 0.
    """
    reduce = masked_sum if reduction == "sum" else masked_mean
    log_ratio_B = reduce(logprob_BT - old_BT.detach(), mask_BT)
    loss_B, clipped_B = _surrogate(log_ratio_B, advantage_B.detach(), clip, None)
    return torch.where(mask_BT, loss_B[:, None], 0.0), mask_BT & clipped_B[:, None]


def _surrogate(
    log_ratio: Tensor, advantage: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's loss as -A times a ratio that is limited: from above where A > 0, from below, and above by ``dual_clip``,
    where A < 0. An infinite ratio would make the gradient of the side that was not chosen ``0 * inf``, so its exponent
    has a limit, which counts as a clip."""
    ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    low = torch.zeros_like(ratio).masked_fill(advantage < 0, 1 - clip[0])
    high = torch.full_like(ratio, math.inf if dual_clip is None else dual_clip).masked_fill(advantage > 0, 1 + clip[1])
    outside = (ratio < low) | (ratio > high) | (log_ratio.abs() > EXPONENT_LIMIT)
    return -advantage * ratio.clamp(low, high), outside & (advantage != 0)


@checked
def importance_weight(
    old_BT: Float[Tensor, "B T"], rollout_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], cap: float
) -> Float[Tensor, "B T"]:
    """``min(pi_old / pi_rollout, cap)`` of each token, by which a loss is multiplied when another engine than the one
    that trains has sampled (truncated importance sampling: Ionides 2008; Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training").

    Carries no gradient. Exactly 1 where both log-probabilities are the same (with ``cap`` at least 1), and where there
    is no token.
    """
    log_ratio_BT = torch.where(mask_BT, old_BT - rollout_BT, 0.0).detach()
    weight_BT = log_ratio_BT.clamp(max=EXPONENT_LIMIT).exp().clamp(max=cap)
    return torch.where(mask_BT, weight_BT, 1.0)


@checked
def value(
    value_BT: Float[Tensor, "B T"],
    old_BT: Float[Tensor, "B T"],
    return_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    clip: float,
) -> Float[Tensor, "B T"]:
    """``0.5 max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2)`` with e = ``clip``, in units of the reward
    (Engstrom et al. 2020, arXiv 2005.12729, section 3). ``clip`` of 0 or less, or infinity, turns the clipping off."""
    value_BT = torch.where(mask_BT, value_BT, 0.0)
    return_BT = torch.where(mask_BT, return_BT.detach(), 0.0)
    loss_BT = (value_BT - return_BT).square() / 2
    if clip <= 0 or math.isinf(clip):
        return loss_BT
    old_BT = torch.where(mask_BT, old_BT.detach(), 0.0)
    near_BT = old_BT + (value_BT - old_BT).clamp(-clip, clip)
    return torch.maximum(loss_BT, (near_BT - return_BT).square() / 2)


@checked
def aggregate(
    loss_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], aggregation: Aggregation, max_tokens: int
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum and the count of a micro-batch; a step's loss is the sum of the sums over the sum of the counts.

    - ``token_mean``: every token weighs the same (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.3)
    - ``sequence_mean``: sum over the tokens of a sequence, mean over sequences that have a token
    - ``sequence_mean_token_mean``: mean over the tokens of a sequence, mean over sequences that have a token (GRPO,
      Shao et al. 2024, arXiv 2402.03300, section 4.1)
    - ``constant``: sum over tokens, divided by the number of all sequences times ``max_tokens``, the length limit
      (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2); the others do not read ``max_tokens``
    """
    match aggregation:
        case "token_mean":
            count = mask_BT.sum()
        case "sequence_mean" | "sequence_mean_token_mean":
            count = mask_BT.any(1).sum()
        case "constant":  # pragma: no branch - the type names no other
            count = torch.tensor(len(mask_BT) * max_tokens, device=mask_BT.device)
    reduce = masked_mean if aggregation == "sequence_mean_token_mean" else masked_sum
    return reduce(loss_BT, mask_BT).sum(), count
