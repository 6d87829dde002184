"""From the ``placement`` of a recipe to slots, without touching a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from align.errors import ConfigError


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
