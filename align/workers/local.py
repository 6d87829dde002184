"""Roles in the driver's process, without Ray: for debugging, for tests, and for one small GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from align.errors import WorkerError
from align.roles import CompletedFuture
from align.run import Clock
from align.utils import fault_injection
from align.workers.announce import Announce, announced, silent
from align.workers.base import Worker, WorkerGroup, WorkerResult, WorkerSpec

T = TypeVar("T")
U = TypeVar("U")


class LocalWorkerGroup(WorkerGroup):
    """The only rank of a role, called directly."""

    world_size = 1
    in_process = True

    def __init__(self, worker: Worker, clock: Clock):
        self.worker, self.clock = worker, clock

    def call(
        self,
        phase: str,
        method: Callable[..., WorkerResult[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> CompletedFuture[U]:
        self.clock.begin(phase)
        result = self._run(phase, method, arguments)
        self.clock.record(phase, [result.span])
        return CompletedFuture(gather([result.value]))

    def start(
        self, method: Callable[..., WorkerResult[T]], arguments: Sequence[tuple[Any, ...]]
    ) -> list[WorkerResult[T]]:
        return [self._run("sync", method, arguments)]

    def _run(
        self, phase: str, method: Callable[..., WorkerResult[T]], arguments: Sequence[tuple[Any, ...]]
    ) -> WorkerResult[T]:
        role, step = self.worker.spec.role, self.clock.step
        try:
            fault_injection.maybe_inject(role, 0, phase, step)
            return getattr(self.worker, method.__name__)(*arguments[0])  # by name, so that a subclass may override it
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise WorkerError(
                f"{role} ran out of memory in {phase}, step {step}: {type(error).__name__}: {error}",
                remedy=f"lower {role}.max_tokens_per_micro_batch, or {role}.max_num_seqs if it samples",
            ) from error


def start_role(worker: type[Worker], spec: WorkerSpec, clock: Clock, announce: Announce = silent) -> LocalWorkerGroup:
    """Start a role in this process."""
    fault_injection.maybe_inject(spec.role, spec.rank, "start", clock.step)
    instance = worker(spec)
    fault_injection.maybe_inject(spec.role, spec.rank, "load", clock.step)
    with announced(announce, spec.role, spec.section, "in this process"):
        instance.start_alone()
    return LocalWorkerGroup(instance, clock)
