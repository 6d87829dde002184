"""RLOO of an edit model against the Edit reward model (HelpSteer3: Wang et al. 2025, arXiv 2503.04378).

The policy reads a conversation x, a response y to it and feedback f on y, and writes an edited response e. It is judged
as an answer to x alone, as the Edit reward model reads edits. For K edits e_i of one (x, y, f):

    s_i = min(r(x, e_i), min of r(x, e_j) over the e_j that are no copies) - copy_penalty    where e_i is a copy of y
    s_i = r(x, e_i)                                                                          elsewhere

A copy is y again but for white space. From s on everything is `align.algorithms.rloo`. Without a penalty the paper's
edit model gave its input back in about 30 % of cases after supervised fine-tuning; there the reward model alone, which
learned good edits against copies, is what speaks against them (``copy_penalty: null``).

The models before and beside it are recipes of other algorithms: ``sft`` with ``target: feedback`` or ``edits``,
``reward_model`` for the Edit reward model and for the one that selects. Left out: sampling new feedback.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from align import data
from align.algorithms import _evaluation, _policy_loss, _rewards, _rollout, rloo
from align.algorithms._evaluation import Evaluator
from align.config import EditingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.rows import Edit
    from align.run import Run
    from align.types import Rollouts


@dataclass(frozen=True)
class Config(rloo.Config):
    """Recipe of RLOO for an edit model."""

    editing: EditingConfig = field(default_factory=EditingConfig)
    """What the edit model reads, and which feedback of the data counts."""
    copy_penalty: float | None = 0.0
    """An edit that only copies the response gets the lowest score of the other edits minus this, in units of the score;
    null leaves copies to the reward model. 0: a copy counts as the worst edit of its group. Ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copy_penalty is not None and self.copy_penalty < 0:
            raise ValueError(f"copy_penalty must not be negative: {self.copy_penalty}")

    def reads(self) -> Literal["edits"]:
        return "edits"


@dataclass(frozen=True)
class FeedbackEditData(_rollout.TrainData):
    """Edit prompts, and the responses to edit."""

    originals: tuple[str, ...] = ()

    def copies(self, rollouts: Rollouts, run: Run) -> Tensor:
        """Which edits of a step are copies of their input, (B,)."""
        originals = [self.originals[row] for row in self.rows(rollouts).tolist()]
        sequences = rollouts.sequences
        texts = [run.decode(ids) for ids in sequences.responses.lists()]
        return data.editing.unchanged_edits([originals[prompt] for prompt in sequences.prompt_B.tolist()], texts)


def load_data(config: Config, source: DataSplits[Edit], renderer: Renderer) -> tuple[FeedbackEditData, dict[str, int]]:
    """Edit prompts of both splits, and row counts by outcome."""
    limits = config.editing, config.data.max_prompt_tokens
    edits = data.editing.edit_prompts(source.train, renderer, *limits)
    stream = data.prompts.PromptStream(edits.tokens, config.prompts_per_step, config.run.seed, renderer.stop_ids)
    counts, held_out = edits.counts, None
    if config.evaluation.every:
        other, count = data.editing.edit_prompts(source.validation, renderer, *limits), config.evaluation.prompts
        counts |= {f"held_out_{name}": n for name, n in other.counts.items()}
        prompts = data.prompts.first_prompts(other.tokens, count, renderer.stop_ids, _evaluation.NOISE)
        reward_prompts = data.prompts.first_prompts(other.judged, count, renderer.stop_ids, _evaluation.NOISE).tokens
        held_out = _evaluation.HeldOutPrompts(
            prompts, other.contexts[:count], reward_prompts, originals=other.originals[:count]
        )
    return FeedbackEditData(stream, held_out, edits.judged, tuple(edits.originals)), counts


def penalize_copies(score_PK: Tensor, copy_PK: Tensor, penalty: float) -> Tensor:
    """Scores with copies below all other edits of their group, (P, K). A group of copies alone moves as one."""
    others_P1 = score_PK.masked_fill(copy_PK, float("inf")).amin(1, keepdim=True)
    return score_PK.where(~copy_PK, score_PK.minimum(others_P1) - penalty)


def train(config: Config, train_data: FeedbackEditData, roles: _rollout.Roles, run: Run) -> None:
    """Sample edits, score them as responses, rank copies last, leave one out, update."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    num_samples = config.sampling.num_samples
    for step, rollouts in run.rollouts(train_data.prompts, roles.policy, config.sampling, config.max_off_policy_steps):
        scored = _rollout.score_rollouts(roles, rollouts, reward_sequences=train_data.for_reward_models(rollouts))
        copy_B = train_data.copies(rollouts, run)
        if config.copy_penalty is not None:
            score_PK, copy_PK = scored.score_B.view(-1, num_samples), copy_B.view(-1, num_samples)
            scored = replace(scored, score_B=penalize_copies(score_PK, copy_PK, config.copy_penalty).flatten())
        rewards = _rewards.shape_rewards(config, scored, run.state)
        batch, statistics = rloo.make_batch(config, scored, rewards)
        update = roles.policy, batch, _policy_loss.policy_loss(config, rewards.kl_in_loss)
        metrics = _rollout.run_updates(config, step, num_samples, {"": update}, config.target_kl)
        statistics |= {"copies": float(copy_B.double().mean())}
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, scored.score_B)
    roles.policy.export(run.final).result()
