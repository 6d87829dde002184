"""What recipes share that choose among the samples of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from align import ops, roles

if TYPE_CHECKING:
    from torch import Tensor

    from align.sections import OnPolicy
    from align.types import Rollouts


class Judges(Protocol):
    """Roles that score."""

    reward: roles.Reward
    second_reward: roles.Reward | None


def opinions(cast: Judges, rollouts: Rollouts) -> tuple[Tensor, Tensor | None]:
    """Scores of the reward model, and of the second one where there is one."""
    second = cast.second_reward.score(rollouts.sequences) if cast.second_reward else roles.Ready(None)
    return roles.together(cast.reward.score(rollouts.sequences), second)


def comparable(config: OnPolicy, rollouts: Rollouts, score_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (P, K) to choose by, and which responses may be chosen: those with an end where that is asked for; none
    of a prompt where one response has no finite score."""
    score_B, usable_B = ops.rewards.treat_unfinished(
        score_B, rollouts.finished_B, config.unfinished, config.unfinished_penalty
    )
    score_PK, usable_PK = (x.view(-1, config.sampling.num_samples) for x in (score_B, usable_B))
    return score_PK, usable_PK & score_PK.isfinite().all(1, keepdim=True)
