"""What is checked first, before torch is imported: that what is read is there, that what is written can be, placement.

Everything here takes well under a second. The checks that open tokenizers, models and data are in `align.prepare`.
"""

from __future__ import annotations

from pathlib import Path

from align.config import Loaded
from align.errors import AlignError, ConfigError, PlacementError
from align.prechecks import folders, functions, placement, precision, roles, sources
from align.private import require_private
from align.sections import Cluster, Model, Recipe, RewardService


def check(loaded: Loaded, *, here: bool = True, paths: bool = True) -> None:
    """Check what a command would read (``paths``), where it writes, and its placement. ``here``: it runs on this
    machine, whose slots are counted too.

    Raises `ConfigError` with everything that is missing, each with its key, its place and a remedy, and
    `PlacementError`.
    """
    config = loaded.config
    absent = config.absent() if isinstance(config, Recipe) else set()
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


def _folder(loaded: Loaded) -> None:
    config = loaded.config
    if isinstance(config, Recipe):
        folders.check_run_folder(config.run)
        return
    key = "dir" if isinstance(config, RewardService) else "out"
    folder = Path(getattr(config, key)).expanduser()
    if getattr(config, key):
        folders.require_writable(folder.absolute(), key)
    if isinstance(config, RewardService):
        require_private(folder)


def _placement(loaded: Loaded) -> None:
    config = loaded.config
    if isinstance(config, RewardService):
        if config.executor == "ray" and config.replicas.shards > 1:
            placement.require_machine(config.replicas.shards, Cluster(slots_per_core=config.replicas.shards))
        return
    if isinstance(config, Recipe):
        slots = roles.check(config)
    else:
        names = {name: one for name, one in vars(config).items() if isinstance(one, Model)}
        every = placement.resolve(config.placement, names)
        slots = {name: every[name] for name, one in names.items() if one.path or getattr(one, "present", True)}
    if config.executor == "ray" and slots:
        placement.require_machine(1 + max(slot for role in slots.values() for slot in role), config.cluster)


def _dtype(loaded: Loaded) -> None:
    if isinstance(loaded.config, Recipe):
        precision.dtype_notes(loaded)
