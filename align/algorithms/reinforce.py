"""REINFORCE with the baselines of REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) and ReMax (Li et al. 2023, arXiv
2310.10505).

With r the shaped score, on the last token of response i, and kl the estimate at each token:

    r_it = [t is the last token] (r(x, y_i) - b_i) - kl_coef * kl_it
    A_it = sum_{u >= t} gamma^(u - t) r_iu,  then (A - mean A) / std A over all tokens of the batch with ``whiten``

- ``baseline: none``    REINFORCE++: b = 0, the whitening alone reduces variance
- ``baseline: group``   REINFORCE++-baseline: b is the mean of the K samples of the prompt
- ``baseline: greedy``  ReMax: b is the score of the greedy response, one rollout more; ``whiten: false`` and
  ``loss: {kind: reinforce, aggregation: sequence_mean}`` as its paper has them

REINFORCE++ clips and normalizes rewards; here ``shaping`` does, and does not by default. Left out: PPO's epochs with a
critic, which are `align.algorithms.ppo`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from align import ops
from align.algorithms import _policy_loss, _rewards, _rollout
from align.algorithms._evaluation import Evaluator
from align.config import PolicyGradientConfig, PolicyLossConfig

if TYPE_CHECKING:
    from torch import Tensor

    from align.run import Run
    from align.types import Batch, Prompts

load_data = _rollout.load_data


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Recipe of REINFORCE++, its variant with a baseline, and ReMax."""

    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimate at a token. k1: REINFORCE++, equation 4; its variant with a baseline takes k2 in the loss."""
    truncated: Literal["mask", "keep", "penalize"] = "keep"
    """``keep``: the papers do not treat truncated responses."""
    loss: PolicyLossConfig = field(default_factory=lambda: PolicyLossConfig(kind="clipped"))
    """The policy's loss. ``clipped``: REINFORCE++. ``sequence_*`` kinds are refused: each token has its own
    advantage."""
    baseline: Literal["none", "group", "greedy"] = "none"
    """Subtracted from a response's score: nothing (REINFORCE++), the mean of the prompt's K samples (``group``, its
    variant with a baseline, K at least 2), or the score of the greedy response (``greedy``, ReMax)."""
    whiten: bool = True
    """Bring advantages of all tokens of the batch to mean 0 and variance 1."""
    gamma: float = 1.0
    """Discount of a later token's reward. 1: both papers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "group" and (self.sampling.num_samples < 2 or self.sampling.temperature <= 0):
            raise ValueError(
                "baseline group needs sampling.num_samples of at least 2 at a positive sampling.temperature: "
                f"{self.sampling.num_samples}, {self.sampling.temperature}"
            )
        if self.loss.kind.startswith("sequence"):
            raise ValueError(f"loss.kind {self.loss.kind} needs one advantage a response; here each token has its own")


def greedy_rewards(config: Config, prompts: Prompts, roles: _rollout.Roles, state: dict[str, float]) -> Tensor:
    """ReMax's baseline of each sequence: the shaped score of the greedy response of the policy as it is now."""
    sampling = replace(config.sampling, num_samples=1, temperature=0.0)
    rollouts = roles.policy.generate(prompts, sampling).result()
    reward_P, _ = _rewards.normalize_scores(config, rollouts, roles.reward.score(rollouts.sequences).result(), state)
    return reward_P.repeat_interleave(config.sampling.num_samples)


def make_batch(
    config: Config, scored: _rollout.ScoredRollouts, rewards: _rewards.ShapedRewards, greedy_B: Tensor | None
) -> tuple[Batch, dict[str, float]]:
    """Advantages of the step, and its statistics."""
    mask_BT, K = scored.rollouts.mask_BT, config.sampling.num_samples
    above_B, learnable_B = rewards.reward_B, rewards.usable_B
    if config.baseline == "group":
        above_PK, learnable_PK = ops.advantages.group_centered(above_B.view(-1, K), learnable_B.view(-1, K))
        above_B, learnable_B = above_PK.flatten(), learnable_PK.flatten()
    if greedy_B is not None:
        learnable_B = learnable_B & greedy_B.isfinite()
        above_B = above_B - greedy_B
    reward_BT = ops.rewards.per_token(above_B, rewards.kl_BT, mask_BT, rewards.kl_in_reward)
    advantage_BT = ops.advantages.returns_to_go(reward_BT, mask_BT, config.gamma)
    if config.whiten:
        advantage_BT = ops.advantages.whiten(advantage_BT, mask_BT & learnable_B[:, None])
    statistics = rewards.statistics | {"learnable": float(learnable_B.double().mean())}
    return _rollout.policy_batch(scored, advantage_BT, learnable_B), statistics


def train(config: Config, train_data: _rollout.TrainData, roles: _rollout.Roles, run: Run) -> None:
    """Sample, judge, subtract the baseline, step."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        scored = _rollout.score_rollouts(roles, rollouts)
        rewards = _rewards.shape_rewards(config, scored, run.state)
        greedy = config.baseline == "greedy"
        greedy_B = greedy_rewards(config, train_data.prompts.batch(step), roles, run.state) if greedy else None
        batch, statistics = make_batch(config, scored, rewards, greedy_B)
        update = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": update}, config.target_kl)
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, scored.score_B)
    roles.policy.export(run.final).result()
