"""Advantages: how much better a response is than its baseline."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
