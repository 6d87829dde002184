"""Where workers stand: stacks that they write into their logs on a signal, and what the stacks say about a hang."""

from __future__ import annotations

import re
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import align
from align.cluster import actor
from align.cluster.actor import Member, signal_all
from align.cluster.process import STACKS

WAIT_S = 3.0
"""Seconds for stacks to arrive; a shared file system may show a new size late."""
SETTLED_S = 0.3
"""Seconds without growth after which a stack is complete."""
LINE = re.compile(r'  File "(?P<path>[^"]*)", line (?P<line>\d+) in (?P<function>.+)')
PACKAGE = str(Path(align.__file__).parent)
INSTALLED = tuple({*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), "<"})
COLLECTIVE = re.compile(r"/(torch/distributed|deepspeed/comm)/")
"""Files whose functions wait for peers."""


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    path: str
    line: int
    function: str

    @property
    def ours(self) -> bool:
        """Whether it is of this package or of a user's own file, not of an installed library."""
        return self.path.startswith(PACKAGE) or not self.path.startswith(INSTALLED)

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(Path(self.path).parts[-3:])}:{self.line})"


@dataclass(frozen=True)
class Standing:
    """What a worker was at when it was asked."""

    member: Member
    frames: tuple[Frame, ...]
    """Of the thread that works, innermost first; empty when no thread works."""
    reacted: bool
    """Whether it wrote its stacks."""
    state: str
    """State letter of its process, see `align.cluster.process.state`; empty when that is not known."""

    @property
    def own(self) -> Frame | None:
        """The innermost frame outside of installed libraries."""
        return next((frame for frame in self.frames if frame.ours), None)

    @property
    def collective(self) -> Frame | None:
        """The call in which it waits for its peers."""
        inner = self.frames[: self.frames.index(self.own)] if self.own else self.frames
        waits = [frame for frame in inner if COLLECTIVE.search(frame.path) and frame.function != "wrapper"]
        return waits[-1] if waits else None

    @property
    def busy(self) -> bool:
        """Whether it works on a call; one that does not react counts."""
        return bool(self.frames) or not self.reacted

    @property
    def briefly(self) -> str:
        """What it is at, in a few words."""
        if self.member.place is None:
            return "its process has not come up"
        if not self.reacted:
            why = {
                "T": "it is stopped (SIGSTOP)",
                "D": "it waits for a disk",
                "Z": "it has ended",
                "": "nor does its node",
            }
            return f"it does not react: {why.get(self.state, f'process state {self.state}')}"
        if not self.frames:
            return "it waits for work"
        waits = f", waits for its peers in {self.collective.function}" if self.collective else ", in no collective call"
        return f"in {self.own or self.frames[0]}{waits}"

    def __str__(self) -> str:
        return f"{self.member.name}: {self.briefly}"


def dump(members: Sequence[Member]) -> list[Standing]:
    """Have every worker write its stacks into its log, and read them there."""
    sizes = [_size(member.log) for member in members]
    states = signal_all(members, STACKS)
    able = [states.get(member.name, "") not in ("", "T", "Z") for member in members]
    logs = [(one.log, size) for one, size, reacts in zip(members, sizes, able, strict=True) if reacts]
    _settle([log for log, _ in logs], [size for _, size in logs])
    standings = []
    for member, size in zip(members, sizes, strict=True):
        text = _read(member.log, size)
        state = states.get(member.name, "")
        standings.append(Standing(member, parse(text), LINE.search(text) is not None, state))
    return standings


def slowest(standings: Iterable[Standing]) -> list[Standing]:
    """Whom the others wait for: those that do not react; else those at work and not in a collective call; else, in a
    deadlock, all at work."""
    busy = [one for one in standings if one.busy]
    silent = [one for one in busy if not one.reacted]
    return silent or [one for one in busy if one.collective is None] or busy


def parse(text: str) -> tuple[Frame, ...]:
    """The frames of the thread that runs a worker's method, down to it, from the stacks of all threads."""
    for block in re.split(r"^(?:Current thread|Thread) 0x.*$", text, flags=re.MULTILINE)[1:]:
        frames = [Frame(m["path"], int(m["line"]), m["function"]) for m in LINE.finditer(block)]
        for depth, frame in enumerate(frames):
            if frame.path == actor.__file__ and frame.function == "call":
                return tuple(frames[:depth]) or (frame,)
        if re.search(r"^  \.\.\.$", block, flags=re.MULTILINE):  # only the innermost 100 frames are written
            return tuple(frames)
    return ()


def _settle(logs: Sequence[Path], sizes: Sequence[int]) -> None:
    deadline, seen, changed = time.monotonic() + WAIT_S, list(sizes), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = [_size(log) for log in logs]
        if now != seen:
            seen, changed = now, time.monotonic()
        if all(new > old for new, old in zip(now, sizes, strict=True)) and time.monotonic() - changed > SETTLED_S:
            return


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _read(log: Path, offset: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
