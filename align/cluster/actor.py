"""The Ray actor around a worker, and what the driver keeps of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.cluster.process import die_with_parent, open_log, signal_workers
from align.utils import fault_injection
from align.workers.base import Spec, Worker

SIGNAL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a worker process is."""

    node: str
    """Ray's id of its node."""
    host: str
    """IP address of the node, as other nodes reach it."""
    pid: int


@dataclass(frozen=True)
class Member:
    """One rank of a role as the driver knows it."""

    role: str
    rank: int
    handle: Any
    """Ray's handle of the `Process`."""
    log: Path
    stateless: bool
    place: Place | None = None
    """None until the process has come up."""

    @property
    def name(self) -> str:
        """``policy-0``."""
        return f"{self.role}-{self.rank}"


class Process:
    """The Ray actor around a `Worker`: its log first, then calls by method name."""

    def __init__(self, log: Path):
        die_with_parent()
        open_log(log)
        self._worker: Any = self  # until there is one

    def come_up(self, worker: type[Worker], spec: Spec) -> Place:
        """Make the worker; it has no model yet."""
        self._worker = worker(spec)
        context = ray.get_runtime_context()
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    def ping(self) -> None:
        """Answer at once, unless at work or dead."""

    def call(self, method: str, fault: str | None, *arguments: Any) -> Any:
        """Run a method of the worker; output goes to the log. ``fault``: a kind of `align.utils.fault_injection`."""
        if fault is not None:
            fault_injection.raise_fault(fault)
        return getattr(self._worker, method)(*arguments)


_signal_there = ray.remote(num_cpus=0, max_retries=0)(signal_workers)


def signal_all(members: Sequence[Member], number: int, elsewhere: bool = True) -> Mapping[str, str]:
    """Send a signal to worker processes wherever they are; returns their states before, by name, as far as known.

    On other nodes (``elsewhere``) a task of Ray does it. That takes seconds, and fails where Ray itself is in trouble.
    """
    own = ray.get_runtime_context().get_node_id()
    by_node: dict[str, dict[int, str]] = {}
    for member in members:
        if member.place is not None:
            by_node.setdefault(member.place.node, {})[member.place.pid] = member.name
    states = {}
    here = by_node.pop(own, {})
    for pid, letter in signal_workers(list(here), number).items():
        states[here[pid]] = letter
    tasks = {}
    for node, names in by_node.items() if elsewhere else ():
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        tasks[_signal_there.options(scheduling_strategy=affinity).remote(list(names), number)] = names
    if tasks:
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=SIGNAL_TIMEOUT_S)
        for reference in done:
            try:
                answered = ray.get(reference, timeout=SIGNAL_TIMEOUT_S)
            except RayError:
                continue  # the node is gone: its workers stay without a state
            states.update({tasks[reference][pid]: letter for pid, letter in answered.items()})
    return states
