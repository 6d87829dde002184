"""A generative reward model by reinforcement learning (HelpSteer3-Preference, Wang et al. 2025, arXiv 2505.11475, whose
judge learns "similar to DeepSeek-GRM", Liu et al. 2025, arXiv 2504.02495): GRPO on pairs that people compared.

The policy is the judge. It reads a conversation and two responses, and writes reasons, scores s_1, s_2 in 1 to 5 and a
ranking r in 1 to 6. Each pair is there in both orders. With the labels of people s*, r* (`align.data.genrm`)

    R = -c (|s_1 - s*_1| + |s_2 - s*_2|) - C2 |r - r*|        of a verdict
    R = -C1                                                   of an answer that cannot be read, or was cut off

(Nemotron 3 Nano's report: C1 = 10, C2 = 1, c = 1). Scores that nobody labelled are left out. An answer that cannot be
read has no distance from a label, so C1 is all it pays. Advantages, KL and loss are those of `align.algorithms.grpo`.

Left out: judging single responses, whose labels are in HelpSteer3's feedback alone; lists of rubrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from align import data, ops
from align.algorithms import _genrm_evaluation, _policy_loss, _rewards, _rollout, grpo
from align.config import RowKind, VerdictConfig
from align.rewards import genrm_card
from align.roles import CompletedFuture, PolicyRole, ReferenceRole, RewardRole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.prompts import PromptStream
    from align.data.rows import Comparison
    from align.run import Run
    from align.types import Rollouts


@dataclass(frozen=True)
class Config(grpo.Config):
    """Recipe of a generative reward model."""

    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    """Prompt and answer format of the judge."""
    reward: None = None  # type: ignore[assignment] - no key of a reward model can be given
    """Always null: the reward is the distance from the labels."""
    eval_reward: None = None  # type: ignore[assignment]
    """Always null."""
    format_penalty: float = 10.0
    """C1, the penalty of an answer without a verdict. 10: Nemotron 3 Nano; NeMo-Gym's newer server takes 100."""
    score_weight: float = 1.0
    """c, weight of the distance of each score. 1: Nemotron 3 Nano."""
    ranking_weight: float = 1.0
    """C2, weight of the distance of the ranking. 1: Nemotron 3 Nano; NeMo-Gym's newer server takes 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.format_penalty, self.score_weight, self.ranking_weight
        if min(weights) < 0:
            raise ValueError(
                "format_penalty, score_weight and ranking_weight must not be negative: " + ", ".join(map(str, weights))
            )
        if self.max_attempts > 1:
            raise ValueError(f"genrm samples each pair once: max_attempts must be 1, not {self.max_attempts}")

    def reads(self) -> RowKind:
        return "comparisons"

    def num_rows(self, counts: Mapping[str, int]) -> int:
        """Each pair is shown in both orders."""
        return 2 * counts["kept"]

    def reward_of(self, verdict_B3: Tensor, label_B3: Tensor) -> Tensor:
        """R of each verdict, (B,)."""
        weights = self.format_penalty, self.score_weight, self.ranking_weight
        return ops.genrm.verdict_reward(verdict_B3, label_B3, *weights)


class GenRMRoles(Protocol):
    """Roles of this algorithm; both reward models are None."""

    policy: PolicyRole
    reference: ReferenceRole
    reward: RewardRole
    eval_reward: RewardRole | None


@dataclass(frozen=True)
class GenRMData:
    """Pairs in both orders, the label of each row, and held-out pairs."""

    prompts: PromptStream
    label_R3: Tensor
    held_out: _genrm_evaluation.HeldOutComparisons | None
    files: Mapping[str, str]
    """What a trained judge's folder gets beside the model, text by name."""


def load_data(config: Config, source: DataSplits[Comparison], renderer: Renderer) -> tuple[GenRMData, dict[str, int]]:
    """Pairs of both splits, and row counts by outcome."""
    pairs = data.genrm.judge_prompts(source.train, renderer, config.verdict, config.data.max_prompt_tokens)
    stream = data.prompts.PromptStream(pairs.tokens, config.prompts_per_step, config.run.seed, renderer.stop_ids)
    files = genrm_card.files(config.verdict, config.data.date)
    held_out = _genrm_evaluation.load_held_out(config, source, renderer, files, pairs.counts)
    return GenRMData(stream, pairs.label_P3, held_out, files), pairs.counts


def grade(
    config: Config, train_data: GenRMData, rollouts: Rollouts, decode: Callable[[Sequence[int]], str]
) -> tuple[Tensor, dict[str, float]]:
    """R of each response, and the distance of the verdicts from the labels."""
    rows = train_data.prompts.order.indices(rollouts.step)
    label_B3 = train_data.label_R3[rows].repeat_interleave(config.sampling.num_samples, 0)
    texts = [decode(ids) for ids in rollouts.sequences.responses.lists()]
    verdict_B3 = data.genrm.read_verdicts(texts, rollouts.finished_B.tolist(), config.verdict.form)
    return config.reward_of(verdict_B3, label_B3), ops.genrm.verdict_errors(verdict_B3, label_B3)


def train(config: Config, train_data: GenRMData, roles: GenRMRoles, run: Run) -> None:
    """Sample verdicts, compare with the labels, compare within groups, update."""
    evaluator = _genrm_evaluation.GenRMEvaluator(config, train_data.held_out, roles.policy, run)
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        score_B, distance = grade(config, train_data, rollouts, run.decode)
        scored = _rollout.score_rollouts(roles, rollouts, CompletedFuture(score_B))
        rewards = _rewards.shape_rewards(config, scored, run.state)
        batch, statistics = grpo.make_batch(config, scored, rewards)
        update = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": update}, config.target_kl)
        run.log(step, statistics | distance | metrics | evaluator.measure(step), rollouts, score_B)
    roles.policy.export(run.final, train_data.files).result()
