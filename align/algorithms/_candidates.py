"""Shared by recipes that choose among the samples of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from align import ops
from align.roles import CompletedFuture, RewardRole, wait_for_all

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import OnPolicyConfig
    from align.types import Rollouts


class ScoringRoles(Protocol):
    """Roles that score."""

    reward: RewardRole
    eval_reward: RewardRole | None


def score_candidates(roles: ScoringRoles, rollouts: Rollouts) -> tuple[Tensor, Tensor | None]:
    """Scores of the reward model and of the eval reward model, None without one."""
    eval_score = roles.eval_reward.score(rollouts.sequences) if roles.eval_reward else CompletedFuture(None)
    return wait_for_all(roles.reward.score(rollouts.sequences), eval_score)


def comparable_candidates(config: OnPolicyConfig, rollouts: Rollouts, score_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (P, K), and which responses may be chosen: not truncated ones with ``truncated: mask``, and none of a
    prompt where a response has no finite score."""
    score_B, usable_B = ops.rewards.treat_truncated(
        score_B, rollouts.finished_B, config.truncated, config.truncation_penalty
    )
    score_PK, usable_PK = (x.view(-1, config.sampling.num_samples) for x in (score_B, usable_B))
    return score_PK, usable_PK & score_PK.isfinite().all(1, keepdim=True)
