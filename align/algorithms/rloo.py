"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), against a HelpSteer reward
model.

For K responses y_i to a prompt x, with r the shaped score and pi_ref the reference:

    R_i = r(x, y_i) - kl_coef * KL_i          KL_i = sum_t or mean_t of an estimate at each token
    A_i = R_i - mean of R_j over the other usable j
    L   = - sum_i A_i sum_t log pi(y_it | x, y_i<t) / number of tokens of responses that have an A_i

All log-probabilities are taken at the sampling temperature. The defaults are those of NeMo-Aligner's REINFORCE, with
which Llama-3.1-Nemotron-70B-Instruct was aligned (HelpSteer2-Preference, arXiv 2410.01257): one optimizer step for each
batch of rollouts, so no ratio to an older policy. TRL's RLOO is ``loss: {kind: sequence_clipped, aggregation:
sequence_mean_token_mean}`` with ``kl_reduction: sum``, ``kl_estimator: k1`` and ``truncated: keep``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from align import ops
from align.algorithms import _policy_loss, _rewards, _rollout
from align.algorithms._evaluation import Evaluator
from align.config import PolicyGradientConfig, SamplingConfig

if TYPE_CHECKING:
    from align.run import Run
    from align.types import Batch

load_data = _rollout.load_data


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Recipe of RLOO."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=4))
    """``num_samples`` is K, at least 2. 4: HelpSteer2-Preference."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """KL of a response in the reward is that of its mean token (NeMo-Aligner) or of all its tokens (TRL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()

    def notes(self) -> list[str]:
        """See `align.config.RecipeConfig.notes`."""
        return self.kl_notes(self.kl_reduction)


def make_batch(
    config: Config, seen: _rollout.ScoredRollouts, judged: _rewards.ShapedRewards
) -> tuple[Batch, dict[str, float]]:
    """From rewards to advantages, and what is worth knowing."""
    rollouts, K = seen.rollouts, config.sampling.num_samples
    kl_B = ops.kl.per_sequence(judged.kl_BT, rollouts.mask_BT, config.kl_reduction)
    reward_B = ops.rewards.subtract_kl(judged.reward_B, kl_B, judged.kl_in_reward)
    advantage_PK, learnable_PK = ops.advantages.leave_one_out(reward_B.view(-1, K), judged.usable_B.view(-1, K))
    advantage_BT = ops.advantages.spread(advantage_PK.flatten(), rollouts.mask_BT)
    statistics = judged.statistics | {"learnable": float(learnable_PK.double().mean())}
    return _rollout.policy_batch(seen, advantage_BT, learnable_PK.flatten()), statistics


def train(config: Config, material: _rollout.TrainData, cast: _rollout.Roles, run: Run) -> None:
    """Sample, judge, compare, step."""
    evaluator = Evaluator(config.evaluation, config.sampling, material.held_out, cast, run)
    for step, rollouts in run.rollouts(material.prompts, cast.policy, config.sampling, config.max_off_policy_steps):
        seen = _rollout.score_rollouts(cast, rollouts)
        judged = _rewards.shape_rewards(config, seen, run.state)
        batch, statistics = make_batch(config, seen, judged)
        lesson = cast.policy, batch, _policy_loss.policy_loss(config, judged.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": lesson}, config.target_kl)
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, seen.score_B)
    cast.policy.export(run.final).result()
