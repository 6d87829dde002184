"""Held-out evaluation of a judge in training: greedy verdicts on pairs of the validation split, each in both orders,
against the labels of people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align import data, ops
from align.algorithms._heldout import NOISE
from align.rewards import judge_card

if TYPE_CHECKING:
    from torch import Tensor

    from align.algorithms.genrm import Config
    from align.data.chat import Renderer
    from align.data.helpsteer import Corpus
    from align.data.rows import Comparison, Context
    from align.roles import Policy
    from align.run import Run
    from align.types import Prompts, Rollouts

START = "heldout/start/agreement"
"""The starting judge's agreement is carried from step to step under this name."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs of the validation split: rows 2i and 2i + 1 are pair i in both orders."""

    prompts: Prompts
    label_B3: Tensor
    contexts: list[Context]


def prepare(config: Config, source: Corpus[Comparison], renderer: Renderer) -> HeldOut | None:
    """The first pairs of the validation split; None where nothing is to be measured."""
    count = config.evaluation.prompts
    if not config.evaluation.every:
        return None
    found = data.judging.prompts(source.validation, renderer, config.verdict, config.data.max_prompt_tokens)
    prompts = data.prompts.first(found.tokens, 2 * count, renderer.stop_ids, NOISE)
    return HeldOut(prompts, found.label_P3[: 2 * count], found.contexts[:count])


class Evaluator:
    """Measures the judge when it is due."""

    def __init__(self, config: Config, held_out: HeldOut | None, policy: Policy, run: Run):
        """Measures the judge as it is now, before its first step, unless a run that is gone on with has done so."""
        self.config, self.held_out, self.policy, self.run = config, held_out, policy, run
        self.sampling = replace(config.sampling, num_samples=1, temperature=0.0)
        if held_out is not None and START not in run.state:
            run.state[START] = self._measure(run.first_step - 1)["heldout/greedy/agreement"]

    def measure(self, step: int) -> dict[str, float]:
        """Metrics ``heldout/greedy/...`` of the judge after ``step``; none where no measurement is due."""
        due = self.held_out is not None and (step % self.config.evaluation.every == 0 or self.run.is_last(step))
        return self._measure(step) | {START: self.run.state[START]} if due else {}

    def _measure(self, step: int) -> dict[str, float]:
        assert self.held_out is not None
        label_B3 = self.held_out.label_B3
        rollouts = self.policy.generate(self.held_out.prompts, self.sampling).result()
        texts = [self.run.decode(ids) for ids in rollouts.sequences.responses.lists()]
        verdict_B3 = data.judging.read(texts, rollouts.finished_B.tolist(), self.config.verdict.form)
        found = {
            **ops.verdicts.agreement(verdict_B3, label_B3),
            **ops.verdicts.errors(verdict_B3, label_B3),
            "reward": float(self.config.reward_of(verdict_B3, label_B3).double().mean()),
            "response_tokens": float(rollouts.mask_BT.sum(1).double().mean()),
            "unfinished": 1.0 - float(rollouts.finished_B.double().mean()),
        }
        metrics = {f"heldout/greedy/{name}": value for name, value in found.items()}
        self.run.evaluated(step, metrics, self._written(rollouts, texts, verdict_B3))
        if self.config.evaluation.keep_best and found["agreement"] > self.run.state.get("best_score", -1.0):
            self.run.keep_best(step, self.policy, judge_card.files(self.config.verdict))
            self.run.state["best_score"] = found["agreement"]
        return metrics

    def _written(self, rollouts: Rollouts, texts: list[str], verdict_B3: Tensor) -> list[dict[str, object]]:
        assert self.held_out is not None
        rankings = zip(verdict_B3[:, 2].tolist(), self.held_out.label_B3[:, 2].tolist(), strict=True)
        return [
            {
                "kind": "greedy",
                "prompt": self.held_out.contexts[i // 2][-1].content,
                "answer": texts[i],
                "ranking": None if said != said else said,  # NaN
                "label": wanted,
            }
            for i, (said, wanted) in enumerate(rankings)
        ]
