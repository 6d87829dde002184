"""Where rows come from: files of a folder or tables of the hub.

A row is a pair of its place, to name in errors, and a line of a file (bytes) or a row of the hub (a dict).

A folder is read line by line here and not by ``datasets``: its JSON reader settles on one type per column, so a wrong
type or a missing field in one row is cast in silence or fails without a line number. A hub id goes through
``datasets.load_dataset``, cached or streamed.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from align.errors import DataError
from align.sections import Data

Rows = Iterator[tuple[str, Any]]


def tables(data: Data, stems: Mapping[str, str], **hub: Any) -> dict[str, Callable[[], Rows]]:
    """The tables at ``data.path`` by name; a call begins to read one from its first row.

    ``stems`` gives the file of each table below the folder, without its suffix; ``hub`` are arguments of
    ``load_dataset``. Raises `DataError` for a source or a table that is missing, and while reading for a damaged file.
    """
    folder = Path(data.path).expanduser()
    if folder.is_dir():
        files = {name: _file(folder, name, stems, data.format) for name in stems}
        return {name: partial(lines, file) for name, file in files.items()}
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data.path):
        raise DataError("there is no such folder", where=data.path, remedy="set data.path to a folder or a hub id")
    options = {**hub, "streaming": True} if data.streaming else hub
    try:
        found = datasets.load_dataset(data.path, **options, revision=data.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"neither a folder here nor a data set that the hub gives: {next(iter(str(error).splitlines()), '')}",
            where=data.path,
            remedy="check data.path, data.revision and the network, or download it and give the folder",
        ) from error
    if missing := set(stems) - set(found):
        raise DataError(f"split {min(missing)} is missing, found {sorted(found)}", where=data.path)
    return {name: partial(_hub_rows, f"{data.path}/{stem}", found[name]) for name, stem in stems.items()}


def _hub_rows(name: str, table: datasets.Dataset | datasets.IterableDataset) -> Rows:
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            yield f"{name}:{number}", row
    except (OSError, DatasetsError) as error:
        message = f"the hub gives no more after this row: {next(iter(str(error).splitlines()), '')}"
        remedy = "try again, or with data.streaming=false, which keeps what has arrived"
        raise DataError(message, where=f"{name}:{number}", remedy=remedy) from error


def _file(folder: Path, name: str, stems: Mapping[str, str], form: str) -> Path:
    candidates = [folder / f"{stems[name]}.{suffix}" for suffix in ("jsonl.gz", "jsonl")]
    for file in candidates:
        if file.is_file():
            return file
    looked_for = " and ".join(map(str, candidates))
    holds = " and ".join(f"{stem}.jsonl.gz" for stem in stems.values())
    remedy = f"with data.format={form}, data.path is the folder that holds {holds}"
    raise DataError(f"no file of split {name}; looked for {looked_for}", where=str(folder), remedy=remedy)


def lines(file: Path) -> Rows:
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
