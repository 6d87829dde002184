"""What a job needs before it is submitted: a checked recipe with absolute paths, and a copy of the code."""

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
from align.prechecks.roles import check_roles, role_configs, with_absolute_paths

ROOT = Path(__file__).resolve().parents[1]
PATH_KEYS = ("run.dir", "dir", "data.chat_template", "reference_cache")
"""Keys whose values are always paths."""


@dataclass(frozen=True)
class JobConfig:
    """A checked recipe or service, with absolute paths."""

    config: Any
    """A `RecipeConfig` or a `RewardServiceConfig`."""
    slots: dict[str, tuple[int, ...]]
    """Slots of each role; for a service, those of all replicas."""
    folder: Path
    """The folder of the run or service."""

    @property
    def num_slots(self) -> int:
        """Slots that the placement requires: the highest number plus one."""
        return max((1 + slot for role in self.slots.values() for slot in role), default=0)


def load_run(recipe: Path, overrides: Sequence[str], suffix: str = "", *, paths: bool = True) -> JobConfig:
    """Load a recipe, and check its placement, its run folder (with ``suffix`` appended to its name), and with ``paths``
    that what it reads exists. Raises `ConfigError`.

    Existing paths become absolute, because the run starts in the folder of its code.
    """
    loaded = load_recipe(recipe, overrides)
    config: Any = loaded.config
    slots = check_roles(config)
    config = replace(config, run=replace(config.run, dir=f"{config.run.dir}{suffix}"))
    prechecks.check(replace(loaded, config=config), here=False, paths=paths)
    roles = {name: with_absolute_paths(role) for name, role in role_configs(config).items()}
    config = _absolute_paths(replace(config, **roles))
    return JobConfig(config, slots, _log_folder(config.run.dir, "run.dir"))


def load_service(recipe: Path, overrides: Sequence[str], *, paths: bool = True) -> JobConfig:
    """Load a recipe of ``align serve reward``, and check its folder, and with ``paths`` what it reads. Raises
    `ConfigError`."""
    loaded = build_config(RewardServiceConfig, recipe, overrides)
    prechecks.check(loaded, here=False, paths=paths)
    config: RewardServiceConfig = loaded.config
    config = _absolute_paths(replace(config, reward=with_absolute_paths(config.reward)))
    replicas = config.replicas
    size = 1.0 if replicas.gpus is None else replicas.gpus
    slots = 0 if config.executor == "local" else max(replicas.shards, math.ceil(replicas.max * size))
    return JobConfig(config, {"reward": tuple(range(slots))}, _log_folder(config.dir, "dir"))


def _log_folder(folder: str, key: str) -> Path:
    if any(not character.isprintable() or character == "\\" for character in folder):
        raise ConfigError(f"{key}={folder!r} has characters that Slurm cannot write a log to")
    return Path(folder)


def _absolute_paths(config: Any) -> Any:
    """The config with absolute paths of everything that exists here."""
    for key, value in flatten_config(config).items():
        if isinstance(value, str) and _is_path(key, value):
            config = _replace_key(config, key.split("."), str(Path(value).expanduser().absolute()))
    return config


def _is_path(key: str, value: str) -> bool:
    if key == "run.resume":
        return value not in ("auto", "never")
    return bool(value) and (key in PATH_KEYS or (key.endswith(".path") and Path(value).expanduser().exists()))


def _replace_key(config: Any, names: Sequence[str], value: str) -> Any:
    """The config with one value replaced, however deep."""
    first, *rest = names
    return replace(config, **{first: _replace_key(getattr(config, first), rest, value) if rest else value})


def copy_code(folder: Path) -> None:
    """Copy the package and the files of the jobs as they are here, including uncommitted changes.

    ``revision.json`` beside them holds the git revision (null outside a repository) and whether the copy differs.
    """
    package = Path(align.__path__[0])
    shutil.copytree(package, folder / "align", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    revision = _git(package, "rev-parse", "HEAD")
    status = _git(package, "status", "--porcelain", "--untracked-files=all", "--", ".")
    description = {"git_revision": revision or None, "changed": bool(status)}
    (folder / "revision.json").write_text(json.dumps(description, indent=2) + "\n")


def _git(folder: Path, *arguments: str) -> str:
    """The output of git; empty without git or a repository."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
