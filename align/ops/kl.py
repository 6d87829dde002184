"""Estimators of the KL divergence to the reference from single samples (Schulman 2020, "Approximating KL divergence").

With x_t = log pi(token t) - log pi_ref(token t) of a token drawn from pi:

- ``k1``  x: unbiased, high variance, may be negative
- ``abs`` \\|x\\|: NeMo-Aligner's REINFORCE and PPO
- ``k2``  x^2 / 2: biased, low variance
- ``k3``  exp(-x) - 1 + x: unbiased, low variance, never negative
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.ops.logprobs import masked_mean, masked_sum
from align.types import checked

Estimator = Literal["k1", "abs", "k2", "k3"]
Reduction = Literal["sum", "mean"]

EXPONENT_LIMIT = 20.0
"""``exp`` of ``k3`` sees x limited to this size (nats), so that one token cannot make the estimate infinite; so do the
ratios of `align.ops.policy_losses`."""


@checked
def per_token(
    logprob_BT: Float[Tensor, "B T"], reference_BT: Float[Tensor, "B T"], estimator: Estimator
) -> Float[Tensor, "B T"]:
    """The estimate at each token, in nats."""
    x_BT = logprob_BT - reference_BT
    match estimator:
        case "k1":
            return x_BT
        case "abs":
            return x_BT.abs()
        case "k2":
            # The slope of a square is x, and 0 * nan would be the gradient where a mask that is applied later hides x.
            finite_BT = x_BT.isfinite()
            return torch.where(finite_BT, torch.where(finite_BT, x_BT, 0.0).square() / 2, x_BT.abs())
        case "k3":  # pragma: no branch - the type names no other
            return (-x_BT.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)).exp() - 1 + x_BT


@checked
def per_sequence(
    kl_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], reduction: Reduction
) -> Float[Tensor, " B"]:
    """Reduce over the tokens of each sequence.

    ``sum`` is the divergence of the sequence (TRL; Ziegler et al. 2019), ``mean`` that of a token (NeMo-Aligner). They
    differ by the length: a coefficient of 0.01 on the mean equals 2e-5 on the sum at 500 tokens.
    """
    return masked_sum(kl_BT, mask_BT) if reduction == "sum" else masked_mean(kl_BT, mask_BT)


@checked
def num_limited(
    logprob_BT: Float[Tensor, "B T"], reference_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]
) -> int:
    """Tokens whose x exceeds `EXPONENT_LIMIT`; more than a few mean that policy and reference do not fit together."""
    return int((((logprob_BT - reference_BT).abs() > EXPONENT_LIMIT) & mask_BT).sum())


@checked
def adapted(coefficient: float, kl: float, target: float, horizon: int, num_sequences: int) -> float:
    """The coefficient after a step of divergence ``kl``: ``c (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)``
    (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    ``kl`` and ``target`` are means over sequences of the ``sum`` reduction, in nats; n = ``num_sequences`` of the step,
    and ``horizon`` is the number of sequences in which a coefficient that is far off changes by a fifth. A ``kl`` that
    is not finite leaves the coefficient as it was, since it would stay in it for good.
    """
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_sequences / horizon)
