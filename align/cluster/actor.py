"""The Ray actor around a worker, and the driver's records of workers and calls."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.cluster.process import die_with_parent, open_log, signal_workers
from align.utils import fault_injection
from align.workers.base import Worker, WorkerSpec

SIGNAL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ProcessLocation:
    """Where a worker process runs."""

    node: str
    """Ray's id of the node."""
    host: str
    """IP address of the node, as other nodes reach it."""
    pid: int


@dataclass(frozen=True)
class Member:
    """One rank of a role, as the driver knows it."""

    role: str
    rank: int
    handle: Any
    """Ray's handle of the `WorkerActor`."""
    log: Path
    stateless: bool
    place: ProcessLocation | None = None
    """None until the process runs."""

    @property
    def name(self) -> str:
        """``policy-0``."""
        return f"{self.role}-{self.rank}"


@dataclass(eq=False)
class WorkerCall:
    """A call to the ranks of a role, until its results are fetched."""

    phase: str
    step: int
    method: str
    arguments: Sequence[tuple[Any, ...]]
    """Arguments of each rank. They are kept so that the call can be sent again to a restarted role."""
    references: list[Any] = field(default_factory=list)
    """Ray's object references of the results, one for each rank."""
    first: int = 0
    """Rank of the first of ``references``."""
    wait_start: float | None = None
    """When the driver first waited or polled for the results (`time.monotonic`). The deadline counts from then."""

    def start_waiting(self) -> float:
        """Return `wait_start`, and set it to now at the first call."""
        self.wait_start = time.monotonic() if self.wait_start is None else self.wait_start
        return self.wait_start

    @property
    def place(self) -> str:
        """``update, step 3``."""
        return f"{self.phase}, step {self.step}"


class WorkerActor:
    """The Ray actor around a `Worker`. It opens its log first and then takes calls by method name."""

    def __init__(self, log: Path):
        die_with_parent()
        open_log(log)
        self._worker: Any = self  # until `create_worker` replaces it

    def create_worker(self, worker: type[Worker], spec: WorkerSpec) -> ProcessLocation:
        """Make the worker, without a model."""
        self._worker = worker(spec)
        context = ray.get_runtime_context()
        return ProcessLocation(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    def ping(self) -> None:
        """Health check."""

    def call(self, method: str, fault: str | None, *arguments: Any) -> Any:
        """Run a method of the worker. ``fault`` is a kind of `align.utils.fault_injection`."""
        if fault is not None:
            fault_injection.raise_fault(fault)
        return getattr(self._worker, method)(*arguments)


_remote_signal_workers = ray.remote(num_cpus=0, max_retries=0)(signal_workers)


def signal_all(members: Sequence[Member], number: int, elsewhere: bool = True) -> Mapping[str, str]:
    """Send a signal to worker processes. Returns the states that they had before, by name, as far as known.

    With ``elsewhere`` a Ray task signals the workers of other nodes. That takes seconds, and fails if Ray itself fails.
    """
    driver_node = ray.get_runtime_context().get_node_id()
    names_by_node: dict[str, dict[int, str]] = {}
    for member in members:
        if member.place is not None:
            names_by_node.setdefault(member.place.node, {})[member.place.pid] = member.name
    states = {}
    local_names = names_by_node.pop(driver_node, {})
    for pid, letter in signal_workers(list(local_names), number).items():
        states[local_names[pid]] = letter
    tasks = {}
    for node, names in names_by_node.items() if elsewhere else ():
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        tasks[_remote_signal_workers.options(scheduling_strategy=affinity).remote(list(names), number)] = names
    if tasks:
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=SIGNAL_TIMEOUT_S)
        for reference in ready:
            try:
                letters = ray.get(reference, timeout=SIGNAL_TIMEOUT_S)
            except RayError:
                continue  # the node is gone, and the states of its workers stay unknown
            states.update({tasks[reference][pid]: letter for pid, letter in letters.items()})
    return states
