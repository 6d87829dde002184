"""Read raw rows from files, folders and tables of the hub.

A raw row is a pair: its place (file:line, for errors) and a line of a file (bytes) or a row of a table (a dict).

JSON lines are read line by line here and not by ``datasets``: its JSON reader settles on one type per column, so a
wrong type or a missing field in one row is cast in silence or fails without a line number. A hub id goes through
``datasets.load_dataset``, cached or streamed.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from align.config import DataConfig
from align.data import layout
from align.data.rows import BadRow, parse_row
from align.errors import DataError

RawRows = Iterator[tuple[str, Any]]
_SUFFIXES = ", ".join(layout.SUFFIXES)
CONFIGS = ("preference", "feedback", "edit", "edit_quality", "principle")
"""Folders of HelpSteer3, each a separate data set."""


def open_tables(data: DataConfig, stems: Mapping[str, str], **hub: Any) -> dict[str, Callable[[], RawRows]]:
    """The tables at ``data.path`` by name; a call begins to read one from its first row.

    ``stems`` gives the file of each table below the folder, without its suffix; where there is none of that name, any
    file that `align.data.layout` finds for the split. ``hub`` are arguments of ``load_dataset``. A ``validation`` that
    the source does not have is left out. Raises `DataError` for a source or a table that is missing, and while reading
    for a damaged file.
    """
    tables = {name: partial(_renamed, rows, data.columns) for name, rows in _tables(data, stems, hub).items()}
    return tables if data.columns else {name: rows.args[0] for name, rows in tables.items()}


def _tables(data: DataConfig, stems: Mapping[str, str], hub: Mapping[str, Any]) -> dict[str, Callable[[], RawRows]]:
    folder = Path(data.path).expanduser()
    if folder.exists():
        files = find_table_files(data.path, stems)
        if "train" not in files:
            raise _missing(folder, stems["train"], data.format)
        return {name: partial(read_files, several) for name, several in files.items()}
    splits = hub_splits(data, hub)
    split_names = layout.match_splits(splits)
    if "train" not in split_names:
        raise DataError(f"split train is missing. Splits: {sorted(splits)}", where=data.path)
    tables = {name: splits[split_names[name]] for name in stems if name in split_names}
    return {name: partial(_hub_rows, f"{data.path}/{stems[name]}", table) for name, table in tables.items()}


def find_table_files(path: str, stems: Mapping[str, str]) -> dict[str, list[Path]]:
    """The files of each table of `open_tables`, those that are there."""
    folder = Path(path).expanduser()
    candidates = {
        name: [folder / f"{stem}.{suffix}" for suffix in ("jsonl.gz", "jsonl")] for name, stem in stems.items()
    }
    own = {name: [file for file in files if file.is_file()][:1] for name, files in candidates.items()}
    elsewhere = any("/" in stem for stem in stems.values()) and folder.is_dir()
    if elsewhere and ("validation" not in stems or any((folder / name).is_dir() for name in CONFIGS)):
        others = {}  # the format's own folders hold it, or nothing does
    else:
        others = layout.find_split_files(path) or {}
    return {name: files for name in stems if (files := own[name] or others.get(name, []))}


def hub_splits(data: DataConfig, hub: Mapping[str, Any]) -> Mapping[str, Any]:
    """The splits of a hub id by their name there."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data.path):
        remedy = "set data.path to a file, a folder or a hub id"
        raise DataError("there is no such file or folder", where=data.path, remedy=remedy)
    options = {**hub, "streaming": True} if data.streaming else hub
    try:
        return datasets.load_dataset(data.path, **options, revision=data.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"neither a local folder nor a data set on the hub: {next(iter(str(error).splitlines()), '')}",
            where=data.path,
            remedy="check data.path, data.revision and the network, or download it and set data.path to the folder",
        ) from error


def _renamed(rows: Callable[[], RawRows], columns: Mapping[str, str]) -> RawRows:
    """Rows whose columns have the names that the format gives them. What cannot be read stays as it is."""
    for where, raw in rows():
        with suppress(BadRow):
            row = parse_row(raw)
            others = {name: value for name, value in row.items() if name not in columns.values()}
            raw = others | {field: row[name] for field, name in columns.items() if name in row}
        yield where, raw


def _hub_rows(name: str, table: datasets.Dataset | datasets.IterableDataset) -> RawRows:
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            yield f"{name}:{number}", row
    except (OSError, DatasetsError) as error:
        message = f"reading from the hub failed after this row: {next(iter(str(error).splitlines()), '')}"
        remedy = "try again, or set data.streaming=false, which keeps downloaded files"
        raise DataError(message, where=f"{name}:{number}", remedy=remedy) from error


def _missing(folder: Path, stem: str, form: str) -> DataError:
    if form == "auto":
        message = (
            f"no file for split train: no file is named train, and every file has another split's name ({_SUFFIXES})"
        )
        return DataError(
            message,
            where=str(folder),
            remedy="set data.path to a file, or to a folder with train.jsonl; see docs/data.md",
        )
    looked_for = " and ".join(str(folder / f"{stem}.{suffix}") for suffix in ("jsonl.gz", "jsonl"))
    remedy = (
        f"with data.format={form}, data.path must be a folder with {stem}.jsonl.gz; see docs/data.md for other layouts"
    )
    return DataError(f"no file for split train. Looked for {looked_for}", where=str(folder), remedy=remedy)


def read_files(files: Sequence[Path]) -> RawRows:
    """The rows of files, one after the other; of a folder those that ``save_to_disk`` wrote."""
    return chain.from_iterable(map(_rows, files))


def _rows(file: Path) -> RawRows:
    if file.is_dir() or file.suffix == ".parquet":
        return _table_rows(file)
    if file.suffix == ".csv":
        return _csv_rows(file)
    if file.suffix == ".json":
        with file.open("rb") as stream:
            if stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                return _listed_rows(file)
    return read_lines(file)


def _table_rows(file: Path) -> RawRows:
    number = 0
    try:
        if file.is_dir():
            rows: Iterable[Any] = datasets.load_from_disk(str(file))
        else:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{file}:{number}", row
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        message, remedy = f"the file is damaged after this row: {error}", "copy or download the file again"
        raise DataError(message, where=f"{file}:{number}", remedy=remedy) from error


def _csv_rows(file: Path) -> RawRows:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                yield f"{file}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            remedy = "write the file as UTF-8 with a header line"
            raise DataError(f"is not valid CSV: {error}", where=f"{file}:{reader.line_num}", remedy=remedy) from error


def _listed_rows(file: Path) -> RawRows:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=str(file), remedy="copy or download the file again") from error
    yield from ((f"{file}[{number}]", row) for number, row in enumerate(rows))


def read_lines(file: Path) -> RawRows:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # as RFC 8259, section 8.1, allows
                if line.strip():
                    yield f"{file}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        # No one can say how many rows are lost, so this stops under bad_rows=skip as well.
        message, remedy = f"the file is damaged after this line: {error}", "copy or download the file again"
        raise DataError(message, where=f"{file}:{number}", remedy=remedy) from error
