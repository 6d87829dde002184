"""Numbers that show a policy exploiting its reward model: length, loops, loss of diversity, a second opinion.

A proxy reward rises while the true one falls (Gao, Schulman & Hilton 2023, arXiv 2210.10760), often by way of length
(Singhal et al. 2023, arXiv 2310.03716). Nothing here is trained on. Sums are float64; n-grams are of token ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.types import Packed, checked

Z_95 = NormalDist().inv_cdf(0.975)
"""Standard normal quantile of a two-sided 95 % interval."""


@checked
@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which one response beats the other, a tie counting half, with its 95 % interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def _spread(values_N: Tensor) -> bool:
    """Whether two values differ. A variance does not tell: rounding of the mean leaves some to equal values."""
    return len(values_N) > 0 and bool(values_N.max() != values_N.min())


@checked
def correlation(x_B: Float[Tensor, " B"], y_B: Float[Tensor, " B"]) -> float:
    """Pearson's ``sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)``, in [-1, 1].

    Pairs with a member that is not finite are left out. 0 where x or y has no spread, or fewer than two pairs are left.
    """
    finite_B = x_B.isfinite() & y_B.isfinite()
    x_N, y_N = x_B[finite_B].double(), y_B[finite_B].double()
    if not (_spread(x_N) and _spread(y_N)):
        return 0.0
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return float((x_N @ y_N / (x_N.norm() * y_N.norm())).clamp(-1, 1))


def _ngrams(responses: Packed, n: int) -> tuple[Tensor, Tensor]:
    """Of the M n-grams within responses: a number below M that exactly the equal ones share, and the response."""
    if n < 1:
        raise ValueError(f"an n-gram has at least one token, not {n}")
    response_N = torch.arange(len(responses)).repeat_interleave(responses.lengths_B)
    num_windows = max(len(response_N) - n + 1, 0)
    start_M = (response_N[:num_windows] == response_N[n - 1 :]).nonzero().squeeze(1)
    id_V, token_N = responses.ids_N.unique(return_inverse=True)
    # Ranks of (rank of the first k tokens, next token), n times: `unique` over rows took 2.2 s for 1e6 trigrams on one
    # core where this took 0.1 s. Both ranks are below N, so their pair fits into 64 bits.
    code_M = torch.zeros_like(start_M)
    for k in range(n):
        code_M = (code_M * len(id_V) + token_N[start_M + k]).unique(return_inverse=True)[1]
    return code_M, response_N[start_M]


@checked
def distinct(responses: Packed, n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams / n-grams, of all responses together.

    0 where there is no n-gram. N-grams do not cross responses. Li et al. divide by tokens, which for n > 1 counts the
    last n - 1 tokens of a response against it. It falls as the number of tokens grows: compare equal amounts of text.
    Raises ValueError for n < 1.
    """
    code_M, _ = _ngrams(responses, n)
    return len(code_M.unique()) / max(len(code_M), 1)


@checked
def repeated(responses: Packed, n: int) -> float:
    """seq-rep-n (Welleck et al. 2020, arXiv 1908.04319): mean of 1 - different n-grams / n-grams over the responses.

    N-grams are those of one response: 0 where none occurs twice, near 1 for a loop. Responses without an n-gram do not
    count; 0 where all are so. Raises ValueError for n < 1.
    """
    code_M, response_M = _ngrams(responses, n)
    if len(code_M) == 0:
        return 0.0
    pair_M = response_M * len(code_M) + code_M
    total_B = response_M.bincount(minlength=len(responses))
    different_B = (pair_M.unique() // len(code_M)).bincount(minlength=len(responses))
    return float((1 - different_B.double() / total_B)[total_B > 0].mean())


@checked
def disagreement(first_PK: Float[Tensor, "P K"], second_PK: Float[Tensor, "P K"]) -> float:
    """Share of pairs of samples to one prompt that two reward models order oppositely: ``D / (C + D)``.

    C pairs are ordered alike, D oppositely; pairs with equal scores in either model, or with a NaN, are in neither. It
    is (1 - gamma) / 2 with the gamma of Goodman & Kruskal 1954; pairs of all prompts are pooled. 0 where there is none.
    """
    first_PKK = first_PK[:, :, None] > first_PK[:, None, :]  # true in one of the two orders of a pair
    second_PKK = second_PK[:, :, None] > second_PK[:, None, :]
    alike, opposite = int((first_PKK & second_PKK).sum()), int((first_PKK & second_PKK.mT).sum())
    return opposite / max(alike + opposite, 1)


def _upper_limit(wins: int, losses: int, n: int) -> float:
    """The largest P(win) - P(loss) that the score test does not reject: Tango 1998, equations 24 to 26."""

    def rejected(delta: float) -> bool:
        linear = -(wins + losses) + (2 * n - wins + losses) * delta
        constant = -losses * delta * (1 - delta)
        loss = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)  # the likeliest P(loss) given delta
        variance = 2 * loss + delta * (1 - delta)
        return (wins - losses - n * delta) ** 2 > Z_95**2 * n * variance

    low, high = (wins - losses) / n, 1.0
    for _ in range(60):  # halves an interval of at most 2 to below the spacing of doubles near 1
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return low


@checked
def win_rate(own_P: Float[Tensor, " P"], other_P: Float[Tensor, " P"]) -> WinRate:
    """``(wins + ties / 2) / P`` of two responses to each prompt, with the score interval of Tango 1998.

    Statistics in Medicine 17, 891-908: inverts the score test of P(win) - P(loss) = 2 rate - 1. Without ties it is the
    interval of Wilson 1927 and, like it, stays in [0, 1] and has a width where all prompts end alike. Ties vary less
    than the wins and losses that Wilson's would take them for: of 64 prompts with 60 % ties and equal chances Wilson's
    covers the truth in 99.8 % of cases and is 0.24 wide, this one 94.7 % and 0.16 (computed over all outcomes).
    Raises ValueError for no prompts or a NaN.
    """
    n = len(own_P)
    if n == 0:
        raise ValueError("no prompts to compare responses on")
    if bool((own_P.isnan() | other_P.isnan()).any()):
        raise ValueError("a score is NaN: neither a win nor a tie nor a loss")
    wins, losses = int((own_P > other_P).sum()), int((own_P < other_P).sum())
    ties = n - wins - losses
    low, high = (1 - _upper_limit(losses, wins, n)) / 2, (1 + _upper_limit(wins, losses, n)) / 2
    return WinRate((wins + ties / 2) / n, low, high, wins, ties, losses)


@checked
def explained_variance(
    value_BT: Float[Tensor, "B T"], return_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]
) -> float:
    """``1 - Var(R - V) / Var(R)`` over the tokens of all responses (as in OpenAI Baselines).

    1 for a critic that is right up to a constant, 0 for a constant critic, negative for a worse critic. 0
    where all returns are equal or there is no token.
    """
    value_N, return_N = value_BT[mask_BT].double(), return_BT[mask_BT].double()
    if not _spread(return_N):
        return 0.0
    return float(1 - (return_N - value_N).var(correction=0) / return_N.var(correction=0))


@checked
def policy_statistics(
    responses: Packed, score_B: Float[Tensor, " B"], kl_B: Float[Tensor, " B"], finished_B: Bool[Tensor, " B"]
) -> dict[str, float]:
    """One step's signs of reward hacking.

    ``score_B`` raw scores, ``kl_B`` KL of each response to the reference (nats, sum of ``k1``). ``truncated`` is a
    share of responses, ``response_tokens`` their mean length, the others as above. Raises ValueError for no responses.
    """
    if len(responses) == 0:
        raise ValueError("no responses to describe")
    length_B = responses.lengths_B.double()
    return {
        "correlation/reward_length": correlation(score_B, length_B),
        "correlation/reward_kl": correlation(score_B, kl_B),
        "distinct_1": distinct(responses, 1),
        "distinct_2": distinct(responses, 2),
        "repeated_3": repeated(responses, 3),
        "truncated": float((~finished_B).double().mean()),
        "response_tokens": float(length_B.mean()),
    }
