"""The cast in one process, without Ray: for debugging, for tests, and for one small GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from align.roles import Ready
from align.run import Clock
from align.workers.base import Answer, Ranks, Spec, Worker

T = TypeVar("T")
U = TypeVar("U")


class LocalRanks(Ranks):
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
        (answer,) = self.start(method, arguments)
        self.clock.record(phase, [answer.span])
        return Ready(gather([answer.value]))

    def start(self, method: Callable[..., Answer[T]], arguments: Sequence[tuple[Any, ...]]) -> list[Answer[T]]:
        """See `align.workers.base.Ranks`."""
        return [getattr(self.worker, method.__name__)(*arguments[0])]  # by name: the worker's own override counts


def bring_up(worker: type[Worker], spec: Spec, clock: Clock) -> LocalRanks:
    """Start the role in this process."""
    instance = worker(spec)
    instance.start_alone()
    return LocalRanks(instance, clock)
