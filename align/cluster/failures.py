"""From what Ray raises to a cause that a user can act on."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

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

from align.cluster.actor import Member
from align.errors import AlignError, LoadError, WorkerError

TAIL_LINES = 15
COMING_UP = ("come_up", "open_store", "start")
"""Methods by which a role comes up."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
PEERS = re.compile(
    r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|store.*tim(ed )?out|recvvalue failed",
    re.IGNORECASE,
)
"""Texts of collective calls whose peer is gone."""
DETAIL = re.compile(r"(?:Worker exit detail|exit detail): (.*?)(?:\. Some common causes|$)", re.DOTALL)


class Kind(IntEnum):
    """What a failure proves, the strongest first."""

    OURS = 0
    """An error with a place and a remedy of its own: diverged, a model that does not fit, ..."""
    DIED = 1
    """A process that ended."""
    RAISED = 2
    """Another exception of a worker's own."""
    PEER = 3
    """A collective call that failed: a peer may have died."""
    CONSEQUENCE = 4
    """An argument that another worker should have made, or Ray in trouble."""


class DiedError(WorkerError):
    """A process of the role ``role`` that ended."""

    role = ""


@dataclass(eq=False)
class Call:
    """What was asked of a role and not answered yet."""

    phase: str
    step: int
    method: str
    arguments: Sequence[tuple[Any, ...]]
    """Of each rank; kept so that a role that is brought up anew can be asked again."""
    references: list[Any] = field(default_factory=list)
    """What each rank will answer."""
    first: int = 0
    """Rank of the first of ``references``."""
    since: float | None = None
    """When its answer was first waited or looked for, by `time.monotonic`; its deadline counts from then."""

    def waited_for(self) -> float:
        """`since`, which is now where nobody has waited yet."""
        self.since = time.monotonic() if self.since is None else self.since
        return self.since

    @property
    def place(self) -> str:
        """``update, step 3``."""
        return f"{self.phase}, step {self.step}"


@dataclass(frozen=True)
class Evidence:
    """A failure of one rank."""

    kind: Kind
    member: Member
    call: Call
    cause: RayError

    def error(self) -> AlignError:
        """What to tell the user: a line with role, rank, phase, step, cause and remedy; then traceback or log."""
        inner = self.cause.cause if isinstance(self.cause, RayTaskError) else None
        name, place = self.member.name, self.call.place
        if isinstance(inner, AlignError):
            where = inner.where or f"{name}, {place}"
            AlignError.__init__(inner, inner.message, where=where, remedy=inner.remedy)  # its class may hold more
            return inner
        if self.kind == Kind.DIED:
            error = DiedError(self._text(f"died in {place}: {_how(self.cause)}", f"run again, or {self._less_memory}"))
            error.role = self.member.role
            return error
        if _out_of_memory(inner):
            return WorkerError(self._text(f"ran out of memory in {place}: {_summary(self.cause)}", self._less_memory))
        final = self.kind == Kind.RAISED and self.call.method in COMING_UP and self.call.step == 0
        error_class = LoadError if final else WorkerError
        return error_class(self._text(f"failed in {place}: {_summary(self.cause)}", self._relief(inner or self.cause)))

    def _text(self, line: str, remedy: str) -> str:
        below = tail(self.member.log)
        if isinstance(self.cause, RayTaskError):
            below = ANSI.sub("", str(self.cause)).strip()
        return f"{self.member.name} {line}; remedy: {remedy}\n{below}\n  log: {self.member.log}"

    @property
    def _less_memory(self) -> str:
        key = "max_num_seqs" if self.call.phase in ("generate", "held_out") else "max_tokens_per_micro_batch"
        return f"lower {self.member.role}.{key} if it was memory"

    def _relief(self, cause: BaseException) -> str:
        if isinstance(cause, ObjectStoreFullError):
            return "give Ray a larger object store (a larger /dev/shm), or ask for smaller batches"
        if isinstance(cause, OutOfDiskError):
            return "free the disk of Ray's temporary folder"
        if self.kind == Kind.CONSEQUENCE:
            return "check the nodes of the cluster and run again"
        return f"read {self.member.log}"


def judge(cause: RayError) -> Kind:
    """What an exception from Ray proves."""
    if not isinstance(cause, RayTaskError):  # which Ray mixes with the class of what was raised, so it comes first
        died = isinstance(cause, DEATHS) and not isinstance(cause, ActorUnavailableError)
        return Kind.DIED if died else Kind.CONSEQUENCE
    inner = cause.cause
    if isinstance(inner, AlignError):
        return Kind.OURS
    if isinstance(inner, RayError) and not isinstance(inner, (ObjectStoreFullError, OutOfDiskError)):
        return Kind.CONSEQUENCE
    if "DistError" in {base.__name__ for base in type(inner).__mro__} or PEERS.search(str(inner)):
        return Kind.PEER
    return Kind.RAISED


def _out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _summary(cause: RayError) -> str:
    """The exception in one line."""
    inner = cause.cause if isinstance(cause, RayTaskError) else cause
    if isinstance(inner, GetTimeoutError):
        return "its answer could not be fetched"
    lines = [line.strip() for line in str(inner or cause).splitlines() if line.strip()]
    if inner is None:  # an exception that could not be sent: only its traceback came
        return ANSI.sub("", lines[-1])
    return ": ".join([type(inner).__name__, *lines[:1]])


def _how(cause: RayError) -> str:
    """How a process ended, as far as Ray knows."""
    text = str(cause)
    if isinstance(cause, OutOfMemoryError) or "memory pressure" in text:
        return f"out of memory, Ray killed it before the system would ({text.splitlines()[0]})"
    found = DETAIL.search(text)
    detail = " ".join((found[1] if found else text.splitlines()[-1] if text else "").split())
    if "End of file" in detail:
        return "its process ended without a word, as after SIGKILL, a crash, or when the system ran out of memory"
    return detail or type(cause).__name__


def tail(log: Path) -> str:
    """The last lines of a log, each after a bar."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines) or "  | (its log is empty)"
