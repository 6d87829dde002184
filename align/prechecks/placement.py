"""From the ``placement`` of a recipe to slots, without touching a cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from align.config import ClusterConfig
from align.errors import ConfigError, PlacementError


def parse_slots(role: str, text: str) -> tuple[int, ...]:
    """``"0"``, ``"0-3"`` or ``"0,2-4"`` as slot numbers, in order and without repeats."""
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
    """Slots of every role; a role that is not named gets slot 0. Names of no role are refused."""
    roles = list(roles)
    if unknown := sorted(placement.keys() - set(roles)):
        raise ConfigError(
            f"placement: no role is called {', '.join(unknown)}", remedy=f"roles of this recipe: {', '.join(roles)}"
        )
    return {role: parse_slots(role, placement.get(role, "0")) for role in roles}


def machine_gpus() -> int:
    """NVIDIA GPUs of this machine that a Ray of our own would count; 0 where there are none, or others."""
    devices = len([*Path("/dev").glob("nvidia[0-9]*")])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if visible is None else min(devices, len([name for name in visible.split(",") if name.strip()]))


def require_machine(num_slots: int, cluster: ClusterConfig) -> None:
    """Raise `PlacementError` where a Ray that is started on this machine cannot have ``num_slots``. Where
    ``cluster.address`` names another, nothing is known before it is reached."""
    if cluster.address is not None:
        return
    cores, gpus = os.cpu_count() or 1, machine_gpus()
    slots = min(gpus or num_slots, cores * cluster.slots_per_core)  # a slot on a GPU needs a CPU of Ray as well
    if num_slots > slots:
        offer = f"{gpus} GPUs" if gpus and gpus == slots else f"{cores} cores with {cluster.slots_per_core} slots each"
        raise PlacementError(
            f"placement asks for {num_slots} slots, this machine offers {slots} ({offer})",
            remedy="let roles share slots, as in placement.reward=0; name a cluster by cluster.address=HOST:PORT, or "
            "submit by launchers/slurm.py" + ("" if gpus else "; on CPU raise cluster.slots_per_core"),
        )


def idle(slots: Mapping[str, tuple[int, ...]], there: int) -> str | None:
    """Which of the ``there`` slots no role uses, as a sentence; None where each has one."""
    used = sorted({slot for role in slots.values() for slot in role})
    left = there - len(used)
    return None if left <= 0 else f"placement uses {ranges(used)} only: {left} of {there} stay idle"


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
