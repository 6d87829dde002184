"""Online and iterative DPO: pairs of the policy's own best and worst response by a reward model (Guo et al. 2024, arXiv
2402.04792; HelpSteer2's iterative DPO, arXiv 2406.08673, section 4: 10 samples at temperature 0.7 and top-p 0.9).

    y_c = argmax_k r(x, y_k), y_r = argmin_k r(x, y_k) of n samples; then the loss of `align.algorithms.dpo`

The strength of a pair is the difference of its scores, and so is the gold difference of ``rpo_*``. A prompt teaches
nothing where fewer than two responses are usable, or where all scores are equal. Iterative DPO samples
many prompts in one step (``prompts_per_step: 20000``) and learns from their pairs in ``epochs`` passes.

Left out: more than one pair of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from align import ops
from align.algorithms import _candidates, _diagnostics, _preference_loss, _rollout
from align.algorithms._evaluation import Evaluator
from align.config import (
    OnPolicyConfig,
    PreferenceLossConfig,
    ReferenceConfig,
    ReferenceFromPolicyConfig,
    SamplingConfig,
)
from align.roles import PolicyRole, ReferenceRole, RewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.run import Run
    from align.types import Pairs, Rollouts

load_data = _rollout.load_data


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """Recipe of online DPO."""

    reference: ReferenceConfig = field(default_factory=lambda: ReferenceFromPolicyConfig())
    """The frozen policy in d; by default what the policy starts from. Absent where the loss reads none."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=10, temperature=0.7, top_p=0.9))
    """``num_samples`` is n, at least 2. 10 samples at temperature 0.7 and top-p 0.9: HelpSteer2."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    """The loss of a pair."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()

    def absent(self) -> set[str]:
        return super().absent() | (set() if self.loss.needs_reference else {"reference"})


class OnlineDPORoles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole
    reference: ReferenceRole | None
    reward: RewardRole
    eval_reward: RewardRole | None


def choose_pairs(config: Config, rollouts: Rollouts, score_B: Tensor) -> tuple[Pairs, Tensor, dict[str, float]]:
    """Pairs of best and worst, and the scores of their responses."""
    num_samples = config.sampling.num_samples
    score_PK, usable_PK = _candidates.comparable_candidates(config, rollouts, score_B)
    best_P, worst_P, gap_P = ops.advantages.best_and_worst(score_PK, usable_PK)
    prompts = (gap_P > 0).nonzero().squeeze(1)
    chosen, rejected = (ops.advantages.sequence_index(prompts, k_P[prompts], num_samples) for k_P in (best_P, worst_P))
    pairs = rollouts.pairs(chosen, rejected, gap_P[prompts])
    gold_B = ops.advantages.interleave(score_PK.flatten()[chosen], score_PK.flatten()[rejected])
    statistics = {"learnable": len(prompts) / len(gap_P), "gap": float(gap_P[prompts].mean()) if len(prompts) else 0.0}
    return pairs, gold_B, statistics


def train(config: Config, train_data: _rollout.TrainData, roles: OnlineDPORoles, run: Run) -> None:
    """Sample, pair the best with the worst, prefer it."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    loss = partial(_preference_loss.loss, how=config.loss)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        score_B, eval_B = _candidates.score_candidates(roles, rollouts)
        pairs, gold_B, statistics = choose_pairs(config, rollouts, score_B)
        batch = pairs.batch(reference_B=_preference_loss.reference_sums(roles.reference, pairs), gold_B=gold_B)
        statistics |= _diagnostics.reward_diagnostics(rollouts, score_B, eval_B, None, run.state)
        metrics = _rollout.run_updates(config, step, 2, {"": (roles.policy, batch, loss)})
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, score_B)
    roles.policy.export(run.final).result()
