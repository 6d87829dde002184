"""What is checked first, before torch is imported: that what is read is there, that what is written can be, placement.

Everything here takes well under a second. The checks that open tokenizers, models and data are in `align.prepare`.
"""

from __future__ import annotations

from pathlib import Path

from align.config import ClusterConfig, ModelConfig, RecipeConfig, RewardServiceConfig
from align.config.load import LoadedConfig
from align.errors import AlignError, ConfigError, PlacementError
from align.prechecks import folders, functions, placement, precision, roles, sources
from align.utils.security import require_private


def check(loaded: LoadedConfig, *, here: bool = True, paths: bool = True) -> None:
    """Check what a command would read (``paths``), where it writes, and its placement. ``here``: it runs on this
    machine, whose slots are counted too.

    Raises `ConfigError` with everything that is missing, each with its key, its place and a remedy, and
    `PlacementError`.
    """
    config = loaded.config
    absent = config.absent() if isinstance(config, RecipeConfig) else set()
    if getattr(config, "scores", ""):
        absent = {"reward"}
    faults: list[AlignError] = []
    if paths:
        faults += sources.missing(sources.sources(config, absent), loaded.origin)
        named = functions.functions(config, absent)
        faults += filter(None, (functions.problem(key, name, loaded.origin.get(key)) for key, name in named))
    for check_one in (_folder, _placement, _dtype) if here else (_folder,):
        try:
            check_one(loaded)
        except (ConfigError, PlacementError) as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        lines = [f"{len(faults)} faults", *map(str, faults)]
        raise ConfigError("\n".join(lines), where=f"{loaded.recipe}")


def _folder(loaded: LoadedConfig) -> None:
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


def _placement(loaded: LoadedConfig) -> None:
    config = loaded.config
    if isinstance(config, RewardServiceConfig):
        if config.executor == "ray" and config.replicas.shards > 1:
            placement.require_machine(config.replicas.shards, ClusterConfig(slots_per_core=config.replicas.shards))
        return
    if isinstance(config, RecipeConfig):
        slots = roles.check(config)
    else:
        names = {name: one for name, one in vars(config).items() if isinstance(one, ModelConfig)}
        every = placement.resolve(config.placement, names)
        slots = {name: every[name] for name, one in names.items() if one.path or getattr(one, "present", True)}
    if config.executor == "ray" and slots:
        placement.require_machine(1 + max(slot for role in slots.values() for slot in role), config.cluster)


def _dtype(loaded: LoadedConfig) -> None:
    if isinstance(loaded.config, RecipeConfig):
        precision.dtype_notes(loaded)
