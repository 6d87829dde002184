"""Fault injection, for tests and drills.

    ALIGN_FAULT=role=critic,rank=0,phase=update,step=3,kind=sigkill align train ...

Only the driver reads the variable. ``role`` is a role of the recipe or ``driver``; ``rank`` (default 0) is one of its
ranks; ``phase`` is a phase as in ``seconds/`` of ``metrics.jsonl``, ``start`` or ``load`` while roles start, or a point
of the driver's own work (`POINTS`); ``step`` counts from 1, and 0 is before the first. Keys that are left out match
everything. The fault is injected at the ``at``-th match (default 1), ``times`` times (default 1).

Without the variable, every function below costs one comparison with None.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass, fields

from align.errors import ConfigError

SIGNALS = {
    "sigkill": signal.SIGKILL,
    "sigstop": signal.SIGSTOP,
    "sigterm": signal.SIGTERM,
    "sigint": signal.SIGINT,
    "sighup": signal.SIGHUP,
    "sigusr1": signal.SIGUSR1,
    "sigusr2": signal.SIGUSR2,
}
"""Kinds that send this signal to the own process."""
REFUSALS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS, "eacces": errno.EACCES}
"""Kinds that raise the OSError of this number."""
NUMBERS = {"nan": float("nan"), "inf": float("inf")}
"""``nan_loss``, ``inf_gradient``, ``nan_answer``, ...: what a loss, a gradient or an answer becomes."""
CORRUPTIONS = tuple(f"{number}_{what}" for number in NUMBERS for what in ("loss", "gradient", "answer"))
OTHERS = ("exit", "error", "oom", "hang", "spin", "gil", "slow")
KINDS = (*SIGNALS, *REFUSALS, *CORRUPTIONS, *OTHERS)
POINTS = ("step", "metrics", "checkpoint", "shard", "manifest", "publish", "retain")
"""Points of the driver's own work: start of a step; append of a line; start of a checkpoint, write of one of its files
and of its manifest; its publication; deletion of old ones. ``publish`` matches several times in a row, so that ``at``
selects each system call of the publication."""
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Fault:
    """Which fault, where and when."""

    kind: str
    role: str | None = None
    rank: int = 0
    phase: str | None = None
    step: int | None = None
    at: int = 1
    times: int = 1


class _Armed:
    """The fault that is armed in this process."""

    fault: Fault | None = None
    fits = 0
    corruption: str | None = None
    """The number that this process corrupts next."""


def parse_fault(text: str) -> Fault:
    """Parse ``key=value,...``. Raises `ConfigError` that names the part that cannot be parsed."""
    values: dict[str, str] = {}
    types = {field.name: str(field.type) for field in fields(Fault)}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        number = "int" in types.get(key, "")
        if key not in types or not value or (number and not value.isdigit()):
            remedy = f"write key=value, divided by commas; keys: {', '.join(types)}"
            raise ConfigError(f"ALIGN_FAULT: cannot read {part!r}", remedy=remedy)
        values[key] = value
    if values.get("role") == "driver" and values.get("phase") not in (None, *POINTS):
        raise ConfigError(f"ALIGN_FAULT: the driver has no phase {values['phase']!r}, only {', '.join(POINTS)}")
    if values.get("kind") not in KINDS:
        raise ConfigError(f"ALIGN_FAULT: kind {values.get('kind')!r} is none of {', '.join(KINDS)}")
    return Fault(**{key: int(value) if "int" in types[key] else value for key, value in values.items()})  # type: ignore[arg-type]


def arm(text: str | None) -> None:
    """Arm the fault that ``text`` describes, or none."""
    _Armed.fault, _Armed.fits, _Armed.corruption = parse_fault(text) if text else None, 0, None


def next_fault(role: str, rank: int, phase: str, step: int) -> str | None:
    """The kind of fault to inject here and now, if any; counts the match."""
    fault = _Armed.fault
    if fault is None:
        return None
    fits = (
        fault.role in (None, role)
        and fault.rank == rank
        and fault.phase in (None, phase, phase.removeprefix(f"{role}_"))  # update of the critic is critic_update
        and fault.step in (None, step)
    )
    if not fits:
        return None
    _Armed.fits += 1
    return fault.kind if fault.at <= _Armed.fits < fault.at + fault.times else None


def maybe_inject(role: str, rank: int, phase: str, step: int) -> None:
    """Inject the armed fault in this process if it matches."""
    kind = next_fault(role, rank, phase, step)
    if kind is not None:
        raise_fault(kind)


def raise_fault(kind: str) -> None:
    """Inject a fault in this process. Kinds in `CORRUPTIONS` take effect in `corrupt`."""
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    elif kind in REFUSALS:
        raise OSError(REFUSALS[kind], os.strerror(REFUSALS[kind]))
    elif kind in CORRUPTIONS:
        _Armed.corruption = kind
    elif kind == "exit":
        os._exit(1)
    elif kind == "error":
        raise RuntimeError("a fault on purpose (ALIGN_FAULT)")
    elif kind == "oom":
        raise MemoryError("a fault on purpose (ALIGN_FAULT)")
    elif kind == "gil":
        ctypes.PyDLL(None).pause()  # holds the interpreter lock until a signal arrives
    elif kind == "slow":
        time.sleep(SLOW_SECONDS)
    while kind in ("hang", "spin"):
        time.sleep(3600.0 if kind == "hang" else 0.0)


def corrupt(what: str) -> float | None:
    """The number that replaces a ``loss``, ``gradient`` or ``answer``, once; None without a fault."""
    kind = _Armed.corruption
    if kind is None or not kind.endswith(what):
        return None
    _Armed.corruption = None
    return NUMBERS[kind.partition("_")[0]]
