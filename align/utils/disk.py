"""Files and folders that are written whole or not at all, and what a user can do about a disk that refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from align.errors import AlignError, ConfigError, SaveError

CHUNK_BYTES = 2**20
"""Hashed and then written while it is still in the processor's cache."""
FULL = {errno.ENOSPC, errno.EDQUOT}
PROTECTED = {errno.EROFS, errno.EACCES, errno.EPERM}
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
"""A folder, a link or a pipe lies where a file must go, or the reverse."""
INFRASTRUCTURE = {*FULL, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
"""What a retry may get past, on another machine or when someone has made room."""
_RUST = re.compile(r"\(os error ([0-9]+)\)")
"""How safetensors and tokenizers, which are written in Rust, end the text of what the system refused."""


def error_number(error: BaseException) -> int | None:
    """The errno of what the system refused; 0 for an OSError without one, None for an error of another kind."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST.search(str(error))
    return int(match[1]) if match else None


def is_infrastructure(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is a disk that is full, read-only or broken."""
    chain: BaseException | None = error
    while chain is not None:
        if error_number(chain) in INFRASTRUCTURE:
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def refused(error: BaseException, path: Path | None) -> AlignError:
    """What the system refused at ``path``, as an error with a remedy: `ConfigError` where something else lies there,
    else `SaveError`."""
    number, kind = error_number(error), SaveError
    remedy = "check the file system; checkpoints published before are untouched"
    if number in FULL:
        remedy = "free space or inodes there, or keep fewer checkpoints (checkpoint.keep_latest, keep_best, keep_every)"
    elif number == errno.EFBIG:
        remedy = "raise the limit on the size of a file (ulimit -f), or write to another file system"
    elif number in PROTECTED:
        remedy = "let this user write there"
    elif number in IN_THE_WAY:
        kind, remedy = ConfigError, "move away what lies there"
    where = getattr(error, "filename", None) or path
    text = getattr(error, "strerror", None) or str(error)
    return kind(f"cannot be written: {text}", where=None if where is None else str(where), remedy=remedy)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the system refuses into the error of `refused`. An error of another kind passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, AlignError) or error_number(error) is None:
            raise
        raise refused(error, path) from error


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Raises `ConfigError` where it cannot be read, or is a folder, a pipe or a
    device, which would block; `SaveError` for a fault of the disk."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "is no regular file", str(path))
            yield file
    except OSError as error:
        kind = SaveError if error.errno in INFRASTRUCTURE else ConfigError
        remedy = "let this user read it, or move it away"
        raise kind(f"cannot be read: {error.strerror}", where=str(error.filename or path), remedy=remedy) from error


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder with everything below it to the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def write_new(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o600) -> tuple[int, str]:
    """Write a file that is not there yet and bring it to the disk; returns size and sha256. Raises OSError."""
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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in place of what is there: beside its name, synced, renamed. Raises as `saving` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with saving(path):
        try:
            temporary.unlink(missing_ok=True)
            write_new(temporary, [content.encode() if isinstance(content, str) else content], 0o666)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def new_folder(out: Path, seal: Callable[[Path], None] = sync_tree) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and is deleted when it does not.

    ``seal`` brings its content to the disk before the rename. Raises as `saving` does, and FileExistsError, as
    `SaveError`, where ``out`` is there already.
    """
    temporary = out.with_name(f"{out.name}.partial")
    with saving(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            seal(temporary)
            os.rename(temporary, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
