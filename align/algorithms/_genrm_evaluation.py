"""Held-out evaluation of a judge in training: greedy verdicts, and sampled verdicts with the same noise each time, on
pairs of the validation split, each in both orders, against human labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align import data, ops
from align.algorithms._evaluation import NOISE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from align.algorithms.genrm import Config
    from align.config import SamplingConfig
    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.rows import Comparison, Context
    from align.roles import PolicyRole
    from align.run import Run
    from align.types import Prompts

START = "heldout/start/"
"""Prefix under which a run keeps the agreement of the starting judge."""


@dataclass(frozen=True)
class HeldOutComparisons:
    """Pairs of the validation split: rows 2i and 2i + 1 are pair i in both orders."""

    prompts: Prompts
    label_B3: Tensor
    contexts: list[Context]
    files: Mapping[str, str]
    """Extra files of the folder of the best judge, text by name."""


def load_held_out(
    config: Config,
    source: DataSplits[Comparison],
    renderer: Renderer,
    files: Mapping[str, str],
    counts: dict[str, int],
) -> HeldOutComparisons | None:
    """The first pairs of the validation split; None with ``evaluation.every: 0``. Adds row counts by outcome to
    ``counts`` as ``held_out_...``."""
    count = config.evaluation.prompts
    if not config.evaluation.every:
        return None
    pairs = data.genrm.judge_prompts(source.validation, renderer, config.verdict, config.data.max_prompt_tokens)
    counts |= {f"held_out_{name}": n for name, n in pairs.counts.items()}
    prompts = data.prompts.first_prompts(pairs.tokens, 2 * count, renderer.stop_ids, NOISE)
    return HeldOutComparisons(prompts, pairs.label_P3[: 2 * count], pairs.contexts[:count], files)


class GenRMEvaluator:
    """Evaluates the judge every ``evaluation.every`` steps."""

    def __init__(self, config: Config, held_out: HeldOutComparisons | None, policy: PolicyRole, run: Run):
        """Evaluates the judge before its first step, unless a resumed run has done so."""
        self.config, self.held_out, self.policy, self.run = config, held_out, policy, run
        self.kinds = {
            "greedy": replace(config.sampling, num_samples=1, temperature=0.0),
            "sampled": replace(config.sampling, num_samples=1),
        }
        if held_out is not None and f"{START}greedy/agreement" not in run.state:
            metrics = self._measure(run.first_step - 1)
            for kind in self.kinds:
                run.state[f"{START}{kind}/agreement"] = metrics[f"heldout/{kind}/agreement"]

    def measure(self, step: int) -> dict[str, float]:
        """Metrics ``heldout/...`` of the judge after ``step``, and the agreement of the starting judge; empty between
        evaluations."""
        due = self.held_out is not None and (step % self.config.evaluation.every == 0 or self.run.is_last(step))
        start = {name: value for name, value in self.run.state.items() if name.startswith(START)}
        return self._measure(step) | start if due else {}

    def _measure(self, step: int) -> dict[str, float]:
        assert self.held_out is not None
        metrics: dict[str, float] = {}
        answers: list[dict[str, object]] = []
        for kind, sampling in self.kinds.items():
            agreement, lines = self._evaluate(kind, sampling)
            metrics |= {f"heldout/{kind}/{name}": value for name, value in agreement.items()}
            answers += lines
        self.run.log_evaluation(step, metrics, answers)
        score = metrics[f"heldout/{self.config.evaluation.best_by}/agreement"]
        if self.config.evaluation.keep_best and score > self.run.state.get("best_score", -1.0):
            self.run.keep_best(step, self.policy, self.held_out.files)
            self.run.state["best_score"] = score
        return metrics

    def _evaluate(self, kind: str, sampling: SamplingConfig) -> tuple[dict[str, float], list[dict[str, object]]]:
        """Agreement with the labels, and the verdicts as lines of a file."""
        assert self.held_out is not None
        label_B3, contexts = self.held_out.label_B3, self.held_out.contexts
        rollouts = self.policy.generate(self.held_out.prompts, sampling).result()
        texts = [self.run.decode(ids) for ids in rollouts.sequences.responses.lists()]
        verdict_B3 = data.genrm.read_verdicts(texts, rollouts.finished_B.tolist(), self.config.verdict.form)
        agreement = {
            **ops.genrm.verdict_agreement(verdict_B3, label_B3),
            **ops.genrm.verdict_errors(verdict_B3, label_B3),
            "reward": float(self.config.reward_of(verdict_B3, label_B3).double().mean()),
            "response_tokens": float(rollouts.mask_BT.sum(1).double().mean()),
            "truncated": 1.0 - float(rollouts.finished_B.double().mean()),
        }
        rankings = zip(verdict_B3[:, 2].tolist(), label_B3[:, 2].tolist(), strict=True)
        return agreement, [
            {
                "kind": kind,
                "prompt": contexts[i // 2][-1].content,
                "answer": texts[i],
                "ranking": None if ranking != ranking else ranking,  # NaN
                "label": label,
            }
            for i, (ranking, label) in enumerate(rankings)
        ]
