"""Load a data source as rows of one kind, without duplicates and overlap, and count the rows that are dropped.

The formats are in `helpsteer2` (HelpSteer, HelpSteer2), `helpsteer3`, `openai`, `nemo` and `trl`. The functions of
`tokenize` turn rows into token ids; they can also be imported from here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, overload

import align.data
from align.config import DataConfig, RowKind
from align.data import helpsteer2, helpsteer3, nemo, openai
from align.data.chat import Renderer
from align.data.detect import resolve_format, single_source, trl_row_kind
from align.data.mixing import SPLITS, ParsedItem, RowFormat, SourceSplits, mix_sources, read_source
from align.data.rows import BadRow, Comparison, DataRow, Edit, Feedback, Preference, Principle, Rating
from align.data.tokenize import PromptSet, tokenize_demonstrations, tokenize_pairs, tokenize_prompts, tokenize_ratings
from align.errors import ConfigError, DataError

__all__ = [
    "DataSplits",
    "Preference",
    "PreferenceData",
    "PromptSet",
    "Rating",
    "RowKind",
    "SplitCounts",
    "load_dataset",
    "tokenize_demonstrations",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_ratings",
]


@dataclass(frozen=True)
class SplitCounts:
    """Row counts of one split by outcome: ``read`` is the sum of all the others.

    A row is what is trained on, a pair or a response: several lines of a file may make one, and one line two. What
    cannot be read counts as one row.
    """

    read: int
    bad: Mapping[str, int]
    """Rows that break the schema, by reason (``data.bad_rows=skip``)."""
    other_domain: int
    """Rows outside ``data.domains``."""
    duplicates: int
    """Rows whose context and responses occurred before in this split."""
    in_validation: int
    """Rows of train whose context and responses are also in validation."""
    kept: int
    """Rows that remain, including ties."""
    spread: int = 0
    """Rows whose annotators differ by more than ``data.max_spread``."""
    single: int = 0
    """Prompts with one response, which make no pair (``format: helpsteer`` read as preferences)."""


R = TypeVar("R", bound=DataRow, covariant=True)
T = TypeVar("T", bound=DataRow)


@dataclass(frozen=True)
class DataSplits(Generic[R]):
    """Both splits, without duplicates and without overlap, in the order of the files."""

    train: Sequence[R]
    validation: Sequence[R]
    counts: Mapping[str, SplitCounts]
    """By name of the split."""
    fingerprint: str
    """sha256 over the content and order of the rows kept; equal on every machine."""


PreferenceData = DataSplits[Preference]


FORMATS: dict[str, dict[RowKind, RowFormat]] = {
    "helpsteer3": {
        "preferences": RowFormat(helpsteer3.config_reader("preference"), helpsteer3.parse_preference),
        "comparisons": RowFormat(helpsteer3.read_comparisons, helpsteer3.parse_comparison),
        "feedback": RowFormat(helpsteer3.config_reader("feedback"), helpsteer3.parse_feedback),
        "edits": RowFormat(helpsteer3.config_reader("edit"), helpsteer3.parse_edit),
        "principles": RowFormat(helpsteer3.config_reader("principle"), helpsteer3.parse_principle),
    },
    "helpsteer3_edit_quality": {
        "preferences": RowFormat(helpsteer3.config_reader("edit_quality"), helpsteer3.parse_edit_quality)
    },
    "helpsteer": {
        "preferences": RowFormat(helpsteer2.read_prompt_groups, helpsteer2.parse_prompt_group),
        "ratings": RowFormat(helpsteer2.read_ratings, helpsteer2.parse_rating),
    },
    "helpsteer2": {
        "preferences": RowFormat(helpsteer2.read_rating_pairs, helpsteer2.parse_rating_pair),
        "ratings": RowFormat(helpsteer2.read_ratings, helpsteer2.parse_rating),
    },
    "helpsteer2_preference": {"preferences": RowFormat(helpsteer2.read_preferences, helpsteer2.parse_preference)},
    "helpsteer2_disagreements": {"ratings": RowFormat(helpsteer2.read_disagreements, helpsteer2.parse_disagreements)},
    "openai": {
        "preferences": RowFormat(openai.read_splits, openai.parse_preference),
        "ratings": RowFormat(openai.read_splits, openai.parse_rating),
    },
    "nemo": {
        "preferences": RowFormat(nemo.read_row_pairs, nemo.parse_row_pair),
        "ratings": RowFormat(nemo.read_splits, nemo.parse_ratings),
    },
    "trl": {
        "preferences": RowFormat(openai.read_splits, lambda raw: align.data.trl.parse_preference(raw)),
        "prompts": RowFormat(openai.read_splits, lambda raw: align.data.trl.parse_prompt(raw)),
        "demonstrations": RowFormat(openai.read_splits, lambda raw: align.data.trl.parse_demonstration(raw)),
    },
}
"""By ``data.format``, and by what it can be read as."""


def row_format(name: str, reads: RowKind) -> RowFormat:
    """How format ``name`` is read as ``reads``. Prompts and demonstrations are those of its preferences, or prompts
    those of its ratings, where it has none by themselves. Raises `ConfigError` where it cannot be read so."""
    formats_by_kind = FORMATS[name]
    others: dict[str, tuple[RowKind, ...]] = {"prompts": ("preferences", "ratings"), "demonstrations": ("preferences",)}
    for kind in (reads, *others.get(reads, ())):
        if kind in formats_by_kind:
            return formats_by_kind[kind]
    formats = ", ".join(sorted(other for other, several in FORMATS.items() if reads in several))
    raise ConfigError(
        f"data.format={name} holds {' and '.join(formats_by_kind)}, not {reads}",
        remedy=f"use data with {reads}. Formats that hold them: data.format={formats}",
    )


def dataset_items(data: DataConfig, reads: RowKind) -> SourceSplits:
    """Both splits of a source, or of all sources, row by row, bad rows among them."""
    data = resolve_format(data)
    if data.sources:
        return mix_sources(data, lambda source: dataset_items(source, reads))
    return read_source(data, row_format(data.format, reads))


def default_row_kind(data: DataConfig) -> RowKind:
    """What a source is read as where nothing else is asked for: preferences where it holds them."""
    data = resolve_format(data)
    if data.sources:
        return default_row_kind(single_source(data, next(iter(data.sources))))
    if data.format == "trl":
        return trl_row_kind(data)
    return "preferences" if "preferences" in FORMATS[data.format] else "ratings"


@overload
def load_dataset(data: DataConfig, reads: Literal["preferences"] = "preferences") -> DataSplits[Preference]: ...
@overload
def load_dataset(data: DataConfig, reads: Literal["ratings"]) -> DataSplits[Rating]: ...
@overload
def load_dataset(data: DataConfig, reads: Literal["comparisons"]) -> DataSplits[Comparison]: ...
@overload
def load_dataset(data: DataConfig, reads: Literal["feedback"]) -> DataSplits[Feedback]: ...
@overload
def load_dataset(data: DataConfig, reads: Literal["edits"]) -> DataSplits[Edit]: ...
@overload
def load_dataset(data: DataConfig, reads: Literal["principles"]) -> DataSplits[Principle]: ...
@overload
def load_dataset(data: DataConfig, reads: RowKind) -> DataSplits[Any]: ...
def load_dataset(data: DataConfig, reads: RowKind = "preferences") -> DataSplits[Any]:
    """Read both splits as the section ``data`` of a recipe says.

    A duplicate is a row with the context and all responses of an earlier one. A row that is in both splits stays in
    validation. Ties are kept here, because their prompts are as good as any; `tokenize_pairs` drops them.

    Raises `ConfigError` for a format that does not hold what ``reads`` asks for, and `DataError` for a source that is
    missing or damaged, for a row that breaks the schema (``bad_rows: stop``) and for a split with no rows left.
    """
    splits = dataset_items(data, reads)
    kept: dict[str, dict[Any, DataRow]] = {}
    counts = {}
    for split in reversed(SPLITS):  # validation first: train gives way to it
        kept[split], counts[split] = _filter_rows(splits[split], data, kept.get("validation", {}))
        if split == "train" or not splits.divided:
            _require_rows(split, kept[split], counts[split], data)
    train, validation = (list(kept[split].values()) for split in SPLITS)
    return DataSplits(train, validation, counts, _fingerprint(train, validation))


def load_validation(data: DataConfig, reads: RowKind = "preferences") -> tuple[list[Any], SplitCounts]:
    """The validation split alone, as `load_dataset` reads it, and its row counts by outcome."""
    rows, counts = _filter_rows(dataset_items(data, reads)["validation"], data, {})
    _require_rows("validation", rows, counts, data)
    return list(rows.values()), counts


def _require_rows(split: str, rows: Mapping[Any, DataRow], counts: SplitCounts, data: DataConfig) -> None:
    if not rows:
        remedy = (
            "check data.domains, data.max_rows, data.max_spread and data.validation, and that the file is not empty"
        )
        raise DataError(f"no rows are left in split {split}: {counts}", where=data.path or None, remedy=remedy)


def renderable_rows(
    source: DataSplits[R], renderers: Sequence[Renderer], data: DataConfig
) -> tuple[DataSplits[R], dict[str, int]]:
    """The corpus without rows whose conversation the template of a reward model refuses, and how many these are.

    Raises `DataError` for the first of them with ``data.bad_rows: stop``.
    """
    refused: dict[str, int] = {}
    if not renderers:
        return source, refused
    row_renderers = [renderer.with_bad_rows(data.bad_rows) for renderer in renderers]
    splits = {}
    for split, rows in zip(SPLITS, (source.train, source.validation), strict=True):
        splits[split] = []
        for row in rows:
            with ExitStack() as stack:
                for renderer in row_renderers:
                    stack.enter_context(renderer.row(row.where, refused))
                    renderer.prompt_ids(row.context)
                splits[split].append(row)
    return replace(source, **splits), refused


def _fingerprint(*splits: Sequence[DataRow]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            digest.update(json.dumps(row.content, sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


_RowsByKey = Mapping[Any, DataRow]


def _filter_rows(
    source: Iterable[ParsedItem], data: DataConfig, elsewhere: _RowsByKey
) -> tuple[dict[Any, DataRow], SplitCounts]:
    rows: dict[Any, DataRow] = {}
    bad: Counter[str] = Counter()
    read = other_domain = spread = duplicates = overlap = single = 0
    for where, parsed in source:
        if isinstance(parsed, BadRow):
            if data.bad_rows == "stop":
                remedy = "fix the row, or skip and count such rows: data.bad_rows=skip"
                raise DataError(str(parsed), where=parsed.where or where, remedy=remedy)
            bad[parsed.reason] += 1
            read += 1
            continue
        read += max(1, len(parsed))
        single += not parsed
        for row in parsed:
            if data.domains and row.domain not in data.domains:
                other_domain += 1
            elif data.max_spread is not None and row.spread > data.max_spread:
                spread += 1
            elif row.key in rows:
                duplicates += 1
            elif row.key in elsewhere:
                overlap += 1
            else:
                rows[row.key] = replace(row, where=where)
    return rows, SplitCounts(read, dict(bad), other_domain, duplicates, overlap, len(rows), spread, single)
