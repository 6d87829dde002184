"""Data of the HelpSteer family and what can be read like it: what is read, counts, and what is refused.

The formats are in `helpsteer2` (the first two generations), `helpsteer3`, `messages` and `nemo`; `tokenize` makes token
ids of rows, and its functions can be called from here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, overload

from align.config import DataConfig, RowKind
from align.data import helpsteer2, helpsteer3, nemo, openai, trl
from align.data.chat import Renderer
from align.data.detect import alone, resolved, trl_reads
from align.data.mixing import SPLITS, Format, Item, Splits, mixed, split_items
from align.data.rows import BadRow, Comparison, Edit, Feedback, Preference, Principle, Rating, Row
from align.data.tokenize import PromptSet, demonstrations, pairs, prompts, ratings
from align.errors import ConfigError, DataError

__all__ = [
    "Corpus",
    "Preference",
    "PreferenceData",
    "PromptSet",
    "Rating",
    "RowKind",
    "SplitCounts",
    "demonstrations",
    "load",
    "pairs",
    "prompts",
    "ratings",
]


@dataclass(frozen=True)
class SplitCounts:
    """What became of the rows of one split: ``read`` is the sum of all the others.

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
    """Rows of train whose context and responses are in validation too."""
    kept: int
    """Rows left, ties among them."""
    spread: int = 0
    """Rows whose annotators lie further apart than ``data.max_spread``."""
    single: int = 0
    """Prompts with one response, which make no pair (``format: helpsteer`` read as preferences)."""


R = TypeVar("R", bound=Row, covariant=True)
T = TypeVar("T", bound=Row)


@dataclass(frozen=True)
class Corpus(Generic[R]):
    """Both splits, without duplicates and without overlap, in the order of the files."""

    train: Sequence[R]
    validation: Sequence[R]
    counts: Mapping[str, SplitCounts]
    """By name of the split."""
    fingerprint: str
    """sha256 over the content and order of the rows kept; equal on every machine."""


PreferenceData = Corpus[Preference]


FORMATS: dict[str, dict[RowKind, Format]] = {
    "helpsteer3": {
        "preferences": Format(helpsteer3.of("preference"), helpsteer3.preference),
        "comparisons": Format(helpsteer3.compared, helpsteer3.comparison),
        "feedback": Format(helpsteer3.of("feedback"), helpsteer3.feedback),
        "edits": Format(helpsteer3.of("edit"), helpsteer3.edit),
        "principles": Format(helpsteer3.of("principle"), helpsteer3.principle),
    },
    "helpsteer3_edit_quality": {"preferences": Format(helpsteer3.of("edit_quality"), helpsteer3.edit_quality)},
    "helpsteer": {
        "preferences": Format(helpsteer2.rated_groups, helpsteer2.parse_group),
        "ratings": Format(helpsteer2.rated, helpsteer2.parse_rated),
    },
    "helpsteer2": {
        "preferences": Format(helpsteer2.rated_twos, helpsteer2.parse_twos),
        "ratings": Format(helpsteer2.rated, helpsteer2.parse_rated),
    },
    "helpsteer2_preference": {"preferences": Format(helpsteer2.compared, helpsteer2.parse_compared)},
    "helpsteer2_disagreements": {"ratings": Format(helpsteer2.disagreements, helpsteer2.parse_disagreements)},
    "openai": {
        "preferences": Format(openai.sources, openai.parse_preference),
        "ratings": Format(openai.sources, openai.parse_rating),
    },
    "nemo": {
        "preferences": Format(nemo.sources_twos, nemo.parse_twos),
        "ratings": Format(nemo.sources, nemo.parse_ratings),
    },
    "trl": {
        "preferences": Format(trl.sources, trl.preference),
        "prompts": Format(trl.sources, trl.prompt),
        "demonstrations": Format(trl.sources, trl.demonstration),
    },
}
"""By ``data.format``, and by what it can be read as."""


def format_of(name: str, reads: RowKind) -> Format:
    """How format ``name`` is read as ``reads``. Prompts and demonstrations are those of its preferences, or prompts
    those of its ratings, where it has none by themselves. Raises `ConfigError` where it cannot be read so."""
    found = FORMATS[name]
    others: dict[str, tuple[RowKind, ...]] = {"prompts": ("preferences", "ratings"), "demonstrations": ("preferences",)}
    for kind in (reads, *others.get(reads, ())):
        if kind in found:
            return found[kind]
    formats = ", ".join(sorted(other for other, several in FORMATS.items() if reads in several))
    raise ConfigError(
        f"data.format={name} holds {' and '.join(found)}, not {reads}",
        remedy=f"take data that holds {reads}: data.format is one of {formats}",
    )


def items(data: DataConfig, reads: RowKind) -> Splits:
    """Both splits of a source, or of all sources, row by row, bad rows among them."""
    data = resolved(data)
    if data.sources:
        return mixed(data, lambda one: items(one, reads))
    return split_items(data, format_of(data.format, reads))


def usual(data: DataConfig) -> RowKind:
    """What a source is read as where nothing else is asked for: preferences where it holds them."""
    data = resolved(data)
    if data.sources:
        return usual(alone(data, next(iter(data.sources))))
    if data.format == "trl":
        return trl_reads(data)
    return "preferences" if "preferences" in FORMATS[data.format] else "ratings"


@overload
def load(data: DataConfig, reads: Literal["preferences"] = "preferences") -> Corpus[Preference]: ...
@overload
def load(data: DataConfig, reads: Literal["ratings"]) -> Corpus[Rating]: ...
@overload
def load(data: DataConfig, reads: Literal["comparisons"]) -> Corpus[Comparison]: ...
@overload
def load(data: DataConfig, reads: Literal["feedback"]) -> Corpus[Feedback]: ...
@overload
def load(data: DataConfig, reads: Literal["edits"]) -> Corpus[Edit]: ...
@overload
def load(data: DataConfig, reads: Literal["principles"]) -> Corpus[Principle]: ...
@overload
def load(data: DataConfig, reads: RowKind) -> Corpus[Any]: ...
def load(data: DataConfig, reads: RowKind = "preferences") -> Corpus[Any]:
    """Read both splits as the section ``data`` of a recipe says.

    A duplicate is a row with the context and all responses of an earlier one. A row that is in both splits stays in
    validation. Ties are kept here, because their prompts are as good as any; `pairs` drops them.

    Raises `ConfigError` for a format that does not hold what ``reads`` asks for, and `DataError` for a source that is
    missing or damaged, for a row that breaks the schema (``bad_rows: stop``) and for a split with no rows left.
    """
    splits = items(data, reads)
    kept: dict[str, dict[Any, Row]] = {}
    counts = {}
    for split in reversed(SPLITS):  # validation first: train gives way to it
        kept[split], counts[split] = _read(splits[split], data, kept.get("validation", {}))
        if split == "train" or not splits.divided:
            _require_rows(split, kept[split], counts[split], data)
    train, validation = (list(kept[split].values()) for split in SPLITS)
    return Corpus(train, validation, counts, _fingerprint(train, validation))


def validation(data: DataConfig, reads: RowKind = "preferences") -> tuple[list[Any], SplitCounts]:
    """The validation split alone, as `load` has it, and what became of its rows."""
    rows, counts = _read(items(data, reads)["validation"], data, {})
    _require_rows("validation", rows, counts, data)
    return list(rows.values()), counts


def _require_rows(split: str, rows: Mapping[Any, Row], counts: SplitCounts, data: DataConfig) -> None:
    if not rows:
        remedy = (
            "check data.domains, data.max_rows, data.max_spread and data.validation, and that the file is not empty"
        )
        raise DataError(f"no rows of {split} are left: {counts}", where=data.path or None, remedy=remedy)


def readable(source: Corpus[R], renderers: Sequence[Renderer], data: DataConfig) -> tuple[Corpus[R], dict[str, int]]:
    """The corpus without rows whose conversation the template of a reward model refuses, and how many these are.

    Raises `DataError` for the first of them with ``data.bad_rows: stop``.
    """
    refused: dict[str, int] = {}
    if not renderers:
        return source, refused
    own = [renderer.with_bad_rows(data.bad_rows) for renderer in renderers]
    splits = {}
    for split, rows in zip(SPLITS, (source.train, source.validation), strict=True):
        splits[split] = []
        for row in rows:
            with ExitStack() as stack:
                for renderer in own:
                    stack.enter_context(renderer.row(row.where, refused))
                    renderer.prompt_ids(row.context)
                splits[split].append(row)
    return replace(source, **splits), refused


def _fingerprint(*splits: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            digest.update(json.dumps(row.content, sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


_Kept = Mapping[Any, Row]


def _read(source: Iterable[Item], data: DataConfig, elsewhere: _Kept) -> tuple[dict[Any, Row], SplitCounts]:
    rows: dict[Any, Row] = {}
    bad: Counter[str] = Counter()
    read = other_domain = spread = duplicates = overlap = single = 0
    for where, found in source:
        if isinstance(found, BadRow):
            if data.bad_rows == "stop":
                remedy = "mend the row, or leave such rows out and have them counted: data.bad_rows=skip"
                raise DataError(str(found), where=found.where or where, remedy=remedy)
            bad[found.reason] += 1
            read += 1
            continue
        read += max(1, len(found))
        single += not found
        for row in found:
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
