"""Choosing among the K samples of each prompt, and among groups of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.types import checked


@checked
def with_spread(reward_PK: Float[Tensor, "P K"]) -> Int[Tensor, " G"]:
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
def rows(prompt_P: Int[Tensor, " G"], sample_P: Int[Tensor, " G"], num_samples: int) -> Int[Tensor, " G"]:
    """Numbers of the sequences that are sample k of prompt p."""
    return prompt_P * num_samples + sample_P


@checked
def interleaved(first_P: Float[Tensor, " P"], second_P: Float[Tensor, " P"]) -> Float[Tensor, " B"]:
    """Numbers of pairs as rows 2i and 2i + 1."""
    return torch.stack([first_P, second_P], 1).flatten()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Numbers of several requests of one step, one after the other."""
    return torch.cat(list(parts))
