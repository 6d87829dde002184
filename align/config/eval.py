"""Schema of ``align eval reward``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from align.config.base import ClusterConfig, DataFormat
from align.config.rewards import AnyRewardConfig

BenchmarkName = Literal["rm-bench", "judgebench", "rewardbench", "rewardbench2", "heldout"]


@dataclass(frozen=True)
class BenchmarkDataConfig:
    """The items of a benchmark."""

    path: str = ""
    """Folder or file with the benchmark's rows, or a hub id. Empty takes the benchmark's hub id; ``heldout`` has
    none."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    split: str = ""
    """Split of a hub id; in a folder, the files with this in their name, or all files if there are none. Empty takes
    the split that the benchmark's authors report: ``train`` of RM-Bench, ``gpt`` of JudgeBench, ``filtered`` of
    RewardBench, ``test`` of RewardBench 2. With ``heldout``: ``validation``, the default, or ``train``."""
    format: DataFormat = "auto"
    """With ``heldout``, as ``data.format`` of a recipe."""
    domains: list[str] = field(default_factory=list)
    """With ``heldout``, as ``data.domains`` of a recipe."""
    max_spread: int | None = 2
    """With ``heldout``, as ``data.max_spread`` of a recipe."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that breaks the schema stops the evaluation with its place, or is dropped and counted."""
    max_items: int | None = None
    """Score only the first items, for a trial: the numbers are then not the benchmark's. Null scores all."""

    def __post_init__(self) -> None:
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"max_items must be positive: {self.max_items}")


@dataclass(frozen=True)
class RewardEvaluationConfig:
    """Measure a reward model on a benchmark."""

    benchmark: BenchmarkName = MISSING
    """``rm-bench`` (Liu et al. 2024, arXiv 2410.16184), ``judgebench`` (Tan et al. 2024, arXiv 2410.12784),
    ``rewardbench`` (Lambert et al. 2024, arXiv 2403.13787), ``rewardbench2`` (Malik et al. 2025, arXiv 2506.01937), or
    ``heldout``: held-out pairs of preference data."""
    data: BenchmarkDataConfig = field(default_factory=BenchmarkDataConfig)
    """The items."""
    reward: AnyRewardConfig | None = None
    """The reward model; null with ``scores``."""
    scores: str = ""
    """File with stored scores, which replace a model's."""
    out: str = ""
    """Output folder, from which an interrupted evaluation resumes. Empty: none with ``scores``, else a folder in
    ``runs/evaluation`` named by benchmark and model."""
    compare: str = ""
    """An ``items.jsonl`` of another model on the same items, or its folder: prints differences with intervals."""
    prior_sets: bool = False
    """``rewardbench``: count the prior test sets in the overall score with weight 0.5, as its leaderboard once did.
    NVIDIA omits them."""
    resamples: int = 1000
    """Bootstrap resamples of prompts; 0 gives no intervals."""
    confidence: float = 0.95
    """Fraction of the resamples within an interval."""
    seed: int = 0
    """Seed of the resamples."""
    executor: Literal["ray", "local"] = "local"
    """``ray``: the model in worker processes, which divide the items. ``local``: in this process."""
    placement: dict[str, str] = field(default_factory=dict)
    """Slots of the role ``reward``, as in a recipe."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where Ray runs."""

    def __post_init__(self) -> None:
        if bool(self.scores) == (self.reward is not None):
            raise ValueError(f"benchmark {self.benchmark} needs either reward.path or scores: scores {self.scores!r}")
        if self.benchmark == "heldout" and not self.data.path and not self.scores:
            raise ValueError(f"benchmark heldout has no hub id and needs data.path: {self.data.path!r}")
        if self.benchmark == "heldout" and self.data.split not in ("", "train", "validation"):
            raise ValueError(f"data.split is validation or train with heldout: {self.data.split!r}")
        if self.prior_sets and self.benchmark != "rewardbench":
            raise ValueError(f"prior_sets belongs to benchmark rewardbench, not {self.benchmark}")
        if self.resamples < 0 or not 0 < self.confidence < 1:
            raise ValueError(
                f"resamples must not be negative, confidence lies in (0, 1): {self.resamples}, {self.confidence}"
            )
