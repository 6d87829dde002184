"""From raw scores to rewards."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.types import checked

Unfinished = Literal["exclude", "keep", "penalise"]


@checked
def treat_unfinished(
    score_B: Float[Tensor, " B"], finished_B: Bool[Tensor, " B"], treatment: Unfinished, penalty: float
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Rewards, and which sequences may be learned from.

    A response cut off at the length limit was not judged as the policy meant it. ``exclude`` takes it out of baseline
    and gradient (the intent of NeMo-Aligner's REINFORCE), ``keep`` treats it like any other, ``penalise`` subtracts
    ``penalty`` from its score.
    """
    match treatment:
        case "exclude":
            return score_B, finished_B
        case "keep":
            return score_B, torch.ones_like(finished_B)
        case "penalise":  # pragma: no branch - the type names no other
            return torch.where(finished_B, score_B, score_B - penalty), torch.ones_like(finished_B)


@checked
def subtract_kl(reward_B: Float[Tensor, " B"], kl_B: Float[Tensor, " B"], coefficient: float) -> Float[Tensor, " B"]:
    """``R = r - coefficient * KL`` (Ziegler et al. 2019, arXiv 1909.08593, section 2)."""
    return reward_B - coefficient * kl_B
