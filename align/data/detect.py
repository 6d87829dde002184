"""Detect the format of a data source from the names of its files and the columns of its first rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from align.config import DataConfig, RowKind
from align.data import layout, sources
from align.data.rows import BadRow, parse_row
from align.errors import ConfigError, DataError

FIRST_ROWS = 20
HUB = {"nvidia/HelpSteer3": "helpsteer3", "nvidia/HelpSteer2": "helpsteer2", "nvidia/HelpSteer": "helpsteer"}
"""Formats of hub ids that hold several data sets."""
PLACE = ("domain", "language")

COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "helpsteer3": [
        ("context", "response1", "response2", "overall_preference"),
        ("context", "response1", "response2", "feedback1", "feedback2"),
        ("context", "original_response", "edited_response", "feedback"),
        ("context", "response", "principle", "fulfilment"),
    ],
    "helpsteer3_edit_quality": [("context", "original_response", "good_edited_response", "bad_edited_response")],
    "helpsteer2": [("prompt", "response", "helpfulness")],
    "helpsteer": [("prompt", "response", "helpfulness")],
    "helpsteer2_preference": [("prompt", "response_1", "response_2", "preference_strength")],
    "nemo": [("text", "label"), ("conversations",)],
    "openai": [("prompt", "chosen", "rejected", "strength"), ("messages", "ratings")],
    "trl": [("prompt",), ("chosen", "rejected"), ("messages",), ("prompt", "completion")],
}
"""What a row of each format has, in one of its forms."""

FIELDS = sorted({name for forms in COLUMNS.values() for form in forms for name in form} | {*PLACE, "change_summary"})

UNPAIRED = ("prompt", "completion", "label")


def resolve_format(data: DataConfig) -> DataConfig:
    """The section with the format of its source, or of each of its sources, in place of ``auto``.

    Raises `DataError` for columns of no format or of several, and for unpaired preferences, and `ConfigError` for
    ``columns`` that are not there.
    """
    if data.sources:
        formats = {name: resolve_format(single_source(data, name)).format for name in data.sources}
        return replace(
            data, sources={name: replace(source, format=formats[name]) for name, source in data.sources.items()}
        )
    if data.format != "auto" and not data.columns:
        return data
    form = data.format if data.format != "auto" else HUB.get(data.path) or _by_folder(data.path)
    rows = {} if form and not data.columns else _first_rows(data)
    if data.columns:
        _require_columns(data, rows)
    try:
        return replace(data, format=form or _by_columns(data, rows))
    except ValueError as error:
        raise ConfigError(f"data: {error}", remedy="see DataConfig in docs/recipes.md") from error


def single_source(data: DataConfig, name: str) -> DataConfig:
    """The section of one of its sources."""
    source = data.sources[name]
    fields: dict[str, Any] = {key: getattr(source, key) for key in ("path", "format", "revision", "columns")}
    return replace(data, sources={}, **fields)


def describe_sources(data: DataConfig) -> list[str]:
    """A line for each source: its format, columns and files. ``data`` is `resolve_format`."""
    if data.sources:
        return [
            f"{name}, weight {source.weight:g}: {line}"
            for name, source in data.sources.items()
            for line in describe_sources(single_source(data, name))
        ]
    renamed = "".join(f", {field} from {name}" for field, name in data.columns.items())
    files = sources.find_table_files(data.path, _stems(data))
    if not files:
        return [f"data: {data.format} from {data.path}{renamed}"]
    held_out = f"validation: {data.validation:.3g} of its prompts, by their hash"
    if "validation" in files:
        held_out = f"validation from {layout.format_files(files['validation'])}"
    return [f"data: {data.format}{_used(data)}{renamed} from {layout.format_files(files['train'])}, {held_out}"]


def _stems(data: DataConfig) -> dict[str, str]:
    """The files of both splits, without suffix. Of HelpSteer3's folders that of preferences, or the first there is."""
    validation = "val" if data.format == "nemo" else "validation"
    configs = _configs(data.path) if data.format.startswith("helpsteer3") else []
    return (
        {"train": f"{configs[0]}/train", "validation": f"{configs[0]}/{validation}"}
        if configs
        else {"train": "train", "validation": validation}
    )


def _used(data: DataConfig) -> str:
    """The columns that are read."""
    if data.format.startswith("helpsteer3") and _configs(data.path):
        return ""
    columns = {name for row in _first_rows(data).values() for name in row}
    read = dict.fromkeys(name for form in COLUMNS.get(data.format, []) if columns >= set(form) for name in form)
    return f" ({', '.join(read)})" if read else ""


def trl_row_kind(data: DataConfig) -> RowKind:
    """What the rows of a source of format ``trl`` hold."""
    columns = {name for row in _first_rows(data).values() for name, value in row.items() if value is not None}
    if "chosen" in columns:
        return "preferences"
    return "demonstrations" if columns & {"messages", "completion"} else "prompts"


def _by_folder(path: str) -> str | None:
    """The format of a folder with HelpSteer3's own files."""
    configs = _configs(path)
    if configs == ["edit_quality"]:
        return "helpsteer3_edit_quality"
    return "helpsteer3" if configs else None


def _configs(path: str) -> list[str]:
    """Folders of HelpSteer3 that hold a training split."""
    folder = Path(path).expanduser()
    files = {name: [folder / name / f"train.{suffix}" for suffix in ("jsonl.gz", "jsonl")] for name in sources.CONFIGS}
    return [name for name, several in files.items() if any(file.is_file() for file in several)]


def _first_rows(data: DataConfig) -> dict[str, dict[str, Any]]:
    """The first rows that can be read, by their place, with their columns renamed. Raises `DataError` for none."""
    stems = {"train": "train", "validation": "validation"}
    problem: tuple[str, BadRow] | None = None
    rows = {}
    for where, raw in islice(sources.open_tables(data, stems)["train"](), FIRST_ROWS):
        try:
            rows[where] = parse_row(raw)
        except BadRow as error:
            problem = problem or (where, error)
    if not rows:
        where, message = (problem[0], str(problem[1])) if problem else (data.path, "has no rows")
        remedy = "use JSON lines, Parquet or CSV, or set data.format"
        raise DataError(f"the format cannot be detected: {message}", where=where, remedy=remedy)
    return rows


def _require_columns(data: DataConfig, rows: Mapping[str, Mapping[str, Any]]) -> None:
    columns = {name for row in rows.values() for name in row}
    for name, column in data.columns.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ConfigError(
                f"data.columns: {name!r} is not a column of any format",
                remedy=f"{hint}valid names: {', '.join(FIELDS)}",
            )
        if name not in columns:
            raise ConfigError(
                f"data.columns: the first rows have no column {column!r} for {name}",
                where=data.path,
                remedy=f"columns of the source: {', '.join(sorted(columns))}",
            )


def _by_columns(data: DataConfig, rows: Mapping[str, Mapping[str, Any]]) -> Any:
    first = next(iter(rows))
    columns_present = {name for row in rows.values() for name, value in row.items() if value is not None}
    if columns_present >= set(UNPAIRED):
        raise DataError(
            f"unpaired preferences ({', '.join(UNPAIRED)}): no algorithm supports them",
            where=first,
            remedy="use pairs (rows with chosen and rejected), or remove label to train on every completion with sft",
        )
    forms = {name: [form for form in several if columns_present >= set(form)] for name, several in COLUMNS.items()}
    if forms["nemo"] == [("conversations",)] and not _labelled(rows):
        forms["nemo"] = []
    trl_forms = [form for form in forms["trl"] if form != ("prompt",)]
    candidates = [name for name, several in forms.items() if several and name != "trl"]
    if candidates == ["helpsteer2", "helpsteer"] and _lists(rows):
        candidates = ["helpsteer2_disagreements"]
    if candidates == ["openai"] or (not candidates and len(_kinds(trl_forms)) <= 1 and forms["trl"]):
        return candidates[0] if candidates else "trl"
    candidates += [f"trl with {' and '.join(form)}" for form in trl_forms if candidates or len(_kinds(trl_forms)) > 1]
    if len(candidates) == 1:
        return candidates[0]
    columns = ", ".join(sorted(columns_present))
    if not candidates:
        needs = "; ".join(f"{name}: {' or '.join(', '.join(form) for form in some)}" for name, some in COLUMNS.items())
        remedy = f"rename them as in one of the formats, or map them: data.columns={{prompt: NAME, ...}}. {needs}"
        raise DataError(f"the columns match no format: {columns}", where=first, remedy=remedy)
    remedy = f"set data.format to one of {', '.join(name.split()[0] for name in candidates)}"
    if not any(name.startswith("helpsteer") for name in candidates):
        remedy = "remove the columns that do not belong"
    raise DataError(
        f"the columns match several formats ({'; '.join(candidates)}): {columns}", where=first, remedy=remedy
    )


def _kinds(forms: list[tuple[str, ...]]) -> set[str]:
    """Pairs, conversations or completions; ``messages`` beside pairs repeat the chosen one."""
    kinds = {form[0] if form[0] != "prompt" else "completion" for form in forms}
    return kinds - {"messages"} if "chosen" in kinds else kinds


def _lists(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Ratings of several annotators."""
    return any(isinstance(row.get("helpfulness"), list) for row in rows.values())


def _labelled(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Turns with a label, as NeMo has them."""
    turns = (turn for row in rows.values() for turn in row.get("conversations") or [])
    return any(isinstance(turn, dict) and "label" in turn for turn in turns)
