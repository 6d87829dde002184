"""What recipes share whose policy samples: prompts, what the roles say of a rollout, and minibatches."""

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
    """Prompts to learn from, and held-out ones."""

    prompts: PromptStream
    held_out: _evaluation.HeldOutPrompts | None
    judged: Packed | None = None
    """The prompts as judges read them, row by row, where the policy reads others (attributes, a draft to be edited)."""

    def rows(self, rollouts: Rollouts) -> Tensor:
        """Which row of the prompts each prompt of a step's rollouts is, (P,)."""
        return self.prompts.order.indices(rollouts.step)

    def as_judged(self, rollouts: Rollouts) -> Sequences:
        """The responses of a step as judges read them."""
        sequences = rollouts.sequences
        return sequences if self.judged is None else replace(sequences, prompts=self.judged.select(self.rows(rollouts)))


class Roles(Protocol):
    """Roles of a policy gradient; the critic's is in `align.algorithms.ppo`."""

    policy: PolicyRole
    reference: ReferenceRole
    reward: RewardRole
    eval_reward: RewardRole | None


class TrainableRole(Protocol):
    """A role that learns from batches."""

    def update(self, batch: Batch, loss: LossFunction) -> Future[Metrics]:
        """One optimizer step."""
        ...


def load_data(
    config: OnPolicyConfig, source: PreferenceData, renderer: Renderer, attempts: int = 1
) -> tuple[TrainData, dict[str, int]]:
    """The prompts of the training split, each once, the held-out ones, and what became of the rows."""
    found = data.dataset.prompts(source.train, renderer, config.data.max_prompt_tokens)
    stream = data.prompts.PromptStream(
        found.tokens, config.prompts_per_step, config.run.seed, renderer.stop_ids, attempts
    )
    counts = dict(found.counts)
    return TrainData(
        stream, _evaluation.load_held_out(config.evaluation, source, renderer, config.data, counts)
    ), counts


@dataclass(frozen=True)
class ScoredRollouts:
    """What the roles say of a rollout."""

    rollouts: Rollouts
    score_B: Tensor
    eval_B: Tensor | None
    reference_BT: Tensor
    old_BT: Tensor
    """Log-probabilities under the policy as it is now; the rollout's own unless it lags."""


def score_rollouts(
    cast: Roles, rollouts: Rollouts, score: Future[Tensor] | None = None, judged: Sequences | None = None
) -> ScoredRollouts:
    """Ask reward models, reference and policy at the same time. ``score`` is given where it is known already, and
    ``judged``, what reward models read, where it is not what the policy read."""
    sequences, judged = rollouts.sequences, judged or rollouts.sequences
    score = score or cast.reward.score(judged)
    second = cast.eval_reward.score(judged) if cast.eval_reward else CompletedFuture(None)
    reference = cast.reference.logprobs(sequences, rollouts.temperature)
    return ScoredRollouts(rollouts, *wait_for_all(score, second, reference, cast.policy.old_logprobs(rollouts)))


def policy_batch(seen: ScoredRollouts, advantage_BT: Tensor, learnable_B: Tensor) -> Batch:
    """All sequences with the columns that `align.algorithms._policy_loss.loss` reads."""
    return seen.rollouts.batch(
        advantage_BT=advantage_BT,
        learnable_B=learnable_B,
        old_BT=seen.old_BT,
        rollout_BT=seen.rollouts.logprob_BT,
        reference_BT=seen.reference_BT,
    )


Update = tuple[TrainableRole, "Batch", LossFunction]
"""Who learns, from what, by which loss."""


def run_updates(
    config: OnPolicyConfig, step: int, group: int, lessons: Mapping[str, Update], target_kl: float | None = None
) -> Metrics:
    """``epochs`` times ``minibatches`` optimizer steps on one rollout batch, all learners at the same time.

    ``group`` adjacent sequences stay together. A learner whose ``policy_kl`` (nats a token) exceeds ``target_kl`` stops
    for the rest of the step. Metrics get the learner's name in front and are means over its optimizer steps, numbers of
    tokens and skipped steps their sums.
    """
    every: dict[str, list[Metrics]] = {name: [] for name in lessons}
    going = dict(lessons)
    num_groups = len(next(iter(lessons.values()))[1].sequences) // group
    parts = data.prompts.minibatches(num_groups, config.minibatches, config.epochs, config.run.seed, step)
    for groups in parts:
        rows = data.prompts.members(groups, group)
        asked = {name: one.update(batch.select(rows), loss) for name, (one, batch, loss) in going.items()}
        for name, metrics in zip(asked, wait_for_all(*asked.values()), strict=True):
            every[name].append(metrics)
            if target_kl is not None and metrics.get("policy_kl", 0.0) > target_kl:
                del going[name]
    return {
        f"{name}{key}": value
        for name, metrics in every.items()
        for key, value in {**_over_updates(metrics), "updates": float(len(metrics))}.items()
    }


def _over_updates(updates: list[Metrics]) -> Metrics:
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in updates:
        for key, value in metrics.items():
            values[key].append(value)
    return {
        key: sum(found) if key in ("trained_tokens", "skipped_steps", "non_finite") else sum(found) / len(found)
        for key, found in values.items()
    }
