"""Slots of roles from the ``placement`` of a recipe, without connecting to a cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from align.config import ClusterConfig
from align.errors import ConfigError, PlacementError


def parse_slots(role: str, text: str) -> tuple[int, ...]:
    """The slot numbers of ``"0"``, ``"0-3"`` or ``"0,2-4"``, in order. Raises `ConfigError`."""
    slots: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(
                f"placement.{role}: cannot read {text!r} as slots", remedy="write 0, 0-3 or 0,2 (slots count from 0)"
            )
        slots += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(slots)) != len(slots):
        raise ConfigError(f"placement.{role}: {text!r} names a slot twice", remedy="name each slot once")
    return tuple(slots)


def resolve(placement: Mapping[str, str], roles: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Slots of every role; slot 0 if ``placement`` does not name it. Raises `ConfigError` for unknown roles."""
    roles = list(roles)
    if unknown := sorted(placement.keys() - set(roles)):
        raise ConfigError(
            f"placement: no role is called {', '.join(unknown)}", remedy=f"roles of this recipe: {', '.join(roles)}"
        )
    return {role: parse_slots(role, placement.get(role, "0")) for role in roles}


def machine_gpus() -> int:
    """NVIDIA GPUs of this machine that Ray would count; 0 without GPUs or with those of another vendor."""
    devices = len([*Path("/dev").glob("nvidia[0-9]*")])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if visible is None else min(devices, len([name for name in visible.split(",") if name.strip()]))


def require_machine(num_slots: int, cluster: ClusterConfig) -> None:
    """Raise `PlacementError` if Ray on this machine cannot have ``num_slots``. The slots of a cluster that
    ``cluster.address`` names are only known once it is reached."""
    if cluster.address is not None:
        return
    cores, gpus = os.cpu_count() or 1, machine_gpus()
    slots = min(gpus or num_slots, cores * cluster.slots_per_core)  # a slot on a GPU needs a CPU of Ray as well
    if num_slots > slots:
        available = f"{cores} cores with {cluster.slots_per_core} slots each"
        if gpus and gpus == slots:
            available = f"{gpus} GPUs"
        raise PlacementError(
            f"placement requires {num_slots} slots, but this machine has {slots} ({available})",
            remedy="let roles share slots, as placement.reward=0; give a cluster, cluster.address=HOST:PORT; or submit "
            "with launchers/slurm.py" + ("" if gpus else "; on CPU raise cluster.slots_per_core"),
        )


def idle(slots: Mapping[str, tuple[int, ...]], total: int) -> str | None:
    """A sentence on slots, of ``total``, that no role uses; None if there are none."""
    used = sorted({slot for role in slots.values() for slot in role})
    unused = total - len(used)
    return None if unused <= 0 else f"placement uses {ranges(used)} only: {unused} of {total} stay idle"


def ranges(used: Sequence[int]) -> str:
    """``slot 0``, or ``slots 0-3,6``."""
    parts: list[list[int]] = []
    for slot in used:
        if parts and slot == parts[-1][1] + 1:
            parts[-1][1] = slot
        else:
            parts.append([slot, slot])
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
    return f"slot {text}" if len(used) == 1 else f"slots {text}"
