"""GRPO (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300), Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) and DAPO (Yu et
al. 2025, arXiv 2503.14476), which differ by options.

For K responses to a prompt with rewards R_i, on every token t of response i:

    A_i = (R_i - mean R) / (std R + 1e-6)                                        std with K - 1
    L   = mean of max(-A_i rho_it, -A_i clip(rho_it, 1 - low, 1 + high)) + kl_coef * k3_it

GRPO: the mean is over each response's tokens, then over responses. Dr. GRPO: ``normalize: false``, ``loss.aggregation:
constant``. DAPO: ``loss: {clip_high: 0.28, aggregation: token_mean}``, ``kl_coef: 0``, ``shaping.overlong_buffer`` and
``max_attempts`` above 1: prompts whose responses all have one reward teach nothing, so more prompts are sampled until
``prompts_per_step`` groups with spread are there.

Left out: DAPO's rule-based rewards, and its filter by accuracy (spread of the reward takes its place).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from align import data, ops
from align.algorithms import _policy_loss, _rewards, _rollout
from align.algorithms._evaluation import Evaluator
from align.config import PolicyGradientConfig, PolicyLossConfig, SamplingConfig
from align.roles import CompletedFuture

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import PreferenceData
    from align.data.prompts import PromptStream
    from align.run import Run
    from align.types import Batch, Rollouts


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Recipe of GRPO and its kin."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=8))
    """``num_samples`` is K, at least 2. 8: TRL; DeepSeekMath takes 64."""
    kl_coef: float = 0.04
    """Weight of the KL divergence. 0.04: DeepSeekMath; DAPO and Dr. GRPO take 0."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k3"
    """Estimate at a token. k3: DeepSeekMath, equation 4."""
    kl_placement: Literal["reward", "loss"] = "loss"
    """``loss``: DeepSeekMath."""
    kl_reduction: Literal["mean", "sum"] = "sum"
    """KL of a response where it is in the reward: of all its tokens or of the mean one. Not read with ``loss``."""
    truncated: Literal["mask", "keep", "penalize"] = "keep"
    """``keep``: DeepSeekMath. DAPO shapes by length or masks (its overlong filtering)."""
    loss: PolicyLossConfig = field(
        default_factory=lambda: PolicyLossConfig(kind="clipped", aggregation="sequence_mean_token_mean")
    )
    """The policy's loss. GRPO's defaults. GSPO: ``kind: sequence_mean_clipped``. Dr. GRPO: ``aggregation: constant``.
    DAPO: ``aggregation: token_mean``."""
    normalize: bool = True
    """Divide by the group's standard deviation; false is Dr. GRPO."""
    max_attempts: int = 1
    """Batches of prompts that a step may sample to find ``prompts_per_step`` groups with spread; 1 takes the first
    batch as it is (DAPO's dynamic sampling above that). Above 1 only with ``max_off_policy_steps: 0``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be positive: {self.max_attempts}")
        if self.max_attempts > 1 and self.max_off_policy_steps:
            raise ValueError(
                f"max_attempts={self.max_attempts} samples within the step and max_off_policy_steps="
                f"{self.max_off_policy_steps} before it: set one of them to its default"
            )

    def rows_per_step(self) -> tuple[str, int]:
        """Each step reserves the prompts of all its attempts."""
        key = "prompts_per_step" if self.max_attempts == 1 else "prompts_per_step times max_attempts"
        return key, self.prompts_per_step * self.max_attempts

    def notes(self) -> list[str]:
        return self.kl_notes(self.kl_reduction)


def load_data(config: Config, source: PreferenceData, renderer: Renderer) -> tuple[_rollout.TrainData, dict[str, int]]:
    """`_rollout.load_data` with ``max_attempts`` batches of prompts for each step."""
    return _rollout.load_data(config, source, renderer, config.max_attempts)


def with_spread(
    config: Config, prompts: PromptStream, rollouts: Rollouts, roles: _rollout.Roles
) -> tuple[Rollouts, Tensor, int]:
    """DAPO's dynamic sampling (section 3.2): rollouts and scores of the first ``prompts_per_step`` groups whose scores
    are not all alike, and the batches that were sampled. Scores are taken as they are, before any shaping.

    Fewer where ``max_attempts`` batches did not hold so many; the last batch as it is where none of them held one.
    """
    K, missing = config.sampling.num_samples, config.prompts_per_step
    score_B = roles.reward.score(rollouts.sequences).result()
    if config.max_attempts == 1:
        return rollouts, score_B, 1
    attempt, kept = 1, list[tuple["Rollouts", "Tensor"]]()
    while True:
        groups = ops.advantages.groups_with_spread(score_B.view(-1, K))[:missing]
        if len(groups):
            rows = data.prompts.group_members(groups, K)
            kept.append((rollouts.select(rows), score_B[rows]))
            missing -= len(groups)
        if not missing or attempt == config.max_attempts:
            break
        rollouts = roles.policy.generate(prompts.batch(rollouts.step, attempt), config.sampling).result()
        score_B = roles.reward.score(rollouts.sequences).result()
        attempt += 1
    parts, scores = zip(*(kept or [(rollouts, score_B)]), strict=True)
    return type(rollouts).concatenate(parts), ops.advantages.concatenate(scores), attempt


def make_batch(
    config: Config, scored: _rollout.ScoredRollouts, rewards: _rewards.ShapedRewards
) -> tuple[Batch, dict[str, float]]:
    """Advantages of the step, and its statistics."""
    rollouts, K = scored.rollouts, config.sampling.num_samples
    kl_B = ops.kl.per_sequence(rewards.kl_BT, rollouts.mask_BT, config.kl_reduction)
    reward_PK = ops.rewards.subtract_kl(rewards.reward_B, kl_B, rewards.kl_in_reward).view(-1, K)
    compare = ops.advantages.group_standardized if config.normalize else ops.advantages.group_centered
    advantage_PK, learnable_PK = compare(reward_PK, rewards.usable_B.view(-1, K))
    advantage_BT = ops.advantages.broadcast_to_tokens(advantage_PK.flatten(), rollouts.mask_BT)
    statistics = rewards.statistics | {
        "learnable": float(learnable_PK.double().mean()),
        "groups_without_spread": 1.0 - float((advantage_PK != 0).any(1).double().mean()),
    }
    return _rollout.policy_batch(scored, advantage_BT, learnable_PK.flatten()), statistics


def train(config: Config, train_data: _rollout.TrainData, roles: _rollout.Roles, run: Run) -> None:
    """Sample, score, compare within groups, update."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, first in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        rollouts, score_B, batches = with_spread(config, train_data.prompts, first, roles)
        scored = _rollout.score_rollouts(roles, rollouts, CompletedFuture(score_B))
        rewards = _rewards.shape_rewards(config, scored, run.state)
        batch, statistics = make_batch(config, scored, rewards)
        update = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": update}, config.target_kl)
        statistics["sampled_batches"] = float(batches)
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, score_B)
    roles.policy.export(run.final).result()
