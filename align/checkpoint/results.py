"""Model folders that are published as a result: ``final``, ``best``, output of `align merge` and `align convert`.

``align_manifest.json`` lists each file of the model with size and sha256. It is written after the files are synced and
before the folder gets its final name, so a folder that matches it is complete. Loaders of transformers and vLLM open
files by name and ignore it. Files that a user adds later are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from align.checkpoint.files import FileRecord
from align.checkpoint.manifest import READERS, DamagedError, read_records, sealed, sha256_of, unsealed
from align.errors import AlignError, ModelError
from align.utils.atomic_write import new_folder, sync_folder, write_new
from align.utils.disk import open_file

RESULT_MANIFEST = "align_manifest.json"
RESULT_SCHEMA = 1
"""Version of this manifest."""


@contextmanager
def new_result(out: Path) -> Iterator[Path]:
    """A new folder that becomes ``out``, with a manifest, if the block ends without an error, and is deleted otherwise.

    Raises `ModelError` if ``out`` exists, `SaveError` if the disk refuses.
    """
    if os.path.lexists(out):
        raise ModelError(f"{out} exists already", remedy="name a folder that does not exist")
    with new_folder(out, _seal) as temporary:
        yield temporary


def _seal(folder: Path) -> None:
    """Sync all files, and write the manifest that lists them."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(lambda name: _synced(folder, name), names))
    content = {"schema": RESULT_SCHEMA, "files": [asdict(record) for record in records]}
    write_new(folder / RESULT_MANIFEST, [sealed(content).encode()], 0o666)
    for place in sorted({folder, *((folder / name).parent for name in names)}):
        sync_folder(place)


def _synced(folder: Path, name: str) -> FileRecord:
    with open(folder / name, "rb") as file:
        os.fsync(file.fileno())
        return FileRecord(name, os.fstat(file.fileno()).st_size, sha256_of(file))


def verify_result(folder: Path) -> None:
    """Raise `DamagedError`, which names the file, unless every file of a result matches its manifest."""
    try:
        with open_file(folder / RESULT_MANIFEST) as file:
            content = unsealed(file.read())
        if content.get("schema") != RESULT_SCHEMA:
            raise ValueError(f"has schema {content.get('schema')!r}, and this version of align reads {RESULT_SCHEMA}")
        records = read_records(content.get("files"))
    except (AlignError, ValueError) as error:
        reason = error.message if isinstance(error, AlignError) else str(error)
        raise DamagedError(RESULT_MANIFEST, reason) from error
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda record: _require_file(folder, record), records))


def _require_file(folder: Path, record: FileRecord) -> None:
    try:
        with open_file(folder / record.name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                raise DamagedError(record.name, f"has {size} bytes, the manifest says {record.size}")
            if sha256_of(file) != record.sha256:
                raise DamagedError(record.name, "its sha256 is not that of the manifest")
    except AlignError as error:
        raise DamagedError(record.name, error.message) from error
