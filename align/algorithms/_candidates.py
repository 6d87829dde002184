"""What recipes share that choose among the samples of a prompt."""

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


def score_candidates(cast: ScoringRoles, rollouts: Rollouts) -> tuple[Tensor, Tensor | None]:
    """Scores of the reward model, and of the second one where there is one."""
    second = cast.eval_reward.score(rollouts.sequences) if cast.eval_reward else CompletedFuture(None)
    return wait_for_all(cast.reward.score(rollouts.sequences), second)


def comparable_candidates(config: OnPolicyConfig, rollouts: Rollouts, score_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (P, K) to choose by, and which responses may be chosen: those with an end where that is asked for; none
    of a prompt where one response has no finite score."""
    score_B, usable_B = ops.rewards.treat_truncated(
        score_B, rollouts.finished_B, config.truncated, config.truncation_penalty
    )
    score_PK, usable_PK = (x.view(-1, config.sampling.num_samples) for x in (score_B, usable_B))
    return score_PK, usable_PK & score_PK.isfinite().all(1, keepdim=True)
