"""Sections about a run: data, sampling, cluster, folder; and what every recipe has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import NoneType
from typing import Any, Literal

from omegaconf import MISSING

from align.config.models import RoleConfig
from align.config.schema_types import field_types, sections_in

DataFormat = Literal[
    "auto",
    "helpsteer3",
    "helpsteer",
    "helpsteer2",
    "helpsteer2_preference",
    "helpsteer2_disagreements",
    "helpsteer3_edit_quality",
    "openai",
    "nemo",
    "trl",
]

RowKind = Literal[
    "preferences", "prompts", "demonstrations", "comparisons", "ratings", "feedback", "edits", "principles"
]
"""What rows are read as; `align.data.rows` has a class for each."""

CudaOption = Literal["deterministic", "tf32"]
"""Options of workers on GPUs; `align.engines.distributed.set_cuda_options` sets them."""

TrackerName = Literal["tensorboard"]
"""Trackers; `align.run.tracking.TRACKERS` has a class for each."""


@dataclass(frozen=True)
class SourceConfig:
    """One of several data sources. Its keys have the meaning of those of ``data``."""

    path: str = ""
    """File, folder or hub id. Required."""
    format: DataFormat = "auto"
    """What the rows look like."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns."""
    weight: float = 1.0
    """Fraction of the rows of its training split that are used, above 0 and at most 1: ``weight`` times n of n rows,
    rounded to the nearest whole number, at least 1, chosen by the hash of their prompts. No row is repeated."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"path of a source is empty: {self.path!r}")
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"weight must be above 0 and at most 1: {self.weight}. To give a source more, lower the others"
            )


@dataclass(frozen=True)
class DataConfig:
    """Training data: your files, or a data set of the HelpSteer family."""

    path: str = MISSING
    """A file (JSON lines, Parquet, CSV), a folder of such files, a folder that ``datasets`` wrote with
    ``save_to_disk``, or a hub id (``nvidia/HelpSteer3``). Required unless ``data.sources`` is given."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Replaces ``path``: several named sources, ``{ours: {path: FILE, weight: 0.5}}``."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns where they differ from those of the format: ``{prompt: question, chosen: answer_a}``."""
    validation: float = 0.05
    """Fraction of the prompts that are held out if the source has no validation split: those with the lowest hash, so
    that a row's split depends only on its prompt."""
    system_prompt: str = ""
    """System turn added to conversations without one; empty adds none."""
    format: DataFormat = "auto"
    """Layout of the data. ``auto`` detects it from the names of files and columns. docs/data.md lists the files of each
    format and what a row becomes."""
    max_spread: int | None = 2
    """Drop rows whose annotators differ by more than this; null keeps all. Compared are strengths with format
    ``helpsteer2_preference`` and helpfulness with ``helpsteer2_disagreements``; the other formats hold no single
    annotations. 2: HelpSteer2-Preference (arXiv 2410.01257)."""
    streaming: bool = False
    """Read a hub id row by row during the download, without a copy on disk. Folders are always read line by line."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_rows: int | None = None
    """Read only the first rows of each split; null reads all. Must be even with format ``helpsteer2``, where two rows
    make a pair."""
    domains: list[str] = field(default_factory=list)
    """Keep these values of ``domain`` (general, stem, code, multilingual); empty keeps all. Only the formats
    ``helpsteer3``, ``helpsteer3_edit_quality``, ``openai`` and ``trl`` have a domain."""
    max_prompt_tokens: int = 2048
    """Longer prompts are dropped and counted, never cut."""
    max_response_tokens: int = 2048
    """Longer responses (pairs, demonstrations) are dropped and counted, never cut."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What happens to a row that breaks the schema or that the chat template refuses: ``stop`` ends the run with file,
    line and field, ``skip`` drops and counts it."""
    repeat_within_batch: bool = False
    """Allow a batch of more rows than the data has; it then holds some rows several times. False refuses it."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    date: str | None = None
    """Text passed to the template as ``date_string``. A template that writes today's date is refused without it."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.sources) and self.path != MISSING:
            raise ValueError(f"give either path or sources: {self.path!r}, {sorted(self.sources)}")
        if self.sources and (self.columns or self.revision or self.format != "auto"):
            raise ValueError("with sources, each of them has its own format, revision and columns")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be at least 0 and below 1: {self.validation}")
        if self.domains and self.format not in ("auto", "trl", "helpsteer3", "helpsteer3_edit_quality", "openai"):
            others = "helpsteer3, helpsteer3_edit_quality, openai or trl"
            raise ValueError(f"domains needs format {others}: rows of {self.format} have no domain")
        if self.format == "helpsteer2" and self.max_rows is not None and self.max_rows % 2:
            raise ValueError(f"max_rows is even with format helpsteer2, where two rows make a pair: {self.max_rows}")
        if self.max_spread is not None and self.max_spread < 0:
            raise ValueError(f"max_spread must not be negative: {self.max_spread}")


@dataclass(frozen=True)
class ClusterConfig:
    """Where Ray runs. Not read by ``executor: local``."""

    address: str | None = None
    """``host:port`` of a running Ray cluster; null starts one on 127.0.0.1 for this run and stops it at the end."""
    slots_per_core: int = 2
    """Slots (worker processes) for each CPU core, on a cluster without GPUs that this run starts. Workers divide the
    threads among them, so more slots than cores cost memory rather than speed as long as some roles are idle."""
    start_timeout_s: float = 180.0
    """Seconds for slots to be granted and for each role to come up."""
    call_timeout_s: float = 3600.0
    """Seconds that one call to a role may take before the run stops, dumps the stacks of all workers and names the
    slowest."""
    phase_timeout_s: dict[str, float] = field(default_factory=dict)
    """Limits of single phases, by their name under ``seconds/`` in ``metrics.jsonl``: ``{generate: 600}``. The other
    phases have ``call_timeout_s``. ``collective`` limits one operation among the ranks of a role, 600 by default: a
    rank that hangs is noticed then."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a run resumes after it was stopped or killed (docs/resume.md)."""

    every: int = 20
    """Steps between two checkpoints. One is always written when the run is asked to stop and at the end of a round; 0
    writes only those."""
    keep_latest: int = 2
    """How many of the newest checkpoints are kept, at least 1. Older ones are deleted after a new one is complete."""
    keep_best: int = 0
    """How many more are kept: those of the best steps by ``best_by``."""
    best_by: str = "heldout/greedy/reward"
    """Metric by which ``keep_best`` compares steps; steps without it are not candidates."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which values of ``best_by`` are better."""
    keep_every: int = 0
    """Keep the checkpoints of steps that this number divides forever; 0 turns this off."""
    overlap: bool = True
    """Copy the state in memory, and write and publish the checkpoint during the next step. Needs host memory for the
    copy: 12 bytes for each trained weight, over all ranks."""

    def __post_init__(self) -> None:
        if min(self.every, self.keep_best, self.keep_every) < 0:
            numbers = f"{self.every}, {self.keep_best}, {self.keep_every}"
            raise ValueError(f"every, keep_best and keep_every must not be negative: {numbers}")
        if self.keep_latest < 1:
            raise ValueError(f"keep_latest must be at least 1: {self.keep_latest}")


@dataclass(frozen=True)
class RunConfig:
    """The run folder, what is written there, and when the run ends or resumes."""

    dir: str = MISSING
    """Folder of this run."""
    resume: str = "auto"
    """``auto`` resumes from the newest valid checkpoint of ``dir``, or starts if there is no run yet. ``never``
    requires ``dir`` to be new or empty. A path is the checkpoint to resume from: the newest of ``dir``, or, with a new
    ``dir``, one of another run."""
    allow_change: list[str] = field(default_factory=list)
    """Keys or sections of the recipe that may differ from those of the checkpoint, beside the harmless ones; the result
    then differs from that of one uninterrupted run. ``data`` and ``model`` allow other data and other weights."""
    max_time: str | None = None
    """Time limit, as ``3h50m``, ``45m`` or ``90s``, counted from the start of the Slurm job if there is one, else of
    the process. The run saves and stops with status 75 before it, allowing for the slowest step and save so far."""
    max_restarts: int = 2
    """How often a run that lost workers restarts all roles and resumes from its last checkpoint. Frozen roles, which
    have no state, are first restarted alone, as often."""
    max_non_finite: int = 1
    """Number of consecutive optimizer steps with a loss or gradient that is not finite that ends the run; those before
    are skipped and counted. No such step changes a weight. With 1 the first one ends the run, with a bundle for ``align
    replay``."""
    cuda: list[CudaOption] = field(default_factory=list)
    """Options of the workers on GPUs; without GPUs they have no effect. ``tf32``: products of float32 matrices with 10
    bits of mantissa, several times faster; training in bfloat16 has few of them. ``deterministic``: kernels that give
    the same bits in each run where torch has them, slower (docs/resume.md)."""
    bundle_steps: list[int] = field(default_factory=list)
    """Steps for which a bundle for ``align replay`` is written even without a fault."""
    steps: int = MISSING
    """Steps of the algorithm's loop: optimizer steps, or rollout batches where responses are sampled (``epochs`` times
    ``minibatches`` optimizer steps each). Required unless ``run.epochs`` is given. Learning-rate schedules count
    optimizer steps: ``run.steps`` times ``epochs`` times ``minibatches``, restarted in each of ``rounds``. Skipped
    steps (``critic_warmup_steps``, ``target_kl``, nothing to learn from) are not subtracted, so a schedule may not
    reach its end."""
    epochs: float = 0.0
    """Replaces ``steps``: passes over the data, which may be a fraction. ``steps`` is then ``epochs`` times the rows of
    the training split, divided by the rows of a step and rounded up; the same in each round."""
    seed: int = 0
    """Seed of data order, weight initialization and sampling."""
    logged_samples: int = 4
    """Responses written to ``samples.jsonl`` each step."""
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    """Where the metrics go beside ``metrics.jsonl``. ``tensorboard`` writes event files to ``tensorboard/``. ``[]``
    turns this off."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """Display in the terminal; ``auto`` is live on a terminal and about a hundred plain lines elsewhere. ``none`` hides
    steps and loading; errors are always printed."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, int) and (self.epochs < 0 or (self.steps > 0) == (self.epochs > 0)):
            raise ValueError(f"give either steps or epochs, a positive number: {self.steps}, {self.epochs}")
        if self.max_time is not None and not re.fullmatch(r"(?=.)(\d+h)?(\d+m)?(\d+s)?", self.max_time):
            raise ValueError(f"max_time is written as 3h50m, 45m or 90s: {self.max_time!r}")
        if self.max_restarts < 0 or self.max_non_finite < 1:
            raise ValueError(
                f"max_restarts must not be negative and max_non_finite must be positive: {self.max_restarts}, "
                f"{self.max_non_finite}"
            )

    @property
    def max_seconds(self) -> float | None:
        """``max_time`` in seconds."""
        if self.max_time is None:
            return None
        units = {"h": 3600, "m": 60, "s": 1}
        return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", self.max_time)))


@dataclass(frozen=True)
class RecipeConfig:
    """Keys of every recipe; the ``Config`` of each algorithm extends them."""

    algorithm: str = MISSING
    """Name of the algorithm, a module of ``align.algorithms``."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run folder."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints to resume from."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data source."""
    executor: Literal["ray", "local"] = "ray"
    """``ray``: each role in separate worker processes. ``local``: every role in this process, for debugging."""
    placement: dict[str, str] = field(default_factory=dict)
    """Slots of each role, as ``0``, ``0-3`` or ``0,2``. A slot is a GPU, or a worker process on a CPU cluster. Roles
    that share a slot share its device."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where Ray runs."""

    def absent(self) -> set[str]:
        """Names of the roles that this recipe has no section for; no worker is started for them."""
        return {name for name, hint in field_types(type(self)).items() if _is_absent(getattr(self, name), hint)}

    def updates_per_step(self) -> int:
        """Maximum number of optimizer steps in one of ``run.steps``; learning-rate schedules count these."""
        return 1

    def reads(self) -> RowKind:
        """What ``data`` is read as."""
        return "preferences"

    def rows_per_step(self) -> tuple[str, int]:
        """The key that sets how many rows of the data a step draws, and their maximum number."""
        return "batch_size", vars(self)["batch_size"]

    def num_rows(self, counts: Mapping[str, int]) -> int:
        """Rows that batches are drawn from, by the ``counts`` of the algorithm's ``prepare``."""
        return counts["kept"]

    def with_steps(self, num_rows: int) -> RecipeConfig:
        """The recipe with ``run.steps`` in place of ``run.epochs``, for ``num_rows`` rows of data."""
        if not self.run.epochs:
            return self
        steps = math.ceil(Fraction(str(self.run.epochs)) * num_rows / self.rows_per_step()[1])
        return replace(self, run=replace(self.run, steps=steps, epochs=0.0))

    def rated(self) -> Mapping[str, Sequence[str]]:
        """Attributes that frozen reward models score separately, by role."""
        return {}

    def evaluations(self) -> Mapping[str, str]:
        """Benchmarks that measure the trained model after training, each with the folder of its data."""
        return {}

    def num_rounds(self) -> int:
        """How often the roles are started, each time for ``run.steps``."""
        return 1

    def in_round(self, start: str) -> RecipeConfig:
        """The recipe of a later round, whose policy starts from the folder ``start``."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Remarks on the configuration that are printed with its values."""
        return []


def _is_absent(value: object, hint: Any) -> bool:
    is_role = hint is NoneType or any(issubclass(section, RoleConfig) for section in sections_in(hint))
    return value is None and is_role
