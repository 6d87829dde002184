"""From raw scores to rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.types import checked

Truncated = Literal["mask", "keep", "penalize"]
Combine = Literal["mean", "minimum", "penalized"]


@checked
def treat_truncated(
    score_B: Float[Tensor, " B"], finished_B: Bool[Tensor, " B"], treatment: Truncated, penalty: float
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Rewards, and which sequences may be learned from.

    A response cut off at the length limit was not judged as the policy meant it. ``mask`` takes it out of baseline
    and gradient (the intent of NeMo-Aligner's REINFORCE), ``keep`` treats it like any other, ``penalize`` subtracts
    ``penalty`` from its score.
    """
    match treatment:
        case "mask":
            return score_B, finished_B
        case "keep":
            return score_B, torch.ones_like(finished_B)
        case "penalize":  # pragma: no branch - the type names no other
            return torch.where(finished_B, score_B, score_B - penalty), torch.ones_like(finished_B)


@checked
def subtract_kl(reward_B: Float[Tensor, " B"], kl_B: Float[Tensor, " B"], coefficient: float) -> Float[Tensor, " B"]:
    """``R = r - coefficient * KL`` (Ziegler et al. 2019, arXiv 1909.08593, section 2)."""
    return reward_B - coefficient * kl_B


@checked
def per_token(
    reward_B: Float[Tensor, " B"], kl_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], coefficient: float
) -> Float[Tensor, "B T"]:
    """``r_t = -coefficient * KL_t``, plus R_i at the last token of response i (Ouyang et al. 2022, arXiv 2203.02155,
    section 3.5).

    The last token is the last that was sampled: the end-of-sequence token where there is one. A response without tokens
    gets nothing.
    """
    num_left_BT = mask_BT.flip(1).cumsum(1).flip(1)
    last_BT = mask_BT & (num_left_BT == 1)
    return torch.where(last_BT, reward_B[:, None], 0.0) - coefficient * torch.where(mask_BT, kl_BT, 0.0)


@checked
def overlong(length_B: Int[Tensor, " B"], max_tokens: int, buffer: int, penalty: float) -> Float[Tensor, " B"]:
    """DAPO's soft overlong punishment, to be added to the reward: ``penalty * clip((max_tokens - buffer - length) /
    buffer, -1, 0)`` (Yu et al. 2025, arXiv 2503.14476, equation 13).

    0 up to ``max_tokens - buffer`` response tokens, from there falling in a line to ``-penalty`` at ``max_tokens``. A
    ``buffer`` of 0 tokens turns it off.
    """
    if buffer == 0:
        return torch.zeros(length_B.shape, device=length_B.device)
    return (max_tokens - buffer - length_B).clamp(-buffer, 0) / buffer * penalty


@checked
def combined(score_MB: Float[Tensor, "M B"], how: Combine, penalty: float) -> Float[Tensor, " B"]:
    """One score of those of M models: their ``mean``, their ``minimum`` (worst case), or ``penalized``: ``mean -
    penalty * standard deviation`` over the models (uncertainty-weighted; Coste et al. 2023, arXiv 2310.02743, section
    3.2).

    A response that one model gives NaN has NaN.
    """
    match how:
        case "mean":
            return score_MB.mean(0)
        case "minimum":
            return score_MB.amin(0)
        case "penalized":  # pragma: no branch - the type names no other
            return score_MB.mean(0) - penalty * spread(score_MB)


@checked
def spread(score_MB: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
    """Population standard deviation over M models."""
    return score_MB.std(0, correction=0)


@checked
@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards seen, from which a running normalization divides by
    ``std``. Three numbers, so that a checkpoint can hold them."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @checked
    def updated(self, values: Float[Tensor, ...]) -> Moments:
        """The moments after ``values``, in float64 by the parallel update of Chan, Golub & LeVeque (1983):
        ``m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / n``. Values that are not finite are left out."""
        kept_N = values[values.isfinite()].double()
        added = len(kept_N)
        if added == 0:
            return self
        mean = float(kept_N.mean())
        m2 = float((kept_N - mean).square().sum())
        count, difference = self.count + added, mean - self.mean
        return Moments(
            count,
            self.mean + difference * added / count,
            self.m2 + m2 + difference * difference * self.count * added / count,
        )

    @property
    def std(self) -> float:
        """``sqrt(m2 / count)``; 1 where there is no spread to divide by: fewer than two values, or all alike."""
        return math.sqrt(self.m2 / self.count) if self.count >= 2 and self.m2 > 0 else 1.0
