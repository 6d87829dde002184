"""The loss of every policy gradient, at each response token t of response i:

    l_it = w_it * pg_it + kl_coef * kl_it - entropy_coef * H_it

pg is the policy loss that ``loss.kind`` names (`align.ops.policy_losses`), w the truncated importance weight of a token
that older weights sampled (1 on-policy), kl the estimate against the reference where KL belongs into the loss, H the
entropy. Tokens are aggregated as ``loss.aggregation`` says, over the whole optimizer step.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from align import ops
from align.roles import Loss, LossFunction

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import PolicyGradientConfig, PolicyLossConfig
    from align.ops.kl import Estimator


def policy_loss(config: PolicyGradientConfig, kl_coef: float) -> LossFunction:
    """`loss` as the recipe wants it, with the KL coefficient of this step (0 where KL is in the reward)."""
    return partial(
        loss, how=config.loss, kl_coef=kl_coef, estimator=config.kl_estimator, max_tokens=config.sampling.max_tokens
    )


def loss(
    *,
    logprob_BT: Tensor,
    entropy_BT: Tensor,
    mask_BT: Tensor,
    advantage_BT: Tensor,
    learnable_B: Tensor,
    old_BT: Tensor,
    rollout_BT: Tensor,
    reference_BT: Tensor,
    how: PolicyLossConfig,
    kl_coef: float,
    estimator: Estimator,
    max_tokens: int,
) -> Loss:
    """Sum and count over the tokens of responses that are learned from.

    Metrics, nats a token: ``entropy`` of all responses; ``policy_kl``, KL of the policy before the step to the one now
    (k3); ``clipped``, share of tokens whose gradient a clip has made 0.
    """
    learn_BT = mask_BT & learnable_B[:, None]
    loss_BT, clipped_BT = _policy_gradient(logprob_BT, old_BT, advantage_BT, learn_BT, how)
    loss_BT = loss_BT * ops.policy_losses.importance_weight(old_BT, rollout_BT, learn_BT, how.importance_cap)
    if kl_coef:
        loss_BT = loss_BT + kl_coef * ops.kl.per_token(logprob_BT, reference_BT, estimator)
    if how.entropy_coef:
        loss_BT = loss_BT - how.entropy_coef * entropy_BT
    total, count = ops.policy_losses.aggregate(loss_BT, learn_BT, how.aggregation, max_tokens)
    moved_BT = ops.kl.per_token(old_BT, logprob_BT.detach(), "k3")
    tokens = learn_BT.sum()
    metrics = {
        "entropy": (ops.logprobs.masked_sum(entropy_BT, mask_BT).sum(), mask_BT.sum()),
        "policy_kl": (ops.logprobs.masked_sum(moved_BT, learn_BT).sum(), tokens),
        "clipped": (clipped_BT.sum(), tokens),
    }
    return Loss(total, count, metrics)


def _policy_gradient(
    logprob_BT: Tensor, old_BT: Tensor, advantage_BT: Tensor, learn_BT: Tensor, how: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    clip = how.clip_low, how.clip_high
    match how.kind:
        case "reinforce":
            loss_BT = ops.policy_losses.reinforce(logprob_BT, advantage_BT, learn_BT)
            return loss_BT, learn_BT & False
        case "clipped":
            return ops.policy_losses.clipped(logprob_BT, old_BT, advantage_BT, learn_BT, clip, how.dual_clip)
        case "sequence_clipped" | "sequence_mean_clipped":
            reduction = "sum" if how.kind == "sequence_clipped" else "mean"
            # An advantage of a response is the same on each of its tokens; a rank without work has no column.
            advantage_B = advantage_BT[:, :1].sum(1)
            return ops.policy_losses.sequence_clipped(logprob_BT, old_BT, advantage_B, learn_BT, clip, reduction)
