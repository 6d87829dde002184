"""From Ray's exceptions to an error with cause and remedy, and from workers' stacks to the cause of a hang."""

from __future__ import annotations

import re
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

import align
from align.cluster import actor
from align.cluster.actor import Member, WorkerCall, signal_all
from align.cluster.process import STACKS
from align.errors import AlignError, LoadError, WorkerError

TAIL_LINES = 15
START_METHODS = ("create_worker", "open_store", "start")
"""Methods that start a role."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
PEERS = re.compile(
    r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|store.*tim(ed )?out|recvvalue failed",
    re.IGNORECASE,
)
"""Messages of collective calls whose peer is gone."""
DETAIL = re.compile(r"(?:Worker exit detail|exit detail): (.*?)(?:\. Some common causes|$)", re.DOTALL)
WAIT_S = 3.0
"""Seconds for stacks to arrive. A shared file system may show a new size late."""
SETTLED_S = 0.3
"""Seconds without growth after which a stack is complete."""
LINE = re.compile(r'  File "(?P<path>[^"]*)", line (?P<line>\d+) in (?P<function>.+)')
PACKAGE = str(Path(align.__file__).parent)
INSTALLED = tuple({*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), "<"})
COLLECTIVE = re.compile(r"/(torch/distributed|deepspeed/comm)/")
"""Files whose functions wait for peers."""


class FailureKind(IntEnum):
    """What a failure proves, the strongest first."""

    ALIGN_ERROR = 0
    """An `AlignError`, with place and remedy: training diverged, a model does not fit, ..."""
    DIED = 1
    """A process ended."""
    RAISED = 2
    """The worker raised another exception."""
    PEER = 3
    """A collective call failed: a peer may have died."""
    SECONDARY = 4
    """An argument that another worker did not produce, or a failure of Ray."""


class WorkerDiedError(WorkerError):
    """A worker process of the role ``role`` ended."""

    role = ""


@dataclass(frozen=True)
class Failure:
    """A failure of one rank."""

    kind: FailureKind
    member: Member
    call: WorkerCall
    cause: RayError

    def error(self) -> AlignError:
        """The error for the user: a line with role, rank, phase, step, cause and remedy, then traceback or log."""
        inner = self.cause.cause if isinstance(self.cause, RayTaskError) else None
        name, place = self.member.name, self.call.place
        if isinstance(inner, AlignError):
            where = inner.where or f"{name}, {place}"
            AlignError.__init__(
                inner, inner.message, where=where, remedy=inner.remedy
            )  # not a new error: its class may have more fields
            return inner
        if self.kind == FailureKind.DIED:
            line = f"died in {place}: {_death_cause(self.cause)}"
            error = WorkerDiedError(self._text(line, f"run again, or {self._less_memory}"))
            error.role = self.member.role
            return error
        if _out_of_memory(inner):
            return WorkerError(self._text(f"ran out of memory in {place}: {_summary(self.cause)}", self._less_memory))
        final = self.kind == FailureKind.RAISED and self.call.method in START_METHODS and self.call.step == 0
        error_class = LoadError if final else WorkerError
        return error_class(self._text(f"failed in {place}: {_summary(self.cause)}", self._remedy(inner or self.cause)))

    def _text(self, line: str, remedy: str) -> str:
        detail = tail(self.member.log)
        if isinstance(self.cause, RayTaskError):
            detail = ANSI.sub("", str(self.cause)).strip()
        return f"{self.member.name} {line}; remedy: {remedy}\n{detail}\n  log: {self.member.log}"

    @property
    def _less_memory(self) -> str:
        key = "max_num_seqs" if self.call.phase in ("generate", "held_out") else "max_tokens_per_micro_batch"
        return f"lower {self.member.role}.{key} if it was memory"

    def _remedy(self, cause: BaseException) -> str:
        if isinstance(cause, ObjectStoreFullError):
            return "give Ray a larger object store (a larger /dev/shm), or use smaller batches"
        if isinstance(cause, OutOfDiskError):
            return "free the disk of Ray's temporary folder"
        if self.kind == FailureKind.SECONDARY:
            return "check the nodes of the cluster and run again"
        return f"read {self.member.log}"


def classify_failure(cause: RayError) -> FailureKind:
    """What an exception from Ray proves."""
    if not isinstance(cause, RayTaskError):  # Ray also derives it from the class of the raised error: check it first
        died = isinstance(cause, DEATHS) and not isinstance(cause, ActorUnavailableError)
        return FailureKind.DIED if died else FailureKind.SECONDARY
    inner = cause.cause
    if isinstance(inner, AlignError):
        return FailureKind.ALIGN_ERROR
    if isinstance(inner, RayError) and not isinstance(inner, (ObjectStoreFullError, OutOfDiskError)):
        return FailureKind.SECONDARY
    if "DistError" in {base.__name__ for base in type(inner).__mro__} or PEERS.search(str(inner)):
        return FailureKind.PEER
    return FailureKind.RAISED


def _out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _summary(cause: RayError) -> str:
    """The exception in one line."""
    inner = cause.cause if isinstance(cause, RayTaskError) else cause
    if isinstance(inner, GetTimeoutError):
        return "its answer could not be fetched"
    lines = [line.strip() for line in str(inner or cause).splitlines() if line.strip()]
    if inner is None:  # the exception did not pickle: only its traceback arrived
        return ANSI.sub("", lines[-1])
    return ": ".join([type(inner).__name__, *lines[:1]])


def _death_cause(cause: RayError) -> str:
    """Why a process ended, as far as Ray knows."""
    text = str(cause)
    if isinstance(cause, OutOfMemoryError) or "memory pressure" in text:
        return f"out of memory, Ray killed it before the system would ({text.splitlines()[0]})"
    match = DETAIL.search(text)
    detail = " ".join((match[1] if match else text.splitlines()[-1] if text else "").split())
    if "End of file" in detail:  # of the socket between worker and raylet
        return "its process exited unexpectedly. Likely causes: SIGKILL, crash, out of memory"
    return detail or type(cause).__name__


def tail(log: Path) -> str:
    """The last lines of a log, each after a bar."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines) or "  | (its log is empty)"


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    path: str
    line: int
    function: str

    @property
    def ours(self) -> bool:
        """Whether the file belongs to this package or to the user, not to an installed library."""
        return self.path.startswith(PACKAGE) or not self.path.startswith(INSTALLED)

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(Path(self.path).parts[-3:])}:{self.line})"


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker was doing when its stacks were dumped."""

    member: Member
    frames: tuple[Frame, ...]
    """Frames of the thread that runs a method, innermost first; empty if none does."""
    reacted: bool
    """Whether it wrote its stacks."""
    state: str
    """State letter of its process, see `align.cluster.process.state`; empty if unknown."""

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
        """Whether it runs a method. A worker that does not react counts as busy."""
        return bool(self.frames) or not self.reacted

    @property
    def summary(self) -> str:
        """What it is doing, in a few words."""
        if self.member.place is None:
            return "its process has not started"
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
        return f"{self.member.name}: {self.summary}"


def dump_stacks(members: Sequence[Member]) -> list[WorkerStatus]:
    """Signal every worker to write its stacks into its log, and read them from there."""
    sizes = [_size(member.log) for member in members]
    states = signal_all(members, STACKS)
    able = [states.get(member.name, "") not in ("", "T", "Z") for member in members]
    logs = [(member.log, size) for member, size, reacts in zip(members, sizes, able, strict=True) if reacts]
    _wait_for_stacks([log for log, _ in logs], [size for _, size in logs])
    statuses = []
    for member, size in zip(members, sizes, strict=True):
        text = _read(member.log, size)
        state = states.get(member.name, "")
        statuses.append(WorkerStatus(member, parse_stacks(text), LINE.search(text) is not None, state))
    return statuses


def slowest(statuses: Iterable[WorkerStatus]) -> list[WorkerStatus]:
    """The workers that the others wait for: those that do not react; else the busy ones outside a collective call;
    else, in a deadlock, all busy ones."""
    busy = [status for status in statuses if status.busy]
    silent = [status for status in busy if not status.reacted]
    return silent or [status for status in busy if status.collective is None] or busy


def parse_stacks(text: str) -> tuple[Frame, ...]:
    """Frames of the thread that runs a worker's method, innermost first, from the stacks of all threads."""
    for block in re.split(r"^(?:Current thread|Thread) 0x.*$", text, flags=re.MULTILINE)[1:]:
        frames = [Frame(m["path"], int(m["line"]), m["function"]) for m in LINE.finditer(block)]
        for depth, frame in enumerate(frames):
            if frame.path == actor.__file__ and frame.function == "call":
                return tuple(frames[:depth]) or (frame,)
        if re.search(r"^  \.\.\.$", block, flags=re.MULTILINE):  # only the innermost 100 frames are written
            return tuple(frames)
    return ()


def _wait_for_stacks(logs: Sequence[Path], sizes: Sequence[int]) -> None:
    """Wait until every log has grown beyond its size, and none has grown for `SETTLED_S`."""
    deadline, last_sizes, last_change = time.monotonic() + WAIT_S, list(sizes), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        new_sizes = [_size(log) for log in logs]
        if new_sizes != last_sizes:
            last_sizes, last_change = new_sizes, time.monotonic()
        grown = all(new > old for new, old in zip(new_sizes, sizes, strict=True))
        if grown and time.monotonic() - last_change > SETTLED_S:
            return


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _read(log: Path, offset: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
