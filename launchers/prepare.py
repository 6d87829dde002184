"""What a job needs before it is submitted: a recipe that can be run, with its paths in full, and a copy of the code."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import align
from align import prechecks
from align.config import RewardServiceConfig
from align.config.load import build_config, flatten_config, load_recipe
from align.errors import ConfigError
from align.prechecks.roles import cast_sections, check, located

ROOT = Path(__file__).resolve().parents[1]
ALWAYS_PATHS = ("run.dir", "dir", "data.chat_template", "reference_cache")
"""Keys of recipes and services that are files or folders wherever they have a value."""


@dataclass(frozen=True)
class Checked:
    """A recipe that can be run or a service that can be started, its paths in full."""

    config: Any
    """A `Recipe` or a `RewardService`."""
    slots: dict[str, tuple[int, ...]]
    """Slots of each role; those of all replicas of a service."""
    folder: Path
    """The folder of the run or the service."""

    @property
    def num_slots(self) -> int:
        """Slots of the cluster that the placement asks for: the highest number plus one."""
        return max((1 + slot for role in self.slots.values() for slot in role), default=0)


def validate(recipe: Path, overrides: Sequence[str], suffix: str = "", *, paths: bool = True) -> Checked:
    """Load a recipe, check its placement and its run folder, to whose name ``suffix`` is added, and with ``paths`` that
    what it reads is there. Raises `ConfigError`.

    Paths of what exists here are written in full, because the run begins in the folder of its code.
    """
    loaded = load_recipe(recipe, overrides)
    found: Any = loaded.config
    slots = check(found)
    found = replace(found, run=replace(found.run, dir=f"{found.run.dir}{suffix}"))
    prechecks.check(replace(loaded, config=found), here=False, paths=paths)
    found = _in_full(replace(found, **{name: located(section) for name, section in cast_sections(found).items()}))
    folder = _writable(found.run.dir, "run.dir")
    return Checked(found, slots, folder)


def validate_service(recipe: Path, overrides: Sequence[str], *, paths: bool = True) -> Checked:
    """Load what `align serve reward` reads, and check its folder and, with ``paths``, what it reads. Raises
    `ConfigError`."""
    loaded = build_config(RewardServiceConfig, recipe, overrides)
    prechecks.check(loaded, here=False, paths=paths)
    found: RewardServiceConfig = loaded.config
    found = _in_full(replace(found, reward=located(found.reward)))
    folder = _writable(found.dir, "dir")
    replicas = found.replicas
    each = 1.0 if replicas.gpus is None else replicas.gpus
    slots = 0 if found.executor == "local" else max(replicas.shards, math.ceil(replicas.max * each))
    return Checked(found, {"reward": tuple(range(slots))}, folder)


def _writable(folder: str, key: str) -> Path:
    if any(not character.isprintable() or character == "\\" for character in folder):
        raise ConfigError(f"{key}={folder!r} has characters that Slurm cannot write a log to")
    return Path(folder)


def _in_full(found: Any) -> Any:
    """The configuration with the paths of what exists here written in full: a job begins in the folder of its code."""
    for key, value in flatten_config(found).items():
        if isinstance(value, str) and _is_path(key, value):
            found = _changed(found, key.split("."), str(Path(value).expanduser().absolute()))
    return found


def _is_path(key: str, value: str) -> bool:
    if key == "run.resume":
        return value not in ("auto", "never")
    return bool(value) and (key in ALWAYS_PATHS or (key.endswith(".path") and Path(value).expanduser().exists()))


def _changed(section: Any, names: Sequence[str], value: str) -> Any:
    """A section with one value replaced, however deep."""
    first, *rest = names
    return replace(section, **{first: _changed(getattr(section, first), rest, value) if rest else value})


def copy_code(folder: Path) -> None:
    """Copy the package as it lies here, changes that are not committed included, and the files of the jobs.

    ``revision.json`` beside them holds the git revision, null where there is none, and whether the copy differs.
    """
    package = Path(align.__path__[0])
    shutil.copytree(package, folder / "align", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    revision = _git(package, "rev-parse", "HEAD")
    status = _git(package, "status", "--porcelain", "--untracked-files=all", "--", ".")
    facts = {"git_revision": revision or None, "changed": bool(status)}
    (folder / "revision.json").write_text(json.dumps(facts, indent=2) + "\n")


def _git(folder: Path, *arguments: str) -> str:
    """What git says, nothing where it or a repository is missing."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
