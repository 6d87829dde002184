"""Sections of ``align scale``: drafts, feedback, edits, and the choice among them."""

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
    """What is answered."""

    path: str = MISSING
    """File of JSON lines with ``prompt`` (text) or ``messages`` or ``context`` (list of {role, content}); else a folder
    or a hub id that is read as ``format``, each conversation once."""
    format: DataFormat = "auto"
    """As ``data.format`` of a recipe; not read for a file."""
    split: Literal["validation", "train"] = "validation"
    """Which split of a folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_prompts: int | None = None
    """Answer the first ones only; None answers all."""

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be positive: {self.max_prompts}")


@dataclass(frozen=True)
class SweepConfig:
    """Smaller settings that are measured on the samples of the whole one: of each list, one number is changed and the
    others stay as they are. Empty lists measure nothing."""

    drafts: list[int] = field(default_factory=list)
    """Numbers of drafts, up to ``drafts``."""
    feedbacks: list[int] = field(default_factory=list)
    """Numbers of texts of feedback on a draft, up to ``feedbacks``. Each has sets of feedback of its own, so the edits
    by these are made besides."""
    edits: list[int] = field(default_factory=list)
    """Numbers of edits of a draft, up to ``edits``."""


@dataclass(frozen=True)
class ScaleConfig:
    """Feedback-edit scaling at inference (HelpSteer3: Wang et al. 2025, arXiv 2503.04378)."""

    policy: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Writes drafts."""
    feedback: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Says what is to be improved: ``sft`` with ``demonstrates: feedback``."""
    edit: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """Rewrites a draft by feedback: ``sft`` with ``demonstrates: edits``, then ``feedback_edit``."""
    select: AnyRewardConfig = field(default_factory=CheckpointRewardConfig)
    """Chooses among drafts and edits: the highest score wins."""
    eval_reward: AnyRewardConfig | None = None
    """A second reward model that scores the chosen responses for the report; it chooses nothing."""
    prompts: ScalePromptsConfig = field(default_factory=ScalePromptsConfig)
    """What is answered."""
    editing: EditingConfig = field(default_factory=EditingConfig)
    """The words in which feedback and edits are asked for, as in training."""
    drafts: int = 8
    """Drafts of a prompt that are edited. 8: the paper's scaled setting."""
    draft_samples: int | None = None
    """Drafts that are sampled, of which the ``drafts`` best by ``select`` are edited; None edits all that are
    sampled."""
    feedbacks: int = 10
    """Texts of feedback that are sampled on each draft. 10: the paper."""
    feedbacks_kept: int = 3
    """Texts that an edit is made by, at most: drawn at random from those that ask for a change. 3: the paper."""
    edits: int = 16
    """Sets of feedback that are drawn for each draft, each of which gives one edit; equal sets give one together. 16:
    the paper's scaled setting, 1: its single pass."""
    draft_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.9))
    """How drafts are drawn; the paper's values for feedback."""
    feedback_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(max_tokens=128, temperature=0.7, top_p=0.9)
    )
    """How feedback is drawn: the paper's values, ``max_tokens`` that of the model card."""
    edit_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """How edits are drawn. Greedy: the paper."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Smaller settings, for the plots of score against numbers."""
    max_best_of: int = 512
    """Best-of-n is measured beside it: of as many samples of the policy as have no more tokens than the whole setting
    generated for that prompt, up to this many. 0 leaves it out."""
    prompts_at_once: int = 64
    """Prompts that are under way at a time: what a kill can cost."""
    batch_size: int = 256
    """Most requests of one call to a role. A role takes what waits for it, so smaller calls pass work on sooner."""
    seed: int = 0
    """Seed of all that is drawn."""
    out: str = MISSING
    """Folder of what is written, from which a command that was cut short goes on."""
    executor: Literal["ray", "local"] = "local"
    """``ray``: each role in worker processes of its own, at work at the same time. ``local``: in this process, one
    after the other."""
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
                raise ValueError(f"{name}.num_samples stays 1, the numbers have keys of their own: 1 is what is read")
        if self.num_samples > 1 and self.draft_sampling.temperature == 0:
            raise ValueError(
                f"draft_sampling.temperature 0 makes all {self.num_samples} drafts alike: drafts must be 1"
            )

    @property
    def num_samples(self) -> int:
        """Drafts that are sampled."""
        return self.draft_samples or self.drafts
