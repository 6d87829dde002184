"""Log-probabilities of given tokens, their entropy, and the step from packed to padded numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    scaled_NV = logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature
    normalizer_N = scaled_NV.logsumexp(-1)
    logprob_N = scaled_NV.gather(1, ids_N[:, None]).squeeze(1) - normalizer_N
    return logprob_N, _Entropy.apply(scaled_NV, normalizer_N.detach())


@dataclass(frozen=True)
class TokenRead:
    """What `of_hidden` reads from a language-model head."""

    temperature: float
    size: int
    """Ids below ``size`` have probability, those from ``size`` on have none."""
    gaps: tuple[int, ...] = ()
    """Ids below ``size`` that have no probability either."""
    entropy: bool = True
    """False returns an entropy of 0, and saves two passes over the logits."""


MIN_CHUNK, MAX_CHUNK = 128, 1024


def chunk_tokens(num_tokens: int) -> int:
    """Tokens whose logits `of_hidden` holds at one time: a tenth of all, at least 128 and at most 1,024.

    A pass holds up to 8 bytes for a logit of the chunk, the backward pass up to 14: less than 1 and 1.5 for each logit
    of 1,280 tokens or more. In smaller chunks a matrix product waits for the weights of the head, not for arithmetic.
    """
    return min(max(num_tokens // 10, MIN_CHUNK), MAX_CHUNK)


_CERTAIN_ZERO = -200.0
"""exp of this is 0 in float32. Log-probabilities are clamped to it where they are multiplied by a probability."""


class _OfHidden(torch.autograd.Function):
    """Keeps hidden states, normalizer and entropy, and no logits: the backward pass computes them again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, read: TokenRead
    ) -> tuple[Tensor, Tensor]:
        logprob_N, normalizer_N, entropy_N = (
            torch.zeros(len(ids_N), dtype=torch.float32, device=ids_N.device) for _ in range(3)
        )
        for rows in _chunks(len(ids_N)):
            scaled_CV = _scaled(hidden_NH[rows], weight_VH, read)
            normalizer_N[rows] = scaled_CV.logsumexp(-1)
            logprob_N[rows] = scaled_CV.gather(1, ids_N[rows, None]).squeeze(1) - normalizer_N[rows]
            if read.entropy:
                every_CV = scaled_CV.sub_(normalizer_N[rows, None])
                entropy_N[rows] = -every_CV.exp().mul_(every_CV.clamp_(min=_LOWEST)).sum(-1)
                del every_CV
            del scaled_CV  # before the logits of the next chunk
        ctx.save_for_backward(hidden_NH, weight_VH, ids_N, normalizer_N, entropy_N)
        ctx.read = read
        ctx.set_materialize_grads(False)
        if not read.entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        """``dz_v = g (1[v = id] - p_v) - h p_v (log p_v + H)`` for gradients g of the log-probability and h of H."""
        hidden_NH, weight_VH, ids_N, normalizer_N, entropy_N = ctx.saved_tensors
        read = ctx.read
        grad_N = torch.zeros_like(normalizer_N) if logprob_grad_N is None else logprob_grad_N
        hidden_grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_grad_VH = None
        if ctx.needs_input_grad[1]:  # chunks are summed in float32
            weight_grad_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        for rows in _chunks(len(ids_N)):
            every_CV = _scaled(hidden_NH[rows], weight_VH, read).sub_(normalizer_N[rows, None])
            if entropy_grad_N is None:
                logit_grad_CV = every_CV.exp_().mul_(-grad_N[rows, None])
            else:
                logit_grad_CV = every_CV.exp()
                every_CV.clamp_(min=_CERTAIN_ZERO).add_(entropy_N[rows, None]).mul_(entropy_grad_N[rows, None])
                logit_grad_CV.mul_(every_CV.add_(grad_N[rows, None]).neg_())
            del every_CV
            logit_grad_CV.scatter_add_(1, ids_N[rows, None], grad_N[rows, None])
            if read.temperature != 1.0:
                logit_grad_CV.div_(read.temperature)
            logit_grad_CV = logit_grad_CV.to(hidden_NH.dtype)
            if hidden_grad_NH is not None:
                torch.mm(logit_grad_CV, weight_VH[: read.size], out=hidden_grad_NH[rows])
            if weight_grad_VH is not None:
                _add_product(weight_grad_VH[: read.size], logit_grad_CV.T, hidden_NH[rows])
            del logit_grad_CV
        return hidden_grad_NH, None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype), None, None


def _chunks(num_tokens: int) -> Iterator[slice]:
    """Even chunks: the kernel for a product of few rows rounds differently from the one for many."""
    count = -(-num_tokens // chunk_tokens(num_tokens))
    size = -(-num_tokens // max(count, 1))
    return (slice(start, start + size) for start in range(0, num_tokens, max(size, 1)))


def _scaled(hidden_CH: Tensor, weight_VH: Tensor, read: TokenRead) -> Tensor:
    """Logits over the temperature, in float32; the caller may write into them."""
    logits_CV = (hidden_CH @ weight_VH[: read.size].T).float()
    if read.temperature != 1.0:
        logits_CV.div_(read.temperature)
    if read.gaps:
        logits_CV.index_fill_(1, torch.tensor(read.gaps, device=logits_CV.device), -math.inf)
    return logits_CV


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, with ``total`` in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


@checked
def of_hidden(
    hidden_NH: Float[Tensor, "N H"], weight_VH: Float[Tensor, "V H"], ids_N: Int[Tensor, " N"], read: TokenRead
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`of_tokens` of ``hidden @ weight.T``, without ever holding the logits of more than `chunk_tokens` tokens.

    Both results carry a gradient, the entropy only where ``read.entropy``. The backward pass computes the logits again,
    one matrix product more (as Hsu et al. 2024, arXiv 2410.10989, do for the cross entropy), and sums the gradient of
    the weight over chunks in float32.
    """
    return _OfHidden.apply(hidden_NH, weight_VH, ids_N, read)


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
