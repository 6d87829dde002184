"""Folders that nobody else may write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from align.errors import ConfigError


def require_private(folder: Path) -> None:
    """Refuse a run folder into which somebody else could put files: a run resumes from what lies there.

    A folder that does not exist is none. Raises `ConfigError` where the folder, or what a link of that name leads to,
    belongs to another user or is writable for its group or for all.
    """
    try:
        found = folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{error.strerror}", where=f"{folder}", remedy="choose another run.dir") from error
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}",
            where=f"{folder}",
            remedy="choose another run.dir, or let its owner run this",
        )
    if others := found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{'everybody' if others & stat.S_IWOTH else 'its group'} may write to it (mode {found.st_mode & 0o777:o})",
            where=f"{folder}",
            remedy=f"see that all files in it are yours, then chmod go-w {folder}",
        )
