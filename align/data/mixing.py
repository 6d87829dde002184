"""Split a data source into train and validation, and mix several sources by weight.

Both depend only on the hash of a row's prompt. So all rows of one prompt are in the same split, wherever they are in
the file, and added rows do not move others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from align.config import DataConfig
from align.data.chat import Message
from align.data.detect import single_source
from align.data.rows import BadRow, Context, DataRow
from align.data.sources import RawRows

SPLITS = ("train", "validation")

ParsedItem = tuple[str, "Sequence[DataRow] | BadRow"]
"""A place, and the rows that were read there or why there are none."""


class RowFormat(NamedTuple):
    """How a source is read as rows of one kind."""

    sources: Callable[[DataConfig], dict[str, RawRows]]
    """Both splits as they come, item by item; the training split alone if there is no validation split."""
    parse: Callable[[Any], Sequence[DataRow]]
    """The rows of one item. Raises `BadRow`."""


class SourceSplits(dict[str, Iterable[ParsedItem]]):
    """Items by the name of their split."""

    divided = False
    """Whether the validation split is a part of what the source has for training."""


def read_source(data: DataConfig, form: RowFormat) -> SourceSplits:
    """Both splits of one source. Without a validation split, a share ``data.validation`` of the prompts is held out."""
    splits = SourceSplits({split: _parsed(rows, form.parse) for split, rows in form.sources(data).items()})
    if "validation" not in splits:
        splits = _divided(splits["train"], data.validation)
    if data.system_prompt:
        for split, items in splits.items():
            splits[split] = _with_system(items, Message("system", data.system_prompt))
    return splits


def _parsed(rows: RawRows, parse: Callable[[Any], Sequence[DataRow]]) -> Iterator[ParsedItem]:
    for where, raw in rows:
        try:
            yield where, parse(raw)
        except BadRow as error:
            yield where, error


def _divided(items: Iterable[ParsedItem], fraction: float) -> SourceSplits:
    """Bad rows, whose prompt is not known, stay in train."""
    parts: dict[str, list[ParsedItem]] = {split: [] for split in SPLITS}
    for where, rows in items:
        held_out = not isinstance(rows, BadRow) and bool(rows) and hash_fraction(rows[0].context) < fraction
        parts["validation" if held_out else "train"].append((where, rows))
    splits = SourceSplits(parts)
    splits.divided = True
    return splits


def hash_fraction(context: Context, salt: str = "") -> float:
    """The hash of a conversation as a number in [0, 1), equal on every machine."""
    digest = hashlib.sha256(f"{salt}{json.dumps(context)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _with_system(items: Iterable[ParsedItem], system: Message) -> Iterator[ParsedItem]:
    for where, rows in items:
        if isinstance(rows, BadRow):
            yield where, rows
        else:
            yield where, [_led(row, system) for row in rows]


def _led(row: Any, system: Message) -> DataRow:
    return row if row.context[0].role == "system" else replace(row, context=(system, *row.context))


def mix_sources(data: DataConfig, read: Callable[[DataConfig], SourceSplits]) -> SourceSplits:
    """The sources of ``data``: their training splits one after the other, each by its weight, and their validation
    splits whole, a row of each in turn."""
    parts = {name: read(single_source(data, name)) for name in data.sources}
    train = [sample_by_weight(list(part["train"]), data.sources[name].weight) for name, part in parts.items()]
    turns = zip_longest(*(part["validation"] for part in parts.values()))
    splits = SourceSplits(
        {"train": chain(*train), "validation": (item for turn in turns for item in turn if item is not None)}
    )
    splits.divided = all(part.divided for part in parts.values())
    return splits


def sample_by_weight(items: list[ParsedItem], weight: float) -> list[ParsedItem]:
    """As many of ``items`` as ``weight`` says, those whose prompts have the lowest hash, in their order."""
    if weight == 1 or not items:
        return items
    count = max(1, round(weight * len(items)))
    ranks = {number: _rank(rows) for number, (_, rows) in enumerate(items)}
    chosen = set(sorted(ranks, key=lambda number: (ranks[number], number))[:count])
    return [item for number, item in enumerate(items) if number in chosen]


def _rank(rows: Sequence[DataRow] | BadRow) -> float:
    """Bad rows come first: a weight does not hide them."""
    return -1.0 if isinstance(rows, BadRow) or not rows else hash_fraction(rows[0].context, "weight")
