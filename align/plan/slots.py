"""Slots with the same roles, and the bytes of all their roles together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.plan.gpu import PHASES, RoleMemory


@dataclass(frozen=True)
class SlotGroup:
    """Slots that hold the same roles."""

    slots: tuple[int, ...]
    roles: tuple[RoleMemory, ...]

    def at(self, phase: str) -> float:
        """Bytes of a slot in a phase. Of the roles that work in it one works at a time, and each gives its caches back
        before the next: the sum of what they hold while idle, and the largest addition of a role that works."""
        idle = sum(sum(role.idle.values()) for role in self.roles)
        added = [sum(role.at(phase).values()) - sum(role.idle.values()) for role in self.roles]
        return idle + max(added, default=0.0)

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with most bytes, and these."""
        return max(((phase, self.at(phase)) for phase in PHASES), key=lambda item: item[1])


def slot_groups(memory: Mapping[str, RoleMemory], slots: Mapping[str, Sequence[int]]) -> list[SlotGroup]:
    """All slots in groups of equal roles, in the order of their first slot. Slots without weights are left out."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for slot in sorted({slot for role in slots.values() for slot in role}):
        names = tuple(name for name in memory if slot in slots[name])
        groups.setdefault(names, []).append(slot)
    return [
        SlotGroup(tuple(members), tuple(memory[name] for name in names)) for names, members in groups.items() if names
    ]
