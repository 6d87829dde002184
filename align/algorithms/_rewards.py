"""From scores to shaped rewards, in the same order for every policy gradient.

Normalization, scale and clip; length penalty and truncation; KL to the reference, which the algorithm subtracts itself
where KL belongs into the reward. A response without a finite score removes all responses to its prompt from the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align import ops
from align.algorithms import _diagnostics

if TYPE_CHECKING:
    from torch import Tensor

    from align.algorithms._rollout import ScoredRollouts
    from align.config import PolicyGradientConfig
    from align.ops.rewards import Moments
    from align.types import Rollouts


@dataclass(frozen=True)
class ShapedRewards:
    """Rewards after normalization and truncation, before KL, with the KL estimates and coefficients."""

    reward_B: Tensor
    usable_B: Tensor
    """Responses that may be trained on: they and all others to their prompt have a score, and they are not truncated
    where ``truncated: mask``."""
    kl_BT: Tensor
    kl_in_reward: float
    kl_in_loss: float
    """The KL coefficient, in its place; 0 in the other."""
    statistics: dict[str, float]


def normalize_scores(
    config: PolicyGradientConfig, rollouts: Rollouts, score_B: Tensor, state: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Rewards before KL, and which responses the treatment of truncation leaves in, each (B,)."""
    shaping = config.shaping
    mean, std = shaping.mean, shaping.std
    if shaping.running:
        moments = _moments(state)
        mean, std = moments.mean, moments.std
    reward_B = (score_B - mean) / std * shaping.scale
    if shaping.clip is not None:
        reward_B = reward_B.clamp(-shaping.clip, shaping.clip)
    reward_B = reward_B + ops.rewards.overlong(
        rollouts.mask_BT.sum(1), config.sampling.max_tokens, shaping.overlong_buffer, shaping.overlong_penalty
    )
    return ops.rewards.treat_truncated(reward_B, rollouts.finished_B, config.truncated, config.truncation_penalty)


def _moments(state: dict[str, float]) -> Moments:
    return ops.rewards.Moments(*(state.get(f"reward/{name}", 0.0) for name in ("count", "mean", "m2")))


def shape_rewards(config: PolicyGradientConfig, scored: ScoredRollouts, state: dict[str, float]) -> ShapedRewards:
    """Shape scores and estimate KL.

    Updates ``state``, which is carried from step to step: the running moments, which include this step's scores, and
    the adaptive KL coefficient, which takes effect in the next step.
    """
    rollouts, mask_BT, K = scored.rollouts, scored.rollouts.mask_BT, config.sampling.num_samples
    if config.shaping.running:
        state |= {f"reward/{name}": value for name, value in vars(_moments(state).updated(scored.score_B)).items()}
    scored_B = scored.score_B.isfinite().view(-1, K).all(1).repeat_interleave(K)
    reward_B, usable_B = normalize_scores(config, rollouts, scored.score_B, state)
    usable_B = usable_B & scored_B
    signed_BT = ops.kl.per_token(rollouts.logprob_BT, scored.reference_BT, "k1")
    kl_B = ops.logprobs.masked_sum(signed_BT, mask_BT)
    kl_coef = state.setdefault("kl_coef", config.kl_coef)
    if config.kl_target is not None:
        state["kl_coef"] = ops.kl.adapted(kl_coef, float(kl_B.mean()), config.kl_target, config.kl_horizon, len(kl_B))
    statistics = {
        **_diagnostics.reward_diagnostics(rollouts, scored.score_B, scored.eval_B, kl_B, state),
        "shaped_reward": float(reward_B[usable_B].mean()) if bool(usable_B.any()) else 0.0,
        "kl_coef": kl_coef,
        "kl_limited_tokens": float(ops.kl.num_limited(rollouts.logprob_BT, scored.reference_BT, mask_BT)),
        **_diagnostics.mismatch(rollouts.logprob_BT, scored.old_BT, mask_BT),
        "usable": float(usable_B.double().mean()),
    }
    in_loss = config.kl_placement == "loss"
    return ShapedRewards(
        reward_B.masked_fill(~usable_B, 0.0),
        usable_B,
        ops.kl.per_token(rollouts.logprob_BT, scored.reference_BT, config.kl_estimator),
        0.0 if in_loss else kl_coef,
        kl_coef if in_loss else 0.0,
        statistics,
    )
