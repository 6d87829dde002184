"""Sampling of tokens whose noise is a function of (seed, step, prompt, sample, token) and of nothing else.

A token is drawn by inverting the cumulative distribution at u in (0, 1), and u is a hash of the five numbers. The same
request so gives the same tokens whatever else is in the batch, in whatever order, on however many workers, before or
after a restart. (Logits may still differ in their last bits between batch shapes; a token changes only
where u falls within that distance of a border.)
"""

from __future__ import annotations

import torch
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


BLOCK = 512
"""Adjacent tokens whose mass `draw` sums before it looks for the drawn one among them."""
CANDIDATES = 1024
"""Tokens that top-p sorts; rows whose ``CANDIDATES`` most likely tokens do not reach ``top_p`` are sorted whole."""


def mass_(logits_BV: Tensor) -> Tensor:
    """``exp(z - max z)``, a multiple of the probability in which the most likely token has 1. Overwrites float32
    logits, which at a vocabulary of 128k are the largest tensor of a decoding step."""
    return logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()


def filter_(mass_BV: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set the mass of tokens outside top-k, then top-p (Holtzman et al. 2020), then min-p to 0, in place.

    The most likely token always stays. Ties at the border of top-k all stay; at the border of top-p token ids decide.
    """
    if 0 < top_k < mass_BV.shape[1]:
        border_B1 = mass_BV.topk(top_k, dim=-1).values[:, -1:]
        mass_BV.masked_fill_(mass_BV < border_B1, 0.0)
    if top_p < 1.0:
        _top_p_(mass_BV, top_p)
    if min_p > 0.0:
        mass_BV.masked_fill_(mass_BV < min_p, 0.0)  # the most likely token has 1
    return mass_BV


def _top_p_(mass_BV: Tensor, top_p: float) -> None:
    needed_B = mass_BV.sum(-1, dtype=torch.float64) * top_p
    if mass_BV.shape[1] <= CANDIDATES:
        _keep_nucleus_(mass_BV, *mass_BV.sort(dim=-1, descending=True, stable=True), needed_B)
        return
    value_BC, id_BC = mass_BV.topk(CANDIDATES, dim=-1)
    # Tokens as likely as the last candidate may lie outside: they are no part of the nucleus if those above reach it.
    above_BC = value_BC.masked_fill(value_BC == value_BC[:, -1:], 0.0)
    short_N = (above_BC.sum(-1, dtype=torch.float64) < needed_B).nonzero().squeeze(1)
    order_BC = id_BC.argsort(dim=-1)
    by_id_BC, id_BC = value_BC.gather(1, order_BC), id_BC.gather(1, order_BC)
    value_BC, order_BC = by_id_BC.sort(dim=-1, descending=True, stable=True)
    whole_NV = mass_BV[short_N]
    _keep_nucleus_(mass_BV, value_BC, id_BC.gather(1, order_BC), needed_B)
    if len(short_N):
        _keep_nucleus_(whole_NV, *whole_NV.sort(dim=-1, descending=True, stable=True), needed_B[short_N])
        mass_BV[short_N] = whole_NV


def _keep_nucleus_(mass_BV: Tensor, sorted_BC: Tensor, id_BC: Tensor, needed_B: Tensor) -> None:
    """Keep the tokens ``id_BC`` before which less than the needed mass lies; the first one always."""
    before_BC = sorted_BC.double().cumsum(-1) - sorted_BC  # mass of the more likely tokens
    drop_BC = before_BC >= needed_B[:, None]
    drop_BC[:, 0] = False
    mass_BV.zero_().scatter_(1, id_BC, sorted_BC.masked_fill(drop_BC, 0.0))


def _block_sums(mass_BV: Tensor) -> Tensor:
    """Mass up to the end of each block of `BLOCK` tokens, (B, blocks), float64."""
    whole = mass_BV.shape[1] // BLOCK * BLOCK
    parts = [mass_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < mass_BV.shape[1]:
        parts.append(mass_BV[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, 1).double().cumsum_(-1)


def draw(mass_BV: Tensor, until_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes ``uniform``; ``until_BC`` are the sums of `_block_sums`.

    Two searches in float64: for the block, and for the token within it. Each ends at the last one that has mass, also
    where ``u * total`` is rounded up to the total.
    """
    target_B1 = uniform_B[:, None] * until_BC[:, -1:]
    block_B1 = _first_above(until_BC, target_B1)
    before_B1 = torch.where(block_B1 > 0, until_BC.gather(1, (block_B1 - 1).clamp_(min=0)), 0.0)
    token_BN = block_B1 * BLOCK + torch.arange(min(BLOCK, mass_BV.shape[1]), device=mass_BV.device)
    outside_BN = token_BN >= mass_BV.shape[1]
    within_BN = mass_BV.gather(1, token_BN.masked_fill(outside_BN, 0)).double().masked_fill_(outside_BN, 0.0)
    first_B1 = _first_above(within_BN.cumsum_(-1), target_B1 - before_B1)
    return (block_B1 * BLOCK + first_B1).squeeze(1)


def _first_above(until_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first cumulative sum above the target, and no index behind the last that has mass."""
    last_B1 = torch.searchsorted(until_BN, until_BN[:, -1:].contiguous())
    return torch.searchsorted(until_BN, target_B1, right=True).minimum(last_B1)


def sample(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row from logits (B, V) by noise (B,); temperature 0 takes the most likely one.

    Returns ids, their log-probability at ``temperature`` before the filters (at temperature 1 when greedy), and their
    log-probability at temperature 1; both float32, in nats. The row of a token alone decides about it. Overwrites
    float32 logits. Shapes are not checked, since this runs once for every token.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
        logprob_B = _at(logits_BV, ids_B) - logits_BV.logsumexp(-1)
        return ids_B, logprob_B, logprob_B
    untempered_B = None
    if temperature != 1.0:
        untempered_B = logits_BV.amax(-1) - logits_BV.logsumexp(-1)  # of the most likely token
        logits_BV.div_(temperature)
    mass_BV = mass_(logits_BV)
    until_BC = _block_sums(mass_BV)
    total_B = until_BC[:, -1]
    if 0 < top_k < mass_BV.shape[1] or top_p < 1.0 or min_p > 0.0:
        until_BC = _block_sums(filter_(mass_BV, top_k, top_p, min_p))
    ids_B = draw(mass_BV, until_BC, uniform_B)
    below_B = _at(mass_BV, ids_B).double().log_()  # (z - max z) / temperature
    logprob_B = (below_B - total_B.log()).float()
    if untempered_B is None:
        return ids_B, logprob_B, logprob_B
    return ids_B, logprob_B, (below_B * temperature + untempered_B).float()


def _at(values_BV: Tensor, ids_B: Tensor) -> Tensor:
    return values_BV.gather(1, ids_B[:, None]).squeeze(1)
