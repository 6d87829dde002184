"""Atomic writes: a file or folder has its old content or its new content, also after a kill or a loss of power.

One rule for all: write beside the final name, fsync, rename, fsync the folder. Errors are those of `disk.saving`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from align.utils.disk import saving

CHUNK_BYTES = 2**20
"""Hashed and then written while it is still in the processor's cache."""


def sync_folder(folder: Path) -> None:
    """fsync a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync a folder and everything below it."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def rename_synced(path: Path, final: Path) -> None:
    """Give a synced file or folder its final name, and fsync the folder that holds it. Raises OSError."""
    os.replace(path, final)
    sync_folder(final.parent)


def write_new(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o600) -> tuple[int, str]:
    """Write and fsync a file that does not exist yet; returns size and sha256. Raises OSError."""
    size, digest = 0, hashlib.sha256()
    with open(path, "xb", opener=partial(os.open, mode=mode)) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with saving(path):
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename_synced(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file by ``content``; text is UTF-8."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(out: Path, seal: Callable[[Path], None] = sync_tree) -> Iterator[Path]:
    """A new folder that becomes ``out`` when the block ends without an error, and is deleted otherwise.

    ``seal`` fsyncs its content before the rename. Raises `SaveError` if ``out`` exists and is not an empty folder.
    """
    temporary = out.with_name(f"{out.name}.partial")
    with saving(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            seal(temporary)
            rename_synced(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; nothing if there is no source, or there is a target."""
    if source.is_dir() and not target.exists():
        with new_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
