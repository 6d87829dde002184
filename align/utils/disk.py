"""Errors of the disk as messages with a remedy, and files that are safe to open."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from align.errors import AlignError, ConfigError, SaveError

FULL = {errno.ENOSPC, errno.EDQUOT}
PROTECTED = {errno.EROFS, errno.EACCES, errno.EPERM}
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
"""A folder, a link or a pipe is where a file must go, or the reverse."""
INFRASTRUCTURE = {*FULL, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
"""A retry may succeed: on another machine, or after someone has made room."""
_RUST = re.compile(r"\(os error ([0-9]+)\)")
"""How errors of safetensors and tokenizers, which are written in Rust, end the text of a refused system call."""


def error_number(error: BaseException) -> int | None:
    """The errno of a refused system call; 0 for an OSError without one, None for another error."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST.search(str(error))
    return int(match[1]) if match else None


def is_infrastructure(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is a disk that is full, read-only or broken."""
    chain: BaseException | None = error
    while chain is not None:
        if error_number(chain) in INFRASTRUCTURE:
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def refused(error: BaseException, path: Path | None) -> AlignError:
    """A refused write to ``path`` as an error with a remedy: `ConfigError` if something else is in the way, else
    `SaveError`."""
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
    """Raise a refused write as the error of `refused`. Other errors pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, AlignError) or error_number(error) is None:
            raise
        raise refused(error, path) from error


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises `ConfigError` if it cannot be read, or is a folder, a pipe or a device, which would block; `SaveError` for a
    fault of the disk.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            yield file
    except OSError as error:
        kind = SaveError if error.errno in INFRASTRUCTURE else ConfigError
        remedy = "let this user read it, or move it away"
        raise kind(f"cannot be read: {error.strerror}", where=str(error.filename or path), remedy=remedy) from error
