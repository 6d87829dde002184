"""Held-out evaluation during training: the policy answers prompts of the validation split, reward models score them.

The reward role and the eval reward model score greedy answers, and sampled answers with the same noise each time; the
rule of the bundled task scores them too where the prompts are of that task. Greedy answers are compared with greedy
answers of the policy that the round started from, sampled answers with sampled ones: win rate = (wins + ties / 2) /
prompts, with a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from align import data, ops
from align.roles import PolicyRole, RewardRole, wait_for_all

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import DataConfig, EvaluationConfig, SamplingConfig
    from align.data.chat import Renderer
    from align.data.dataset import PreferenceData
    from align.data.rows import Message
    from align.run import Run
    from align.types import Packed, Prompts, Rollouts

START = "heldout/start/"
"""Prefix under which a run keeps the scores of the starting policy."""

NOISE = -1
"""Step number that names the noise of held-out prompts; training steps count from 1."""


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts of the validation split."""

    prompts: Prompts
    messages: list[tuple[Message, ...]]
    reward_prompts: Packed | None = None
    """The prompts that reward models read, where the policy reads others (attributes, a draft to edit)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Extra files of the folder of the best policy, text by name."""
    originals: list[str] | None = None
    """The responses to edit, where the answers are edits."""


def load_held_out(
    evaluation: EvaluationConfig,
    source: PreferenceData,
    renderer: Renderer,
    section: DataConfig,
    counts: dict[str, int],
) -> HeldOutPrompts | None:
    """The first prompts of the validation split; None with ``evaluation.every: 0``. Adds row counts by outcome to
    ``counts`` as ``held_out_...``."""
    if not evaluation.every:
        return None
    loaded = data.dataset.tokenize_prompts(source.validation, renderer, section.max_prompt_tokens)
    counts |= {f"held_out_{name}": count for name, count in loaded.counts.items()}
    prompts = data.prompts.first_prompts(loaded.tokens, evaluation.prompts, renderer.stop_ids, NOISE)
    return HeldOutPrompts(prompts, loaded.messages[: evaluation.prompts])


class EvaluationRoles(Protocol):
    """Roles of an evaluation; ``reward`` is set whenever something is measured."""

    @property
    def policy(self) -> PolicyRole: ...

    @property
    def reward(self) -> RewardRole | None: ...

    @property
    def eval_reward(self) -> RewardRole | None: ...


class Evaluator:
    """Evaluates the policy every ``evaluation.every`` steps and compares it with the starting policy."""

    def __init__(
        self,
        evaluation: EvaluationConfig,
        sampling: SamplingConfig,
        held_out: HeldOutPrompts | None,
        roles: EvaluationRoles,
        run: Run,
    ):
        """Evaluates the policy before its first step, unless a resumed run has done so."""
        self.evaluation, self.held_out, self.roles, self.run = evaluation, held_out, roles, run
        self.kinds = {
            "greedy": replace(sampling, num_samples=1, temperature=0.0),
            "sampled": replace(sampling, num_samples=1),
        }
        if held_out is not None and not any(name.startswith(START) for name in run.tensors):
            self._measure(held_out, run.first_step - 1)

    def measure(self, step: int) -> dict[str, float]:
        """Metrics ``heldout/...`` of the policy after ``step``; empty between evaluations."""
        if self.held_out is None or (step % self.evaluation.every and not self.run.is_last(step)):
            return {}
        return self._measure(self.held_out, step)

    def _measure(self, held_out: HeldOutPrompts, step: int) -> dict[str, float]:
        metrics, answers = dict[str, float](), list[dict[str, object]]()
        for kind, sampling in self.kinds.items():
            rollouts = self.roles.policy.generate(held_out.prompts, sampling).result()
            texts = [self.run.decode(ids) for ids in rollouts.sequences.responses.lists()]
            scores = self._score(held_out, rollouts, texts)
            for name, score_P in scores.items():
                metrics[f"heldout/{kind}/{name}"] = float(score_P[score_P.isfinite()].double().mean())
            metrics[f"heldout/{kind}/response_tokens"] = float(rollouts.mask_BT.sum(1).double().mean())
            metrics[f"heldout/{kind}/truncated"] = 1.0 - float(rollouts.finished_B.double().mean())
            if held_out.originals is not None:
                copy_P = data.editing.unchanged_edits(held_out.originals, texts)
                metrics[f"heldout/{kind}/copies"] = float(copy_P.double().mean())
            metrics |= self._win_rates(kind, scores)
            answers += [
                dict[str, object](kind=kind, prompt=messages[-1].content, answer=text)
                | {name: float(score_P[i]) for name, score_P in scores.items()}
                for i, (messages, text) in enumerate(zip(held_out.messages, texts, strict=True))
            ]
        self.run.log_evaluation(step, metrics, answers)
        score = metrics[f"heldout/{self.evaluation.best_by}/reward"]
        if self.evaluation.keep_best and score > self.run.state.get("best_score", float("-inf")):
            self.run.keep_best(step, self.roles.policy, held_out.files)
            self.run.state["best_score"] = score
        return metrics

    def _score(self, held_out: HeldOutPrompts, rollouts: Rollouts, texts: list[str]) -> dict[str, Tensor]:
        reward_models = {"reward": self.roles.reward, "eval_reward": self.roles.eval_reward}
        sequences = replace(rollouts.sequences, prompts=held_out.reward_prompts or rollouts.sequences.prompts)
        futures = {name: role.score(sequences) for name, role in reward_models.items() if role is not None}
        scores = dict(zip(futures, wait_for_all(*futures.values()), strict=True))
        truth_P = data.toy.ground_truth(held_out.messages, texts)
        return scores if truth_P is None else scores | {"ground_truth": truth_P}

    def _win_rates(self, kind: str, scores: dict[str, Tensor]) -> dict[str, float]:
        metrics = {}
        for name, score_P in scores.items():
            start_P = self.run.tensors.setdefault(f"{START}{kind}/{name}", score_P)
            both_P = score_P.isfinite() & start_P.isfinite()
            if not both_P.any():
                continue
            rate = ops.diagnostics.win_rate(score_P[both_P].double(), start_P[both_P].double())
            key = f"heldout/{kind}/win_rate/{name}"
            metrics |= {key: rate.rate, f"{key}/low": rate.low, f"{key}/high": rate.high}
        return metrics
