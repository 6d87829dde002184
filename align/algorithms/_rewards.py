"""From scores to rewards, in the order that every policy gradient keeps.

Score; normalization, scale and clip; length and missing ends; KL, which the algorithm takes off itself where it belongs
into the reward. A response without a finite score takes all responses to its prompt out of the step.
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
    """Rewards before KL, and what belongs to them."""

    reward_B: Tensor
    usable_B: Tensor
    """Responses that may be learned from: scored, with all others to their prompt, and not cut off where those are
    left out."""
    kl_BT: Tensor
    kl_in_reward: float
    kl_in_loss: float
    """The coefficient, in its place; 0 in the other."""
    statistics: dict[str, float]


def normalize_scores(
    config: PolicyGradientConfig, rollouts: Rollouts, score_B: Tensor, state: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Rewards before KL, and which responses may be learned from as far as their end tells."""
    shaping = config.shaping
    mean, std = shaping.mean, shaping.std
    if shaping.running:
        known = _moments(state)
        mean, std = known.mean, known.std
    reward_B = (score_B - mean) / std * shaping.scale
    if shaping.clip is not None:
        reward_B = reward_B.clamp(-shaping.clip, shaping.clip)
    reward_B = reward_B + ops.rewards.overlong(
        rollouts.mask_BT.sum(1), config.sampling.max_tokens, shaping.overlong_buffer, shaping.overlong_penalty
    )
    return ops.rewards.treat_truncated(reward_B, rollouts.finished_B, config.truncated, config.truncation_penalty)


def _moments(state: dict[str, float]) -> Moments:
    return ops.rewards.Moments(*(state.get(f"reward/{name}", 0.0) for name in ("count", "mean", "m2")))


def shape_rewards(config: PolicyGradientConfig, seen: ScoredRollouts, state: dict[str, float]) -> ShapedRewards:
    """From scores to rewards and KL. Moves what is carried in ``state``: running moments, whose new values count
    already, and the KL controller, whose new coefficient the next step reads."""
    rollouts, mask_BT, K = seen.rollouts, seen.rollouts.mask_BT, config.sampling.num_samples
    if config.shaping.running:
        state |= {f"reward/{name}": value for name, value in vars(_moments(state).updated(seen.score_B)).items()}
    scored_B = seen.score_B.isfinite().view(-1, K).all(1).repeat_interleave(K)
    reward_B, usable_B = normalize_scores(config, rollouts, seen.score_B, state)
    usable_B = usable_B & scored_B
    signed_BT = ops.kl.per_token(rollouts.logprob_BT, seen.reference_BT, "k1")
    kl_B = ops.logprobs.masked_sum(signed_BT, mask_BT)
    coefficient = state.setdefault("kl_coef", config.kl_coef)
    if config.kl_target is not None:
        state["kl_coef"] = ops.kl.adapted(
            coefficient, float(kl_B.mean()), config.kl_target, config.kl_horizon, len(kl_B)
        )
    mismatch_BT = ops.kl.per_token(rollouts.logprob_BT, seen.old_BT, "k3")
    statistics = {
        **_diagnostics.reward_diagnostics(rollouts, seen.score_B, seen.eval_B, kl_B, state),
        "shaped_reward": float(reward_B[usable_B].mean()) if bool(usable_B.any()) else 0.0,
        "kl_coef": coefficient,
        "kl_limited_tokens": float(ops.kl.num_limited(rollouts.logprob_BT, seen.reference_BT, mask_BT)),
        "mismatch_kl": float(ops.logprobs.masked_sum(mismatch_BT, mask_BT).sum() / mask_BT.sum()),
        "usable": float(usable_B.double().mean()),
    }
    in_loss = config.kl_placement == "loss"
    return ShapedRewards(
        reward_B.masked_fill(~usable_B, 0.0),
        usable_B,
        ops.kl.per_token(rollouts.logprob_BT, seen.reference_BT, config.kl_estimator),
        0.0 if in_loss else coefficient,
        coefficient if in_loss else 0.0,
        statistics,
    )
