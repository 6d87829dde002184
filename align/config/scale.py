"""Schema of ``align scale``: drafts, feedback, edits, and the selection among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from align.config.base import ClusterConfig, DataFormat
from align.config.editing import EditingConfig
from align.config.generators import AnyGeneratorConfig, ModelGeneratorConfig
from align.config.rewards import AnyRewardConfig, CheckpointRewardConfig
from align.config.sampling import SamplingConfig


@dataclass(frozen=True)
class ScalePromptsConfig:
    """The prompts to answer."""

    path: str = MISSING
    """File of JSON lines with ``prompt`` (text) or ``messages`` or ``context`` (list of {role, content}); else a folder
    or a hub id that is read as ``format``, each conversation once."""
    format: DataFormat = "auto"
    """As ``data.format`` of a recipe; not used for a file."""
    split: Literal["validation", "train"] = "validation"
    """Split of a folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_prompts: int | None = None
    """Answer only the first prompts; null answers all."""

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be positive: {self.max_prompts}")


@dataclass(frozen=True)
class SweepConfig:
    """Smaller settings, measured on the samples of the full setting: each number of a list replaces that of the full
    setting, the others stay. Empty lists measure nothing."""

    drafts: list[int] = field(default_factory=list)
    """Numbers of drafts, up to ``drafts``."""
    feedbacks: list[int] = field(default_factory=list)
    """Numbers of feedback texts on a draft, up to ``feedbacks``. Each has different sets of feedback, so their edits
    are generated in addition."""
    edits: list[int] = field(default_factory=list)
    """Numbers of edits of a draft, up to ``edits``."""


@dataclass(frozen=True)
class ScaleConfig:
    """Feedback-edit scaling at inference (HelpSteer3: Wang et al. 2025, arXiv 2503.04378)."""

    policy: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Writes drafts."""
    feedback: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Writes feedback on drafts: ``sft`` with ``target: feedback``."""
    edit: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Rewrites a draft by feedback: ``sft`` with ``target: edits``, then ``feedback_edit``."""
    select: AnyRewardConfig = field(default_factory=CheckpointRewardConfig)
    """Selects among drafts and edits: the highest score wins."""
    eval_reward: AnyRewardConfig | None = None
    """A second reward model that scores the selected responses for the report; it selects nothing."""
    prompts: ScalePromptsConfig = field(default_factory=ScalePromptsConfig)
    """The prompts to answer."""
    editing: EditingConfig = field(default_factory=EditingConfig)
    """Prompts of feedback and edit models, as in training."""
    drafts: int = 8
    """Drafts of a prompt that are edited. 8: the paper's scaled setting."""
    draft_samples: int | None = None
    """Drafts that are sampled, of which the ``drafts`` best by ``select`` are edited; null edits all sampled
    drafts."""
    feedbacks: int = 10
    """Feedback texts sampled for each draft. 10: the paper."""
    feedbacks_kept: int = 3
    """Maximum number of texts for an edit, drawn at random from those that ask for a change. 3: the paper."""
    edits: int = 16
    """Sets of feedback drawn for each draft; each distinct set gives one edit. 16: the paper's scaled setting, 1: its
    single pass."""
    draft_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.9))
    """Sampling of drafts; the paper's values for feedback."""
    feedback_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(max_tokens=128, temperature=0.7, top_p=0.9)
    )
    """Sampling of feedback: the paper's values, ``max_tokens`` that of the model card."""
    edit_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Sampling of edits. Greedy: the paper."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Smaller settings, for plots of the score."""
    max_best_of: int = 512
    """Maximum n of best-of-n, measured for comparison: of as many samples of the policy as have no more tokens than the
    full setting generated for that prompt. 0 skips it."""
    prompts_at_once: int = 64
    """Prompts in flight, whose work is lost if the command is killed."""
    batch_size: int = 256
    """Maximum number of requests in one call to a role. Smaller calls pass work on sooner."""
    seed: int = 0
    """Seed of all sampling."""
    out: str = MISSING
    """Output folder, from which an interrupted command resumes."""
    executor: Literal["ray", "local"] = "local"
    """``ray``: each role in separate worker processes, at the same time. ``local``: in this process, one after the
    other."""
    placement: dict[str, str] = field(default_factory=dict)
    """Slots of ``policy``, ``feedback``, ``edit``, ``select`` and ``eval_reward``, as in a recipe."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where Ray runs."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("drafts", "feedbacks", "feedbacks_kept", "edits")}
        counts |= {"prompts_at_once": self.prompts_at_once, "batch_size": self.batch_size}
        if min(counts.values()) < 1:
            raise ValueError(f"{', '.join(counts)} must be positive: {', '.join(map(str, counts.values()))}")
        if self.draft_samples is not None and self.draft_samples < self.drafts:
            raise ValueError(f"draft_samples must be at least drafts: {self.draft_samples}, {self.drafts}")
        if self.max_best_of < 0:
            raise ValueError(f"max_best_of must not be negative: {self.max_best_of}")
        for name in ("drafts", "feedbacks", "edits"):
            smaller = getattr(self.sweep, name)
            if not all(1 <= value <= counts[name] for value in smaller):
                raise ValueError(f"sweep.{name} lies in 1 to {name}: {smaller}, {counts[name]}")
        for name in ("draft_sampling", "feedback_sampling", "edit_sampling"):
            if getattr(self, name).num_samples != 1:
                value = getattr(self, name).num_samples
                raise ValueError(f"{name}.num_samples must be 1, because each count has a separate key: {value}")
        if self.num_samples > 1 and self.draft_sampling.temperature == 0:
            raise ValueError(
                f"draft_sampling.temperature 0 makes all {self.num_samples} drafts alike: drafts must be 1"
            )

    @property
    def num_samples(self) -> int:
        """Drafts that are sampled."""
        return self.draft_samples or self.drafts
