"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), with a HelpSteer reward
model.

For K responses y_i to a prompt x, with r the shaped score and pi_ref the reference:

    R_i = r(x, y_i) - kl_coef * KL_i          KL_i = sum_t or mean_t of an estimate at each token
    A_i = R_i - mean of R_j over the other usable j (scored, and not masked as truncated)
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
    """KL of a response in the reward: mean over its tokens (NeMo-Aligner) or sum over them (TRL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()

    def notes(self) -> list[str]:
        return self.kl_notes(self.kl_reduction)


def make_batch(
    config: Config, scored: _rollout.ScoredRollouts, rewards: _rewards.ShapedRewards
) -> tuple[Batch, dict[str, float]]:
    """Leave-one-out advantages, and statistics of the step."""
    rollouts, K = scored.rollouts, config.sampling.num_samples
    kl_B = ops.kl.per_sequence(rewards.kl_BT, rollouts.mask_BT, config.kl_reduction)
    reward_B = ops.rewards.subtract_kl(rewards.reward_B, kl_B, rewards.kl_in_reward)
    advantage_PK, learnable_PK = ops.advantages.leave_one_out(reward_B.view(-1, K), rewards.usable_B.view(-1, K))
    advantage_BT = ops.advantages.broadcast_to_tokens(advantage_PK.flatten(), rollouts.mask_BT)
    statistics = rewards.statistics | {"learnable": float(learnable_PK.double().mean())}
    return _rollout.policy_batch(scored, advantage_BT, learnable_PK.flatten()), statistics


def train(config: Config, train_data: _rollout.TrainData, roles: _rollout.Roles, run: Run) -> None:
    """Sample, score, compute leave-one-out advantages, update."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        scored = _rollout.score_rollouts(roles, rollouts)
        rewards = _rewards.shape_rewards(config, scored, run.state)
        batch, statistics = make_batch(config, scored, rewards)
        update = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": update}, config.target_kl)
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, scored.score_B)
    roles.policy.export(run.final).result()
