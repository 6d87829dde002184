"""Losses of direct preference optimization, one number per pair and not reduced.

With lp = log pi and lr = log pi_ref of a whole response (sums over its tokens, nats), c the preferred response and r
the rejected one,

    d = [lp(c) - lr(c)] - [lp(r) - lr(r)]

is the difference of implicit rewards in units of 1 / beta: r(x, y) = beta (lp - lr) + f(x), and f(x) cancels
(Rafailov et al. 2023, arXiv 2305.18290, section 4). ``beta`` is the weight of the KL constraint, per nat. Where a
function takes a d of token means instead, it says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from align.types import checked


@checked
def pair_difference(value_B: Float[Tensor, " B"]) -> Float[Tensor, " P"]:
    """Value of row 2i minus that of row 2i + 1, preferred minus rejected in the order of `Pairs`; B must be even."""
    value_P2 = value_B.unflatten(0, (-1, 2))
    return value_P2[:, 0] - value_P2[:, 1]


@checked
def dpo(difference_P: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """``-log sigmoid(beta d)``, nats (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(beta * difference_P)


@checked
def cdpo(difference_P: Float[Tensor, " P"], beta: float, smoothing: float) -> Float[Tensor, " P"]:
    """``-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)``, nats: a label is wrong with probability e
    (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO").

    Smallest where sigmoid(beta d) = 1 - e, so d stays finite.
    """
    logit_P = beta * difference_P
    return -(1 - smoothing) * F.logsigmoid(logit_P) - smoothing * F.logsigmoid(-logit_P)


@checked
def robust(difference_P: Float[Tensor, " P"], beta: float, smoothing: float) -> Float[Tensor, " P"]:
    """``(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e)``, nats, 0 <= e < 1/2
    (Chowdhury et al. 2024, arXiv 2403.00409, section 3).

    Its mean over labels that are flipped with probability e is `dpo` of the true labels. With e > 0 a pair's loss has
    no lower bound: it keeps falling by beta e / (1 - 2e) per nat of d.
    """
    logit_P = beta * difference_P
    return (-(1 - smoothing) * F.logsigmoid(logit_P) + smoothing * F.logsigmoid(-logit_P)) / (1 - 2 * smoothing)


@checked
def ipo(difference_P: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """``(d - 1 / (2 beta))^2``, squares of the unit of d (Azar et al. 2023, arXiv 2310.12036, equation 17).

    d may come from token means, as the authors and TRL compute it, or from sums: ``beta`` then means another thing,
    since the target 1 / (2 beta) is that of a token or that of a response.
    """
    return (difference_P - 1 / (2 * beta)).square()


@checked
def hinge(difference_P: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """``max(0, 1 - beta d)``, without unit (SLiC: Zhao et al. 2023, arXiv 2305.10425, section 2; with the reference
    inside d: Liu et al. 2023, arXiv 2309.06657, hinge-norm)."""
    return (1 - beta * difference_P).relu()


@checked
def margin(difference_P: Float[Tensor, " P"], strength_P: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """``-log sigmoid(beta d - m)``, nats, with m the strength of the preference (HelpSteer2-Preference, arXiv
    2410.01257, section 3)."""
    return -F.logsigmoid(beta * difference_P - strength_P)


@checked
def scaled(difference_P: Float[Tensor, " P"], strength_P: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
    """``-m log sigmoid(beta d)``, nats, with m the strength of the preference (HelpSteer2-Preference, arXiv
    2410.01257, section 3).

    The mean over pairs is not divided by the sum of m: a pair of strength 3 counts as three pairs.
    """
    return -strength_P * F.logsigmoid(beta * difference_P)


@checked
def rpo_sq(
    difference_P: Float[Tensor, " P"], gold_P: Float[Tensor, " P"], beta: float, eta: float
) -> Float[Tensor, " P"]:
    """``(beta d - eta d*)^2``, squared nats, with d* = r*(c) - r*(r) the difference of rewards and ``eta`` their scale
    in nats (Nemotron-4 340B, arXiv 2406.11704, section 3.3.2; Sun et al. 2025, arXiv 2502.00203)."""
    return (beta * difference_P - eta * gold_P).square()


@checked
def rpo_fwd_kl(
    difference_P: Float[Tensor, " P"], gold_P: Float[Tensor, " P"], beta: float, eta: float
) -> Float[Tensor, " P"]:
    """``KL(Bernoulli(sigmoid(beta d)) || Bernoulli(sigmoid(eta d*)))``, nats; see `rpo_sq`.

    Forward in the sense of NeMo-Aligner's ``rpo_fwd_kl``. Where the policy already disagrees by much, the gradient
    p (1 - p) (beta d - eta d*) vanishes.
    """
    return _bernoulli_kl(beta * difference_P, eta * gold_P)


@checked
def rpo_bwd_kl(
    difference_P: Float[Tensor, " P"], gold_P: Float[Tensor, " P"], beta: float, eta: float
) -> Float[Tensor, " P"]:
    """``KL(Bernoulli(sigmoid(eta d*)) || Bernoulli(sigmoid(beta d)))``, nats; see `rpo_sq`.

    Equals `cdpo` with the label certain to sigmoid(eta d*), less that label's entropy. Backward in the sense of
    NeMo-Aligner's ``rpo_bwd_kl``, the form Nemotron-4 340B was trained with.
    """
    return _bernoulli_kl(eta * gold_P, beta * difference_P)


@checked
def simpo(difference_P: Float[Tensor, " P"], beta: float, gamma: float) -> Float[Tensor, " P"]:
    """``-log sigmoid(beta d - gamma)``, nats, with d = mean_t lp(c) - mean_t lp(r) of the policy alone, nats per token
    (Meng et al. 2024, arXiv 2405.14734, equation 6).

    ``gamma`` itself is subtracted, as in the paper and TRL's ``simpo_gamma``; the authors' code asks for gamma / beta.
    """
    return -F.logsigmoid(beta * difference_P - gamma)


def _bernoulli_kl(logit_P: Tensor, other_P: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(x)) || Bernoulli(sigmoid(y)))`` from logits, so that no logarithm of 0 is taken."""
    yes_P = torch.sigmoid(logit_P) * (F.logsigmoid(logit_P) - F.logsigmoid(other_P))
    return yes_P + torch.sigmoid(-logit_P) * (F.logsigmoid(-logit_P) - F.logsigmoid(-other_P))
