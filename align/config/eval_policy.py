"""Schema of ``align eval policy``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from omegaconf import MISSING

from align.config.base import ClusterConfig
from align.config.generators import AnyGeneratorConfig, ModelGeneratorConfig
from align.config.sampling import SamplingConfig

PolicyBenchmarkName = Literal["arena-hard", "mt-bench", "wildbench", "prompts"]
_Greedy = partial(SamplingConfig, temperature=0.0, max_tokens=4096)


@dataclass(frozen=True)
class QuestionDataConfig:
    """The questions of a benchmark."""

    path: str = ""
    """File or folder with the questions, or a hub id. In a folder, ``question.jsonl`` is read, or, without it, all
    tables. Empty takes the benchmark's hub id: ``lmarena-ai/arena-hard-auto-v0.1``,
    ``HuggingFaceH4/mt_bench_prompts``, ``allenai/WildBench`` (its config ``v2``); ``prompts`` has none."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    references: str = ""
    """``mt-bench``: file with reference answers in FastChat's layout, ``reference_answer/gpt-4.jsonl``. Empty takes
    that file of the folder, or the references in the questions."""
    categories: list[str] = field(default_factory=list)
    """Use only questions of these categories; empty uses all."""
    max_items: int | None = None
    """Use only the first questions, for a trial: the numbers are then not the benchmark's. Null uses all."""

    def __post_init__(self) -> None:
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"max_items must be positive, or null for all questions: {self.max_items}")


@dataclass(frozen=True)
class PolicyEvaluationConfig:
    """Measure a policy: answers to the questions of a benchmark, judged by a language model."""

    benchmark: PolicyBenchmarkName = MISSING
    """``arena-hard`` (Li et al. 2024, arXiv 2406.11939): pairs with a baseline. ``mt-bench`` (Zheng et al. 2023, arXiv
    2306.05685): two turns, scores of 1 to 10. ``wildbench`` (Lin et al. 2024, arXiv 2406.04770): scores by a checklist.
    ``prompts``: your prompts, in pairs if there is a baseline, else with scores."""
    data: QuestionDataConfig = field(default_factory=QuestionDataConfig)
    """The questions."""
    policy: AnyGeneratorConfig | None = None
    """The generator that answers; null with ``answers``."""
    answers: str = ""
    """File with stored answers, which replace a policy's: ``answers.jsonl`` of another evaluation, or
    a file in the layout of Arena-Hard, FastChat or WildBench."""
    sampling: SamplingConfig = field(default_factory=_Greedy)
    """Sampling of the policy and of a baseline model. Greedy up to 4,096 tokens, as in Arena-Hard."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """Temperature by category, which replaces ``sampling.temperature``."""
    baseline: AnyGeneratorConfig | None = None
    """The generator that the policy is compared with (``arena-hard``, ``prompts``)."""
    baseline_answers: dict[str, str] = field(default_factory=dict)
    """Files with the answers of the baseline, as ``answers``, by category; ``default`` is for all other
    categories."""
    judge: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """The LLM-as-judge."""
    judge_form: Literal["benchmark", "helpsteer3", "json"] = "benchmark"
    """``benchmark``: a judge prompt for the verdicts of the benchmark. ``helpsteer3``, ``json``: a generative reward
    model with this form of verdict, as ``reward.form`` of a recipe."""
    judge_custom_roles: bool = False
    """With ``helpsteer3`` and ``json``, as ``reward.custom_roles`` of a recipe."""
    judge_prompt: str = ""
    """YAML file with judge prompts that replace align's (``judge_form: benchmark``): by kind of question ``user``, and
    optionally ``system``. Kinds and placeholders: docs/evaluation_policy.md."""
    judge_sampling: SamplingConfig = field(default_factory=_Greedy)
    """Sampling of the judge. Greedy up to 4,096 tokens, as in Arena-Hard."""
    attempts: int = 3
    """Maximum number of attempts of the judge at a readable verdict. A game without a verdict is excluded from all
    numbers, and counted. 3 is our choice; NeMo-Gym's ``genrm_compare`` retries three times."""
    retry_temperature: float = 0.6
    """Temperature of retries, if that of ``judge_sampling`` is lower: a greedy judge would repeat itself. NeMo-Gym's
    value for generative reward models."""
    out: str = ""
    """Output folder, from which an interrupted evaluation resumes. Empty: a folder in ``runs/evaluation`` named by
    benchmark and recipe."""
    resamples: int = 100
    """Bootstrap resamples of questions, Arena-Hard's number; 0 gives no intervals."""
    confidence: float = 0.9
    """Fraction of the resamples within an interval: from 5 to 95 %, as in Arena-Hard."""
    seed: int = 0
    """Seed of the resamples, and of the sampling of policy, baseline and judge."""
    executor: Literal["ray", "local"] = "local"
    """``ray``: ``policy``, ``judge`` and ``baseline`` in separate worker processes. ``local``: in this process."""
    placement: dict[str, str] = field(default_factory=dict)
    """Slots of the roles, as in a recipe."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where Ray runs."""

    def __post_init__(self) -> None:
        if (self.policy is not None) == bool(self.answers):
            raise ValueError(f"give either policy (policy.path, policy.kind) or answers: answers {self.answers!r}")
        if self.baseline and self.baseline_answers:
            raise ValueError(f"give either baseline or baseline_answers, not both: {self.baseline_answers}")
        if self.benchmark == "arena-hard" and not self.pairwise:
            raise ValueError("benchmark arena-hard needs baseline_answers or baseline.path")
        if self.benchmark in ("mt-bench", "wildbench") and self.pairwise:
            raise ValueError(
                f"benchmark {self.benchmark} has no baseline.path, no baseline_answers: {self.baseline_answers}"
            )
        if self.benchmark == "prompts" and not self.data.path:
            raise ValueError(f"benchmark prompts has no hub id and needs data.path: {self.data.path!r}")
        if self.benchmark != "mt-bench" and self.data.references:
            raise ValueError(f"data.references belongs to benchmark mt-bench, not {self.benchmark}")
        if self.judge_form != "benchmark" and self.judge_prompt:
            raise ValueError(f"judge_prompt needs judge_form benchmark, not {self.judge_form}: {self.judge_prompt!r}")
        if self.attempts < 1 or min([self.retry_temperature, *self.temperatures.values()]) < 0:
            raise ValueError(
                f"attempts must be positive, retry_temperature and temperatures not negative: {self.attempts}, "
                f"{self.retry_temperature}, {self.temperatures}"
            )
        if self.resamples < 0 or not 0 < self.confidence < 1:
            raise ValueError(
                f"resamples must not be less than 0 and confidence lies in (0, 1): {self.resamples}, {self.confidence}"
            )

    @property
    def pairwise(self) -> bool:
        """Answers are compared with those of a baseline."""
        return self.baseline is not None or bool(self.baseline_answers)
