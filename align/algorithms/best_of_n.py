"""Best-of-n, or rejection sampling: supervised fine-tuning on the reward's best of n samples (RAFT: Dong et al. 2023,
arXiv 2304.06767; Llama 2: Touvron et al. 2023, arXiv 2307.09288, section 3.2.3).

    y*_x = argmax_k r(x, y_k)            L = - sum_x sum_t log pi(y*_xt | x, y*_x<t) / sum_x |y*_x|

of n responses that the policy samples itself. Unfinished responses are not chosen by default; a prompt without one
that can be chosen is left out.

Left out: a buffer of the best of earlier steps (Llama 2), and a threshold below which a best response is not learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from align import ops
from align.algorithms import _candidates, _diagnostics, _rollout
from align.algorithms._evaluation import Evaluator
from align.algorithms.sft import loss
from align.config import OnPolicyConfig, SamplingConfig
from align.roles import PolicyRole, RewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.run import Run
    from align.types import Batch, Rollouts

load_data = _rollout.load_data


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """Recipe of best-of-n."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=8))
    """``num_samples`` is n, at least 2. 8: RAFT compares 8, 16 and 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()


class BestOfNRoles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole
    reward: RewardRole
    eval_reward: RewardRole | None


def select_best(config: Config, rollouts: Rollouts, score_B: Tensor) -> tuple[Batch, dict[str, float]]:
    """The best response to each prompt that has one, and its mean score."""
    num_samples = config.sampling.num_samples
    score_PK, usable_PK = _candidates.comparable_candidates(config, rollouts, score_B)
    best_P, _, _ = ops.advantages.best_and_worst(score_PK, usable_PK)
    prompts = usable_PK.any(1).nonzero().squeeze(1)
    rows = ops.advantages.sequence_index(prompts, best_P[prompts], num_samples)
    kept = score_B[rows]
    statistics = {
        "best_reward": float(kept.mean()) if len(kept) else 0.0,
        "learnable": len(rows) / len(best_P),
    }
    return rollouts.sequences.select(rows).batch(), statistics


def train(config: Config, train_data: _rollout.TrainData, roles: BestOfNRoles, run: Run) -> None:
    """Sample, keep the best, imitate it."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        score_B, eval_B = _candidates.score_candidates(roles, rollouts)
        batch, statistics = select_best(config, rollouts, score_B)
        statistics |= _diagnostics.reward_diagnostics(rollouts, score_B, eval_B, None, run.state)
        metrics = _rollout.run_updates(config, step, 1, {"": (roles.policy, batch, loss)})
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, score_B)
    roles.policy.export(run.final).result()
