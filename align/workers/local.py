"""The cast in one process, without Ray: for debugging, for tests, and for one small GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from align.run import Clock
from align.workers.base import Answer, Spec, Worker

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Ready(Generic[U]):
    """An answer that is there."""

    value: U

    def result(self) -> U:
        """The answer."""
        return self.value


class LocalRanks:
    """The only rank of a role, called directly."""

    world_size = 1

    def __init__(self, worker: Worker, clock: Clock):
        self.worker, self.clock = worker, clock

    def call(
        self,
        phase: str,
        method: Callable[..., Answer[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> Ready[U]:
        """See `align.workers.base.Ranks`."""
        self.clock.begin(phase)
        start = time.perf_counter()
        answer = getattr(self.worker, method.__name__)(*arguments[0])  # by name: the worker's own override counts
        value = gather([answer.value])
        self.clock.record(phase, answer.seconds, time.perf_counter() - start)
        return Ready(value)

    def everywhere(self, *arguments: Any) -> list[tuple[Any, ...]]:
        """See `align.workers.base.Ranks`."""
        return [arguments]


def bring_up(worker: type[Worker], spec: Spec, clock: Clock) -> LocalRanks:
    """Start the role in this process."""
    instance = worker(spec)
    instance.start_alone()
    return LocalRanks(instance, clock)
