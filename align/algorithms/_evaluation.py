"""Held-out evaluation during training: the policy answers prompts it never learns from and is judged.

Greedy answers, and sampled ones whose noise is the same each time, are scored by the reward role, by the second reward
model where there is one, and by the rule of the bundled task where the prompts are of it. Greedy answers are compared
with greedy ones of the policy that the round started from, sampled ones with sampled ones: win rate = (wins + ties / 2)
/ prompts, with a 95 % interval.
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
"""Scores of the starting policy are carried from step to step under names that begin so."""

NOISE = -1
"""The step in the name of the noise; training counts from 1."""


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts of the validation split."""

    prompts: Prompts
    messages: list[tuple[Message, ...]]
    judged: Packed | None = None
    """The prompts as judges read them, where the policy reads others (its attributes, a draft to be edited)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What the folder of the best policy gets beside the model, text by name."""
    originals: list[str] | None = None
    """The responses to be edited, where the answers are edits."""


def load_held_out(
    evaluation: EvaluationConfig,
    source: PreferenceData,
    renderer: Renderer,
    data_section: DataConfig,
    counts: dict[str, int],
) -> HeldOutPrompts | None:
    """The first prompts of the validation split; None where nothing is to be measured. ``counts`` gets what became of
    its rows, as ``held_out_...``."""
    if not evaluation.every:
        return None
    found = data.dataset.prompts(source.validation, renderer, data_section.max_prompt_tokens)
    counts |= {f"held_out_{name}": count for name, count in found.counts.items()}
    prompts = data.prompts.first(found.tokens, evaluation.prompts, renderer.stop_ids, NOISE)
    return HeldOutPrompts(prompts, found.messages[: evaluation.prompts])


class EvaluationRoles(Protocol):
    """Roles that a measurement needs."""

    @property
    def policy(self) -> PolicyRole:
        """Answers."""
        ...

    @property
    def reward(self) -> RewardRole | None:
        """Judges; there whenever something is measured."""
        ...

    @property
    def eval_reward(self) -> RewardRole | None:
        """Judges too."""
        ...


class Evaluator:
    """Measures the policy when it is due, and remembers how the starting policy did."""

    def __init__(
        self,
        evaluation: EvaluationConfig,
        sampling: SamplingConfig,
        held_out: HeldOutPrompts | None,
        cast: EvaluationRoles,
        run: Run,
    ):
        """Measures the policy as it is now, before its first step, unless a run that is gone on with has done so."""
        self.evaluation, self.held_out, self.cast, self.run = evaluation, held_out, cast, run
        self.kinds = {
            "greedy": replace(sampling, num_samples=1, temperature=0.0),
            "sampled": replace(sampling, num_samples=1),
        }
        if held_out is not None and not any(name.startswith(START) for name in run.tensors):
            self._measure(run.first_step - 1)

    def measure(self, step: int) -> dict[str, float]:
        """Metrics ``heldout/...`` of the policy after ``step``; none where no measurement is due."""
        due = self.held_out is not None and (step % self.evaluation.every == 0 or self.run.is_last(step))
        return self._measure(step) if due else {}

    def _measure(self, step: int) -> dict[str, float]:
        assert self.held_out is not None
        metrics, answers = dict[str, float](), list[dict[str, object]]()
        for kind, sampling in self.kinds.items():
            rollouts = self.cast.policy.generate(self.held_out.prompts, sampling).result()
            texts = [self.run.decode(ids) for ids in rollouts.sequences.responses.lists()]
            judged = self._judge(rollouts, texts)
            for name, score_P in judged.items():
                metrics[f"heldout/{kind}/{name}"] = float(score_P[score_P.isfinite()].double().mean())
            metrics[f"heldout/{kind}/response_tokens"] = float(rollouts.mask_BT.sum(1).double().mean())
            metrics[f"heldout/{kind}/truncated"] = 1.0 - float(rollouts.finished_B.double().mean())
            if self.held_out.originals is not None:
                copy_P = data.editing.copies(self.held_out.originals, texts)
                metrics[f"heldout/{kind}/copies"] = float(copy_P.double().mean())
            metrics |= self._against_start(kind, judged)
            answers += self._written(kind, texts, judged)
        self.run.evaluated(step, metrics, answers)
        score = metrics[f"heldout/{self.evaluation.best_by}/reward"]
        if self.evaluation.keep_best and score > self.run.state.get("best_score", float("-inf")):
            self.run.keep_best(step, self.cast.policy, self.held_out.files)
            self.run.state["best_score"] = score
        return metrics

    def _judge(self, rollouts: Rollouts, texts: list[str]) -> dict[str, Tensor]:
        assert self.held_out is not None
        judges = {"reward": self.cast.reward, "eval_reward": self.cast.eval_reward}
        sequences = replace(rollouts.sequences, prompts=self.held_out.judged or rollouts.sequences.prompts)
        asked = {name: judge.score(sequences) for name, judge in judges.items() if judge is not None}
        judged = dict(zip(asked, wait_for_all(*asked.values()), strict=True))
        truth_P = data.toy.ground_truth(self.held_out.messages, texts)
        return judged if truth_P is None else judged | {"ground_truth": truth_P}

    def _against_start(self, kind: str, judged: dict[str, Tensor]) -> dict[str, float]:
        metrics = {}
        for name, own_P in judged.items():
            start_P = self.run.tensors.setdefault(f"{START}{kind}/{name}", own_P)
            both_P = own_P.isfinite() & start_P.isfinite()
            if not both_P.any():
                continue
            rate = ops.diagnostics.win_rate(own_P[both_P].double(), start_P[both_P].double())
            key = f"heldout/{kind}/win_rate/{name}"
            metrics |= {key: rate.rate, f"{key}/low": rate.low, f"{key}/high": rate.high}
        return metrics

    def _written(self, kind: str, texts: list[str], judged: dict[str, Tensor]) -> list[dict[str, object]]:
        assert self.held_out is not None
        return [
            dict[str, object](kind=kind, prompt=messages[-1].content, answer=text)
            | {name: float(score_P[i]) for name, score_P in judged.items()}
            for i, (messages, text) in enumerate(zip(self.held_out.messages, texts, strict=True))
        ]
