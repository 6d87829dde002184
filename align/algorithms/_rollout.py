"""Shared by on-policy algorithms: load prompts, score a rollout batch, and train on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from align import data
from align.algorithms import _evaluation
from align.roles import (
    CompletedFuture,
    Future,
    LossFunction,
    Metrics,
    PolicyRole,
    ReferenceRole,
    RewardRole,
    TrainableRole,
    wait_for_all,
)

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import OnPolicyConfig
    from align.data.chat import Renderer
    from align.data.dataset import PreferenceData
    from align.data.prompts import PromptStream
    from align.types import Batch, Packed, Rollouts, Sequences


@dataclass(frozen=True)
class TrainData:
    """Training prompts and held-out prompts."""

    prompts: PromptStream
    held_out: _evaluation.HeldOutPrompts | None
    reward_prompts: Packed | None = None
    """The prompts that reward models read, row by row, where the policy reads others (attributes, a draft to edit)."""

    def rows(self, rollouts: Rollouts) -> Tensor:
        """Index into the training prompts of each prompt of a step's rollouts, (P,)."""
        return self.prompts.order.indices(rollouts.step)

    def for_reward_models(self, rollouts: Rollouts) -> Sequences:
        """The responses of a step, appended to the prompts that reward models read."""
        sequences = rollouts.sequences
        if self.reward_prompts is None:
            return sequences
        return replace(sequences, prompts=self.reward_prompts.select(self.rows(rollouts)))


class Roles(Protocol):
    """Roles of a policy gradient; PPO's critic is added in `align.algorithms.ppo`."""

    policy: PolicyRole
    reference: ReferenceRole
    reward: RewardRole
    eval_reward: RewardRole | None


def load_data(
    config: OnPolicyConfig, source: PreferenceData, renderer: Renderer, attempts: int = 1
) -> tuple[TrainData, dict[str, int]]:
    """Unique prompts of the training split, held-out prompts, and row counts by outcome."""
    loaded = data.dataset.tokenize_prompts(source.train, renderer, config.data.max_prompt_tokens)
    stream = data.prompts.PromptStream(
        loaded.tokens, config.prompts_per_step, config.run.seed, renderer.stop_ids, attempts
    )
    counts = dict(loaded.counts)
    return TrainData(
        stream, _evaluation.load_held_out(config.evaluation, source, renderer, config.data, counts)
    ), counts


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with scores, reference log-probabilities and old log-probabilities."""

    rollouts: Rollouts
    score_B: Tensor
    eval_B: Tensor | None
    """Scores of ``eval_reward``, a second reward model that is measured and never trained against."""
    reference_BT: Tensor
    old_BT: Tensor
    """log pi_old, the policy before this step's first update; see `PolicyRole.old_logprobs`."""


def score_rollouts(
    roles: Roles, rollouts: Rollouts, score: Future[Tensor] | None = None, reward_sequences: Sequences | None = None
) -> ScoredRollouts:
    """Query reward models, reference and policy at the same time.

    ``score``: scores that the caller has already. ``reward_sequences``: the input of the reward models where it
    differs from what the policy read.
    """
    sequences = rollouts.sequences
    reward_sequences = reward_sequences or sequences
    score = score or roles.reward.score(reward_sequences)
    eval_score = roles.eval_reward.score(reward_sequences) if roles.eval_reward else CompletedFuture(None)
    reference = roles.reference.logprobs(sequences, rollouts.temperature)
    return ScoredRollouts(rollouts, *wait_for_all(score, eval_score, reference, roles.policy.old_logprobs(rollouts)))


def policy_batch(scored: ScoredRollouts, advantage_BT: Tensor, learnable_B: Tensor) -> Batch:
    """All sequences with the columns that `align.algorithms._policy_loss.loss` reads."""
    return scored.rollouts.batch(
        advantage_BT=advantage_BT,
        learnable_B=learnable_B,
        old_BT=scored.old_BT,
        rollout_BT=scored.rollouts.logprob_BT,
        reference_BT=scored.reference_BT,
    )


Update = tuple[TrainableRole, "Batch", LossFunction]
"""The role to train, its batch, and its loss."""

SUMMED = "updates", "trained_tokens", "skipped_steps", "non_finite"
"""Metrics that `run_updates` adds over the optimizer steps of a rollout batch; it averages the others."""


def run_updates(
    config: OnPolicyConfig, step: int, group: int, updates: Mapping[str, Update], target_kl: float | None = None
) -> Metrics:
    """``epochs`` times ``minibatches`` optimizer steps on one rollout batch, all roles at the same time.

    ``group`` adjacent sequences stay in one minibatch. A role whose ``policy_kl`` (nats a token) exceeds ``target_kl``
    skips the batch's other steps. Metric names are prefixed with the key of ``updates``. Metrics are means over the
    optimizer steps; token counts and skipped steps are sums.
    """
    history: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in updates}
    active = dict(updates)
    num_groups = len(next(iter(updates.values()))[1].sequences) // group
    for groups in data.prompts.minibatches(num_groups, config.minibatches, config.epochs, config.run.seed, step):
        rows = data.prompts.group_members(groups, group)
        futures = {name: role.update(batch.select(rows), loss) for name, (role, batch, loss) in active.items()}
        for name, metrics in zip(futures, wait_for_all(*futures.values()), strict=True):
            for key, value in {**metrics, "updates": 1.0}.items():
                history[name][key].append(value)
            if target_kl is not None and metrics.get("policy_kl", 0.0) > target_kl:
                del active[name]
    return {
        f"{name}{key}": sum(values) if key in SUMMED else sum(values) / len(values)
        for name, columns in history.items()
        for key, values in columns.items()
    }
