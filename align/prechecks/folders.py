"""Whether a folder can be written to, and whether a run may start or resume there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from align.config import RunConfig
from align.errors import ConfigError
from align.utils.security import require_private

STOP_FILE = "STOP"
BEFORE_A_RUN = re.compile(r"launch|logs|lock|attempt-[0-9]+|\..+\.partial")
"""Files that a run folder may hold before the run starts: a launcher's, and those of earlier attempts."""
FOLDERS = ("checkpoints", "best", "logs", "tensorboard", "bundles")
"""Entries of a run folder that must be folders."""


def check_no_stop_file(folder: Path) -> None:
    """Raise `ConfigError` if a run that starts would stop at once."""
    path = folder / STOP_FILE
    if os.path.lexists(path):
        raise ConfigError(
            f"run.dir={folder} holds the file {STOP_FILE}, which asks a run to stop", remedy=f"remove {path} to go on"
        )


def require_writable(folder: Path, key: str) -> None:
    """Raise `ConfigError` if a folder cannot be made or written to."""
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    remedy = f"choose another {key}"
    if not nearest.is_dir():
        raise ConfigError(f"{key}={folder} cannot be made: {nearest} is not a folder", remedy=remedy)
    if not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"this process (user {os.geteuid()}) may not write to {nearest}"
        remedy = f"{remedy}, or let this user write there: its mode is {nearest.stat().st_mode & 0o777:o}, its owner "
        raise ConfigError(f"{key}={folder}: {problem}", remedy=f"{remedy}{nearest.stat().st_uid}")


def check_run_folder(section: RunConfig) -> bool:
    """Whether ``run.dir`` already holds a run. Raises `ConfigError` if it holds something else, or must be empty."""
    path = Path(section.dir).expanduser().absolute()
    require_writable(path, "run.dir")
    check_no_stop_file(path)
    try:
        names = [name for name in os.listdir(path) if not BEFORE_A_RUN.fullmatch(name)] if path.is_dir() else []
    except OSError as error:
        remedy = "let this user read it, or choose another run.dir"
        raise ConfigError(f"run.dir={path} cannot be read: {error.strerror}", remedy=remedy) from error
    is_run = "identity.json" in names or any(path.glob("checkpoints/step-*"))
    if names and section.resume == "never":
        remedy = "choose another run.dir, or let run.resume be auto"
        raise ConfigError(f"run.dir={path} is not empty", remedy=remedy)
    if names and not is_run:
        remedy = "choose another run.dir, or move its files away"
        problem = "is not empty, and does not hold a run: it has no identity.json"
        raise ConfigError(f"run.dir={path} {problem}", remedy=remedy)
    for place in (path / name for name in FOLDERS):
        if os.path.lexists(place) and not place.is_dir():
            raise ConfigError("is not a folder", where=str(place), remedy="move it away")
    require_private(path)
    return is_run
