"""The first checks of a command, before torch is imported: what it reads, where it writes, and its placement.

They take well under a second. Checks that open tokenizers, models and data are in `align.prepare`.
"""

from __future__ import annotations

from pathlib import Path

from align.config import ClusterConfig, RecipeConfig, RewardServiceConfig, RoleConfig
from align.config.load import LoadedConfig
from align.config.schema_types import field_types, sections_in
from align.errors import AlignError, ConfigError, PlacementError
from align.prechecks import folders, functions, placement, roles, sources
from align.utils.security import require_private


def check(loaded: LoadedConfig, *, here: bool = True, paths: bool = True) -> None:
    """Check what a command would read (``paths``), where it writes, and its placement. ``here``: the command runs on
    this machine, so its slots are counted too.

    Raises `ConfigError` with every problem, each with its key, place and remedy, or `PlacementError`.
    """
    config = loaded.config
    absent = config.absent() if isinstance(config, RecipeConfig) else set()
    if getattr(config, "scores", ""):
        absent = {"reward"}
    problems: list[AlignError] = []
    if paths:
        problems += sources.missing(sources.sources(config, absent), loaded.origin)
        problems += functions.missing(config, absent, loaded.origin)
    for check_part in (_check_folder, _check_placement, _check_dtype) if here else (_check_folder,):
        try:
            check_part(loaded)
        except (ConfigError, PlacementError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [f"{len(problems)} problems", *map(str, problems)]
        raise ConfigError("\n".join(lines), where=f"{loaded.recipe}")


def _check_folder(loaded: LoadedConfig) -> None:
    config = loaded.config
    if isinstance(config, RecipeConfig):
        folders.check_run_folder(config.run)
        return
    key = "dir" if isinstance(config, RewardServiceConfig) else "out"
    folder = Path(getattr(config, key)).expanduser()
    if getattr(config, key):
        folders.require_writable(folder.absolute(), key)
    if isinstance(config, RewardServiceConfig):
        require_private(folder)


def _check_placement(loaded: LoadedConfig) -> None:
    config = loaded.config
    if isinstance(config, RewardServiceConfig):
        if config.executor == "ray" and config.replicas.shards > 1:
            placement.require_machine(config.replicas.shards, ClusterConfig(slots_per_core=config.replicas.shards))
        return
    if isinstance(config, RecipeConfig):
        slots = roles.check_roles(config)
    else:
        types = field_types(type(config)).items()
        names = [name for name, hint in types if any(issubclass(item, RoleConfig) for item in sections_in(hint))]
        all_slots = placement.resolve(config.placement, names)  # a recipe may place a role that is absent
        slots = {name: all_slots[name] for name in names if getattr(config, name) is not None}
    if config.executor == "ray" and slots:
        num_slots = 1 + max(slot for role_slots in slots.values() for slot in role_slots)
        placement.require_machine(num_slots, config.cluster)


def _check_dtype(loaded: LoadedConfig) -> None:
    if isinstance(loaded.config, RecipeConfig):
        roles.dtype_notes(loaded)
