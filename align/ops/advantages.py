"""Advantages, how much better a response is than its baseline, and selection of samples by reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.types import checked


@checked
def leave_one_out(
    reward_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]
) -> tuple[Float[Tensor, "P K"], Bool[Tensor, "P K"]]:
    """RLOO: each response against the mean of the others to the same prompt (Ahmadian et al. 2024, arXiv 2402.14740).

    ``A_i = R_i - (sum_{j != i} R_j) / (n - 1)`` over the n usable samples of a prompt. Returns the advantages, 0 where
    there is none, and which responses have one: unusable ones have not, nor has the last usable one of a prompt.
    """
    kept_PK = torch.where(usable_PK, reward_PK, 0.0)
    n_P1 = usable_PK.sum(1, keepdim=True)
    others_PK = (kept_PK.sum(1, keepdim=True) - kept_PK) / (n_P1 - 1).clamp(min=1)
    learnable_PK = usable_PK & (n_P1 >= 2)
    return torch.where(learnable_PK, kept_PK - others_PK, 0.0), learnable_PK


@checked
def group_standardized(
    reward_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]
) -> tuple[Float[Tensor, "P K"], Bool[Tensor, "P K"]]:
    """GRPO: ``A_i = (R_i - mean) / (std + 1e-6)`` over the n usable samples of a prompt, std over n - 1 (Shao et al.
    2024, arXiv 2402.03300, section 4.1).

    Returns the advantages and which responses have one, as `leave_one_out` does. Samples with equal rewards get 0.
    """
    centered_PK, learnable_PK = _centered(reward_PK, usable_PK)
    variance_P1 = centered_PK.square().sum(1, keepdim=True) / (usable_PK.sum(1, keepdim=True) - 1).clamp(min=1)
    return (centered_PK / (variance_P1.sqrt() + 1e-6)).to(reward_PK.dtype), learnable_PK


@checked
def group_centered(
    reward_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]
) -> tuple[Float[Tensor, "P K"], Bool[Tensor, "P K"]]:
    """Dr. GRPO: ``A_i = R_i - mean`` over the usable samples of a prompt, itself included (Liu et al. 2025, arXiv
    2503.20783, section 3.2).

    Returns the advantages and which responses have one, as `leave_one_out` does.
    """
    centered_PK, learnable_PK = _centered(reward_PK, usable_PK)
    return centered_PK.to(reward_PK.dtype), learnable_PK


def _centered(reward_PK: Tensor, usable_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their mean, in float64, where n equal float32 rewards differ from their mean by 0 exactly: what
    rounding left of them would be divided by a std as small."""
    kept_PK = torch.where(usable_PK, reward_PK, 0.0).double()
    n_P1 = usable_PK.sum(1, keepdim=True)
    learnable_PK = usable_PK & (n_P1 >= 2)
    mean_P1 = kept_PK.sum(1, keepdim=True) / n_P1.clamp(min=1)
    return torch.where(learnable_PK, kept_PK - mean_P1, 0.0), learnable_PK


@checked
def gae(
    reward_BT: Float[Tensor, "B T"],
    value_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    gamma: float,
    lambda_: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantages and the returns the critic learns (Schulman et al. 2016, arXiv 1506.02438, section 3).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}`` and ``return_t = A_t + V_t``, with
    V_t the value *before* token t and 0 after the last token. The tokens of a row are its first columns. Both results
    are 0 where there is no token.
    """
    value_BT = torch.where(mask_BT, value_BT, 0.0)
    next_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], 1)
    delta_BT = torch.where(mask_BT, reward_BT, 0.0) + gamma * next_BT - value_BT
    advantage_BT = _discounted(delta_BT, gamma * lambda_)
    return advantage_BT, advantage_BT + value_BT


@checked
def returns_to_go(reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """``G_t = r_t + gamma G_{t+1}``, 0 where there is no token (Sutton & Barto 2018, section 3.3). The tokens of a row
    are its first columns."""
    return _discounted(torch.where(mask_BT, reward_BT, 0.0), gamma)


def _discounted(x_BT: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor y_{t+1}``. A row of x that ends in zeros gives a y that does."""
    y_BT, following_B = torch.zeros_like(x_BT), x_BT.new_zeros(len(x_BT))
    for t in reversed(range(x_BT.shape[1])):
        following_B = x_BT[:, t] + factor * following_B
        y_BT[:, t] = following_B
    return y_BT


@checked
def whiten(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``(x - mean) / sqrt(variance + 1e-8)`` over all tokens, variance over n, 0 where there is no token (REINFORCE++,
    Hu 2025, arXiv 2501.03262).

    Requires the whole batch of a step, of all workers: whitening parts separately loses the differences between parts.
    Moments are taken in float64.
    """
    valid_N = x_BT[mask_BT].double()
    mean = valid_N.mean()
    variance = (valid_N - mean).square().mean()
    return torch.where(mask_BT, (x_BT.double() - mean) / (variance + 1e-8).sqrt(), 0.0).to(x_BT.dtype)


@checked
def broadcast_to_tokens(x_B: Float[Tensor, " B"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """One number a response on each of its tokens, 0 where there is none."""
    return torch.where(mask_BT, x_B[:, None], 0.0)


# Choosing among the K samples of each prompt, and among groups of samples.


@checked
def groups_with_spread(reward_PK: Float[Tensor, "P K"]) -> Int[Tensor, " G"]:
    """Numbers of the groups whose rewards are all finite and not all alike, in order: the others teach nothing (DAPO,
    Yu et al. 2025, arXiv 2503.14476, section 3.2)."""
    finite_P = reward_PK.isfinite().all(1)
    return (finite_P & (reward_PK.amax(1) > reward_PK.amin(1))).nonzero().squeeze(1)


@checked
def best_and_worst(
    reward_PK: Float[Tensor, "P K"], usable_PK: Bool[Tensor, "P K"]
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Float[Tensor, " P"]]:
    """Numbers k of the usable samples with the highest and the lowest reward of each prompt, the first of equals, and
    how far apart these rewards are: 0 where fewer than two samples are usable."""
    highest = torch.where(usable_PK, reward_PK, -torch.inf).max(1)
    lowest = torch.where(usable_PK, reward_PK, torch.inf).min(1)
    gap_P = torch.where(usable_PK.sum(1) >= 2, highest.values - lowest.values, 0.0)
    return highest.indices, lowest.indices, gap_P


@checked
def sequence_index(prompt_P: Int[Tensor, " G"], sample_P: Int[Tensor, " G"], num_samples: int) -> Int[Tensor, " G"]:
    """Numbers of the sequences that are sample k of prompt p."""
    return prompt_P * num_samples + sample_P


@checked
def interleave(first_P: Float[Tensor, " P"], second_P: Float[Tensor, " P"]) -> Float[Tensor, " B"]:
    """Numbers of pairs as rows 2i and 2i + 1."""
    return torch.stack([first_P, second_P], 1).flatten()


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Numbers of several requests of one step, one after the other."""
    return torch.cat(list(parts))
