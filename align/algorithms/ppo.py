"""PPO with a separate critic (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv
1909.08593, and Ouyang et al. 2022, arXiv 2203.02155; HelpSteer2, arXiv 2406.08673, and HelpSteer2-Preference).

With r the shaped score on the last token, kl the estimate at each token and V_t the value before token t is chosen:

    r_t     = [t is the last token] r - kl_coef * kl_t
    delta_t = r_t + gamma V_{t+1} - V_t                        V after the last token is 0
    A_t     = delta_t + gamma lambda A_{t+1}                   returns R_t = A_t + V_t, before A is whitened
    policy  : max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)), mean over tokens
    critic  : 1/2 max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2), mean over tokens

``epochs`` times ``minibatches`` optimizer steps of both on each rollout batch, at the same time if they have separate
slots. In each round the critic starts from the reward model.

Left out: one network for both roles, and values of the prompt's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from align import ops
from align.algorithms import _policy_loss, _rewards, _rollout
from align.algorithms._evaluation import Evaluator
from align.config import CriticConfig, CriticFromRewardConfig, PolicyGradientConfig, PolicyLossConfig
from align.roles import CriticRole, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from align.run import Run
    from align.types import Batch

load_data = _rollout.load_data


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Recipe of PPO."""

    critic: CriticConfig = field(default_factory=lambda: CriticFromRewardConfig())
    """The value function; by default it starts from the reward model."""
    prompts_per_step: int = 512
    """Prompts of a rollout batch, P. 512: NeMo-Aligner; HelpSteer2 takes 128 and one optimizer step for each."""
    minibatches: int = 8
    """Optimizer steps of a pass; each sees a part of the prompts. 8: NeMo-Aligner, 512 rollouts by 64."""
    loss: PolicyLossConfig = field(default_factory=lambda: PolicyLossConfig(kind="clipped"))
    """The policy's loss. ``clipped``: PPO. ``sequence_*`` kinds are refused: each token has its own advantage."""
    truncated: Literal["mask", "keep", "penalize"] = "keep"
    """``keep``: InstructGPT and NeMo-Aligner's PPO."""
    gamma: float = 1.0
    """Discount of a later token's reward. 1: NeMo-Aligner, TRL."""
    gae_lambda: float = 0.95
    """Weight of later temporal differences (arXiv 1506.02438). 0.95: NeMo-Aligner, TRL."""
    whiten: bool = True
    """Bring advantages of all tokens of the batch to mean 0 and variance 1."""
    value_clip: float = 0.2
    """Distance e from the rollout's value beyond which the critic gains nothing; 0 for no limit. 0.2: NeMo-Aligner."""
    critic_warmup_steps: int = 0
    """Steps of each round in which only the critic learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss.kind.startswith("sequence"):
            raise ValueError(f"loss.kind {self.loss.kind} needs one advantage a response; here each token has its own")
        if not 0 <= self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gamma and gae_lambda lie in [0, 1]: {self.gamma}, {self.gae_lambda}")


class PPORoles(_rollout.Roles, Protocol):
    """Roles of the algorithm."""

    critic: CriticRole


def make_batches(
    config: Config, scored: _rollout.ScoredRollouts, rewards: _rewards.ShapedRewards, value_BT: Tensor
) -> tuple[Batch, Batch, dict[str, float]]:
    """Batches of policy and critic, and what is worth knowing."""
    mask_BT = scored.rollouts.mask_BT
    reward_BT = ops.rewards.per_token(rewards.reward_B, rewards.kl_BT, mask_BT, rewards.kl_in_reward)
    advantage_BT, return_BT = ops.advantages.gae(reward_BT, value_BT, mask_BT, config.gamma, config.gae_lambda)
    learn_BT = mask_BT & rewards.usable_B[:, None]
    statistics = rewards.statistics | {
        "learnable": float(rewards.usable_B.double().mean()),
        "return": float(return_BT[learn_BT].mean()) if bool(learn_BT.any()) else 0.0,
        "explained_variance": ops.diagnostics.explained_variance(value_BT, return_BT, learn_BT),
        "explained_variance_responses": float(learn_BT.any(1).sum()),  # of two or three it says next to nothing
    }
    if config.whiten:
        advantage_BT = ops.advantages.whiten(advantage_BT, learn_BT)
    values = scored.rollouts.batch(old_BT=value_BT, return_BT=return_BT, learnable_B=rewards.usable_B)
    return _rollout.policy_batch(scored, advantage_BT, rewards.usable_B), values, statistics


def value_loss(
    *, value_BT: Tensor, mask_BT: Tensor, old_BT: Tensor, return_BT: Tensor, learnable_B: Tensor, clip: float
) -> Loss:
    """Clipped squared error of the critic, mean over tokens of responses that are learned from."""
    learn_BT = mask_BT & learnable_B[:, None]
    loss_BT = ops.policy_losses.value(value_BT, old_BT, return_BT, learn_BT, clip)
    total, count = ops.policy_losses.aggregate(loss_BT, learn_BT, "token_mean", max_tokens=1)
    mean = ops.logprobs.masked_sum(value_BT, learn_BT).sum()
    return Loss(total, count, {"value": (mean, count)})


def train(config: Config, train_data: _rollout.TrainData, roles: PPORoles, run: Run) -> None:
    """Sample, judge and value, estimate advantages, step both."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        values = roles.critic.values(rollouts.sequences)
        scored = _rollout.score_rollouts(roles, rollouts)
        rewards = _rewards.shape_rewards(config, scored, run.state)
        batch, value_batch, statistics = make_batches(config, scored, rewards, values.result())
        updates: dict[str, _rollout.Update] = {
            "critic/": (roles.critic, value_batch, partial(value_loss, clip=config.value_clip))
        }
        if step - run.first_step >= config.critic_warmup_steps:
            updates[""] = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, updates, config.target_kl)
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, scored.score_B)
    roles.policy.export(run.final).result()
