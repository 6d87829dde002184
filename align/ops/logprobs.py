"""Log-probabilities of given tokens, their entropy, and the step from packed to padded numbers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.types import checked

_LOWEST = torch.finfo(torch.float32).min


class _Entropy(torch.autograd.Function):
    """Entropy of softmax(z), differentiable at the cost of N numbers: of z and logsumexp(z) the log-probability keeps
    the same storage for its own gradient. Written out in torch it would keep two more matrices of the size of z."""

    @staticmethod
    def forward(ctx: Any, scaled_NV: Tensor, normalizer_N: Tensor) -> Tensor:
        # Not ``logsumexp(z) - sum_v p_v z_v``, which loses digits when all logits are far from 0.
        every_NV = scaled_NV - normalizer_N[:, None]
        entropy_N = -every_NV.exp().mul_(every_NV.clamp_(min=_LOWEST)).sum(-1)  # 0 of a logit of -inf, not nan
        ctx.save_for_backward(scaled_NV, normalizer_N, entropy_N)
        return entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """``dH/dz_v = -p_v (log p_v + H)``; the dependence of logsumexp(z) on z is part of it."""
        scaled_NV, normalizer_N, entropy_N = ctx.saved_tensors
        every_NV = scaled_NV - normalizer_N[:, None]
        grad_NV = every_NV.exp().mul_(-grad_N[:, None])
        return grad_NV.mul_(every_NV.clamp_(min=_LOWEST).add_(entropy_N[:, None])), None


@checked
def of_tokens(
    logits_NV: Float[Tensor, "N V"], ids_N: Int[Tensor, " N"], temperature: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of each token and the entropy of the distribution it was drawn from.

    ``logprob = z[id] - logsumexp(z)`` and ``H = -sum_v p_v log p_v`` with ``z = logits / temperature``
    and ``p = softmax(z)``, in nats, computed in float32. A logit of -inf is a token of probability 0. Both carry a
    gradient. While the graph of either lives, so does z: an entropy that is only looked at is detached before it is
    kept.
    """
    scaled_NV = logits_NV.float() / temperature
    normalizer_N = scaled_NV.logsumexp(-1)
    logprob_N = scaled_NV.gather(1, ids_N[:, None]).squeeze(1) - normalizer_N
    return logprob_N, _Entropy.apply(scaled_NV, normalizer_N.detach())


@checked
def to_padded(values_N: Float[Tensor, " N"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Place N packed numbers, row after row, where ``mask_BT`` is true; 0 elsewhere. Differentiable."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BT, values_N)


@checked
def masked_sum(values_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Sum over the tokens of each sequence. Selects, so a NaN at a masked position is not seen."""
    return torch.where(mask_BT, values_BT, 0.0).sum(1)


@checked
def masked_mean(values_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over the tokens of each sequence; 0 for a sequence without tokens."""
    return masked_sum(values_BT, mask_BT) / mask_BT.sum(1).clamp(min=1)
