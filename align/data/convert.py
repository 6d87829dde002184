"""Convert data: ratings to pairs, a subset of the attributes, and files in the OpenAI, NeMo and HelpSteer3 formats."""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config import DataConfig
from align.config.load import build_config
from align.data import dataset, helpsteer3, nemo, openai
from align.data.rows import BadRow, Preference, Rating
from align.errors import ConfigError, DataError
from align.utils.atomic_write import new_folder

if TYPE_CHECKING:
    from rich.console import Console


def pairs_from_ratings(
    rows: Iterable[Rating], attribute: str = "helpfulness"
) -> tuple[list[Preference], dict[str, int]]:
    """Every two responses in succession to one prompt as a pair, by their ratings of ``attribute``.

    The strength is the difference, rounded, 1 to 3. The counts say how many ``pairs`` there were, how many of them were
    ``ties`` or ``empty`` (nothing is said in the preferred response) and were dropped, how many ``kept``, and how many
    rows were ``unrated``, or ``single``: the only rated one of their prompt.
    """
    counts: Counter[str] = Counter(unrated=0, single=0, pairs=0, ties=0, empty=0, kept=0)
    preferences = []
    for context, group in groupby(rows, key=lambda row: row.context):
        members = list(group)
        rated = [row for row in members if attribute in row.ratings]
        counts["unrated"] += len(members) - len(rated)
        counts["single"] += len(rated) == 1
        for first, second in combinations(rated, 2):
            difference = second.ratings[attribute] - first.ratings[attribute]
            counts["pairs"] += 1
            if difference == 0:
                counts["ties"] += 1
                continue
            strength = max(1, min(3, round(abs(difference))))
            preference = strength if difference > 0 else -strength
            row = Preference(context, first.response, second.response, preference, first.domain, first.language)
            if row.chosen.strip():
                preferences.append(row)
            else:
                counts["empty"] += 1
    counts["kept"] = len(preferences)
    return preferences, dict(counts)


def select_attributes(rows: Iterable[Rating], attributes: Sequence[str]) -> tuple[list[Rating], dict[str, int]]:
    """Ratings of ``attributes`` alone, the others as if nobody had given them. Rows that have none of them are dropped
    and counted as ``unrated``."""
    counts: Counter[str] = Counter(rows=0, unrated=0, kept=0)
    selected = []
    for row in rows:
        counts["rows"] += 1
        ratings = {name: row.ratings[name] for name in attributes if name in row.ratings}
        if ratings:
            selected.append(replace(row, ratings=ratings))
    counts["kept"] = len(selected)
    counts["unrated"] = counts["rows"] - len(selected)
    return selected, dict(counts)


class OutputFormat(NamedTuple):
    """How rows are written."""

    stems: Mapping[str, str]
    """The file of each split, without its suffix."""
    suffix: str
    objects: Mapping[type, Callable[[Any], list[dict[str, Any]]]]
    """The lines of a row, by its type. Raises `BadRow` for a row that the format cannot hold."""
    ties: bool = False
    """Whether a tie can be told from a preference by those who read the file."""


OUTPUT_FORMATS = {
    "openai": OutputFormat(
        openai.SPLITS, "jsonl", {Preference: openai.preference_to_json, Rating: openai.rating_to_json}
    ),
    "nemo": OutputFormat(nemo.SPLITS, "jsonl", {Preference: nemo.to_conversations, Rating: nemo.to_conversations}),
    "nemo_text": OutputFormat(nemo.SPLITS, "jsonl", {Preference: nemo.to_texts, Rating: nemo.to_texts}),
    "helpsteer3": OutputFormat(helpsteer3.SPLITS, "jsonl.gz", {Preference: helpsteer3.preference_to_json}, ties=True),
}
"""By name of the format. ``nemo`` has conversations and ``nemo_text`` texts with nine numbers; `nemo` reads both."""


def write_dataset(
    folder: Path, target: str, splits: Mapping[str, Sequence[Preference] | Sequence[Rating]]
) -> dict[str, dict[str, int]]:
    """Write the splits into the new folder ``folder``, which appears whole or not at all.

    The counts say of each split how many rows were ``written``, and how many not, by reason. Raises `DataError` when
    there is something at ``folder`` already, and when a split would be empty.
    """
    to, folder = OUTPUT_FORMATS[target], folder.expanduser()
    _require_new(folder)
    counts = {}
    with new_folder(folder) as temporary:
        for split, rows in splits.items():
            file = temporary / f"{to.stems[split]}.{to.suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            counts[split] = _write_split(file, to, rows)
            if not counts[split]["written"]:
                raise DataError(f"no rows of {split} can be written: {_listed(counts[split])}", where=str(folder))
    return counts


def _require_new(folder: Path) -> None:
    if folder.expanduser().exists():
        raise DataError("the output path exists already", where=str(folder), remedy="choose a new folder")


def _write_split(file: Path, to: OutputFormat, rows: Sequence[Preference] | Sequence[Rating]) -> dict[str, int]:
    counts: Counter[str] = Counter(written=0)
    # No time in the header, so equal rows give equal files.
    with gzip.GzipFile(file, "wb", mtime=0) if file.suffix == ".gz" else file.open("wb") as stream:
        for row in rows:
            if isinstance(row, Preference) and not row.preference and not to.ties:
                counts["ties"] += 1
                continue
            try:
                objects = to.objects[type(row)](row)
            except BadRow as error:
                counts[error.reason] += 1
                continue
            for item in objects:
                stream.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            counts["written"] += 1
    return dict(counts)


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The section ``data`` that a command's arguments amount to: its options, and ``key=value`` with keys of ``data``.
    Raises `ConfigError` for values that it refuses."""
    names = [field.name for field in fields(DataConfig) if getattr(arguments, field.name, None) is not None]
    options = [f"{name}={json.dumps(getattr(arguments, name))}" for name in names]
    return build_config(
        DataConfig, None, [*options, *(text.removeprefix("data.") for text in arguments.overrides)]
    ).config


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align data convert``."""
    data = data_config(arguments)
    reads = "ratings" if arguments.pairs_by else arguments.reads or dataset.default_row_kind(data)
    kind = Rating if reads == "ratings" and not arguments.pairs_by else Preference
    if kind not in OUTPUT_FORMATS[arguments.to].objects:
        raise ConfigError(
            f"--to {arguments.to} cannot hold ratings", remedy="convert them to pairs: --pairs-by helpfulness"
        )
    if arguments.attributes and kind is Preference:
        raise ConfigError("--attributes requires ratings", remedy="remove it, or read ratings: --rows ratings")
    _require_new(arguments.out)
    source = dataset.load_dataset(data, reads)
    splits: dict[str, Any] = {"train": source.train, "validation": source.validation}
    for split, rows in splits.items():
        console.print(f"{split}: {_listed(asdict(source.counts[split]))}", highlight=False)
        if arguments.pairs_by:
            splits[split], counts = pairs_from_ratings(rows, arguments.pairs_by)
            console.print(f"{split}, pairs by {arguments.pairs_by}: {_listed(counts)}", highlight=False)
        elif arguments.attributes:
            splits[split], counts = select_attributes(rows, arguments.attributes)
            console.print(f"{split}, only {', '.join(arguments.attributes)}: {_listed(counts)}", highlight=False)
    for split, counts in write_dataset(arguments.out, arguments.to, splits).items():
        console.print(f"{split}: {_listed(counts)}", highlight=False)
    console.print(f"wrote {arguments.out}", highlight=False)
    return 0


def _listed(counts: Mapping[str, Any]) -> str:
    """Counts that are not 0, those of bad rows by their reason."""
    flat = {**counts, **counts.get("bad", {})}
    return ", ".join(f"{name} {count}" for name, count in flat.items() if count and name != "bad")
