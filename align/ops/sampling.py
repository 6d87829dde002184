"""Sampling of tokens whose noise is a function of (seed, step, prompt, sample, token) and of nothing else.

A token is drawn by inverting the cumulative distribution at u in (0, 1), and u is a hash of the five numbers. The same
request so gives the same tokens whatever else is in the batch, in whatever order, on however many workers, before or
after a restart. (Logits may still differ in their last bits between batch shapes; a token changes only
where u falls within that distance of a border.)
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from align.types import checked

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits; torch has no full set of operations for uint64."""
    return (word & (2**64 - 1)) - (2**64 if word & 2**63 else 0)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words in which every input bit
    changes about half of the output bits. Products wrap modulo 2^64."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    return x ^ _shift_right(x, 31)


@checked
def uniform(
    seed: int, step: int, prompt_B: Int[Tensor, " B"], sample_B: Int[Tensor, " B"], token_B: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """float64 numbers in (0, 1), one for each (prompt, sample, token) of a step."""
    state = prompt_B.new_zeros(prompt_B.shape)
    for word in (seed, step, prompt_B, sample_B, token_B):
        state = _mix((state ^ (_signed(word) if isinstance(word, int) else word)) + _signed(_GOLDEN))
    # 52 bits: with 53 the half would be rounded away, at the upper end to 1.
    return (_shift_right(state, 12).double() + 0.5) * 2.0**-52


@checked
def filtered(logits_BV: Float[Tensor, "B V"], top_k: int, top_p: float, min_p: float) -> Float[Tensor, "B V"]:
    """Logits with the tokens outside top-k, then top-p (Holtzman et al. 2020), then min-p set to -inf.

    The most likely token always stays. Among equal logits at the border of top-p, which stay is decided by token id.
    """
    if 0 < top_k < logits_BV.shape[1]:
        border_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < border_B1, -float("inf"))
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probability_BV = sorted_BV.softmax(-1)
        before_BV = probability_BV.cumsum(-1) - probability_BV  # mass of the more likely tokens
        drop_BV = before_BV >= top_p
        drop_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -float("inf"))
    if min_p > 0.0:
        probability_BV = logits_BV.softmax(-1)
        drop_BV = probability_BV < min_p * probability_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(drop_BV, -float("inf"))
    return logits_BV


@checked
def draw(logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative distribution softmax(logits) passes ``uniform``; summed in float64."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    drawn_B = (cumulative_BV <= uniform_B[:, None] * total_B1).sum(-1)
    # u * total may round up to total; the last token with any probability is the first to reach it.
    last_B = (cumulative_BV < total_B1).sum(-1)
    return drawn_B.minimum(last_B)


@checked
def sample(
    logits_BV: Float[Tensor, "B V"],
    uniform_B: Float[Tensor, " B"],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Draw one token a row; temperature 0 takes the most likely one.

    Returns ids, their log-probability at ``temperature`` before the filters (at temperature 1 when greedy), and their
    log-probability at temperature 1; both float32, in nats.
    """
    logits_BV = logits_BV.float()
    scaled_BV = logits_BV / temperature if temperature > 0 else logits_BV
    greedy = temperature == 0
    ids_B = logits_BV.argmax(-1) if greedy else draw(filtered(scaled_BV, top_k, top_p, min_p), uniform_B)
    logprob_B = _logprob(scaled_BV, ids_B)
    untempered_B = logprob_B if scaled_BV is logits_BV or temperature == 1.0 else _logprob(logits_BV, ids_B)
    return ids_B, logprob_B, untempered_B


def _logprob(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logits_BV.gather(1, ids_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
