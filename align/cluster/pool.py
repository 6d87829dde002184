"""Roles on Ray: slots, worker processes, and calls that end with results or with the cause of a failure.

A slot is a bundle of one placement group: a GPU with a CPU, or a CPU if the cluster has no GPU. Roles that share a slot
share its device. Ray itself never restarts a worker: a new process would silently have the starting weights. Only
stateless roles are restarted, by `RayCluster.restart`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.cluster.actor import Member, ProcessLocation, WorkerActor, WorkerCall, signal_all
from align.cluster.failures import WorkerDiedError
from align.cluster.health import FETCH_S, HealthMonitor
from align.cluster.process import worker_environment
from align.cluster.session import LOOPBACK, Session
from align.cluster.slot_order import slot_order
from align.config import ClusterConfig
from align.errors import PlacementError, WorkerError
from align.prechecks.placement import ranges
from align.run import Clock
from align.utils import fault_injection
from align.workers.announce import Announce, loading, silent
from align.workers.base import Worker, WorkerGroup, WorkerResult, WorkerSpec

T = TypeVar("T")
U = TypeVar("U")

NODE_POLL_S = 1.0


def _write_log_header(path: Path, line: str) -> None:
    """Write the first line of a worker's log. The worker itself opens the log after seconds of imports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@dataclass(frozen=True)
class RoleSpec:
    """How a role starts. Lists have one item for each rank."""

    worker: type[Worker]
    specs: list[WorkerSpec]
    slots: tuple[int, ...]
    environments: list[dict[str, str]]
    """Environment variables."""
    shares: list[float]
    """Fraction of its slot that a rank takes."""
    logs: list[Path]


class RayFuture(Generic[U]):
    """The results of a call to every rank of a role."""

    def __init__(self, ranks: RayWorkerGroup, call: WorkerCall, gather: Callable[[list[Any]], U]):
        self._ranks, self._call, self._gather = ranks, call, gather
        self._succeeded: set[Any] = set()
        """References whose results were fetched and are no errors."""

    def result(self) -> U:
        results = self._ranks.results(self._call)
        self._ranks.clock.record(self._call.phase, [result.span for result in results])
        return self._gather([result.value for result in results])

    def done(self) -> bool:
        """Also true if no result can come; then `result` raises."""
        references = self._call.references
        ready, pending = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        return not pending or self._failed(ready) or self._ranks.is_expired(self._call)

    def _failed(self, ready: Sequence[Any]) -> bool:
        """Whether a rank has failed while others still work: they may hang in a collective."""
        for reference in ready:
            if reference not in self._succeeded:
                try:
                    ray.get(reference, timeout=FETCH_S)
                except RayError:
                    return True
                self._succeeded.add(reference)
        return False


class RayWorkerGroup(WorkerGroup):
    """The worker processes of one role."""

    def __init__(self, role: str, spec: RoleSpec, clock: Clock, cluster: RayCluster):
        self.role, self.spec, self.clock, self.cluster = role, spec, clock, cluster
        self.world_size = len(spec.specs)

    @property
    def members(self) -> list[Member]:
        """The current processes."""
        return self.cluster.monitor.members[self.role]

    def call(
        self,
        phase: str,
        method: Callable[..., WorkerResult[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> RayFuture[U]:
        self.clock.begin(phase)
        return RayFuture(self, self.send(WorkerCall(phase, self.clock.step, method.__name__, arguments)), gather)

    def start(self, method: Callable[..., WorkerResult[T]], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        call = self.send(WorkerCall("sync", self.clock.step, method.__name__, arguments))
        self.cluster.started.append((self.role, call))
        return call.references

    def send(self, call: WorkerCall) -> WorkerCall:
        """Send a call to its ranks, with the faults that tests inject."""
        members = self.members[call.first : call.first + len(call.arguments)]
        kinds = [fault_injection.next_fault(self.role, member.rank, call.phase, call.step) for member in members]
        try:
            call.references = [
                member.handle.call.remote(call.method, kind, *rank_arguments)
                for member, kind, rank_arguments in zip(members, kinds, call.arguments, strict=True)
            ]
        except (RayError, TypeError, pickle.PicklingError) as error:
            cause = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"{self.role}: {call.place} cannot be sent to its workers: {type(error).__name__}: {cause}; remedy: "
                "losses and their arguments must be picklable and fit into Ray's object store (/dev/shm)"
            ) from error
        call.wait_start = None
        self.cluster.monitor.calls.append((self.role, call))
        return call

    def results(self, call: WorkerCall) -> list[Any]:
        """Wait for a call, at most the timeout of its phase. A stateless role that died is restarted, and gets the call
        again."""
        while True:
            try:
                values = self.wait(call)
                self.cluster.forget((self.role, call))
                return values
            except WorkerDiedError as error:
                self.cluster.restart(self, error)

    def wait(self, call: WorkerCall) -> list[Any]:
        """Wait for a call, at most the timeout of its phase."""
        return self.cluster.monitor.wait(self.role, call, *self._limit(call))

    def is_expired(self, call: WorkerCall) -> bool:
        """Whether `wait` would give up a call that has no result yet."""
        return self.cluster.monitor.is_expired(call, self._limit(call)[0])

    def _limit(self, call: WorkerCall) -> tuple[float, str]:
        """Timeout of a call in seconds, and the recipe key that sets it."""
        section = self.cluster.section
        if call.phase in section.phase_timeout_s:
            return section.phase_timeout_s[call.phase], f"cluster.phase_timeout_s.{call.phase}"
        return section.call_timeout_s, "cluster.call_timeout_s"


class RayCluster:
    """Ray with one placement group, as a context manager."""

    def __init__(
        self,
        section: ClusterConfig,
        num_slots: int,
        interrupted: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        max_restarts: int = 0,
        announce: Announce = silent,
    ):
        """``interrupted`` is called at least once a second during a wait; an exception that it raises ends the wait.
        ``max_restarts`` limits the restarts of stateless roles; ``report`` gets a line for each. ``announce`` gets a
        line when Ray or a role starts, and when it is ready."""
        self.section, self.num_slots, self.report, self.announce = section, num_slots, report, announce
        self.restarts_left = max_restarts
        self.session = Session(section)
        self.monitor = HealthMonitor(interrupted)
        self.started: list[tuple[str, WorkerCall]] = []
        """Calls whose results no caller fetches."""

    def __enter__(self) -> RayCluster:
        start = time.monotonic()
        where = "on this machine" if self.session.own else f"at {self.section.address}"
        self.announce(f"{'starting' if self.session.own else 'joining'} Ray {where}, for {self.num_slots} slots")
        self.session.open()
        try:
            self._reserve()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, (RayError, ConnectionError)):
                raise WorkerError(f"Ray failed while it reserved slots: {error}", remedy="run again") from error
            raise
        nodes = len(set(self._node_of_slot))
        self.announce(f"Ray: up in {time.monotonic() - start:.1f} s (slots {self.num_slots}, nodes {nodes})")
        return self

    def __exit__(self, *_: object) -> None:
        self.end_workers()
        self.session.close()

    def end_workers(self) -> None:
        """Kill every worker process, which frees their slots. Does not raise."""
        members = [member for group in self.monitor.members.values() for member in group]
        self.monitor.members.clear()
        self.monitor.calls.clear()
        self.started.clear()
        self._kill(members)

    def _kill(self, members: Sequence[Member]) -> None:
        if not members or not ray.is_initialized():  # `ray.kill` would start Ray
            return
        # Ray first, so that it does not report the deaths; then SIGKILL, because a stopped process does not react to
        # Ray.
        with suppress(Exception):
            for member in members:
                if not self.monitor.broken:
                    ray.kill(member.handle)
            signal_all(members, signal.SIGKILL, elsewhere=self.monitor.hung and not self.monitor.broken)

    def forget(self, finished: tuple[str, WorkerCall]) -> None:
        """Drop a finished call, and the finished ones among the calls that no caller waits for."""
        self.monitor.calls.remove(finished)
        for entry in list(self.started):
            references = entry[1].references
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
            if len(ready) == len(references):
                self.started.remove(entry)  # and with it the last reference to weights in the object store
                self.monitor.calls.remove(entry)

    def _reserve(self) -> None:
        """Reserve the slots. Raises `PlacementError` if the cluster has too few."""
        deadline = time.monotonic() + self.section.start_timeout_s
        kind = "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
        while (available := int(ray.cluster_resources().get(kind, 0))) < self.num_slots:
            if self.session.own or time.monotonic() > deadline:
                raise self._too_few_slots(kind, available)
            time.sleep(NODE_POLL_S)  # nodes of a running cluster may still join
        self.on_gpu = kind == "GPU"
        bundle = {"CPU": 1.0, "GPU": 1.0} if self.on_gpu else {"CPU": 1.0}
        self._group: PlacementGroup = placement_group([bundle] * self.num_slots, strategy="PACK")
        if not self._group.wait(max(1.0, deadline - time.monotonic())):
            free = int(ray.available_resources().get(kind, 0))
            raise self._too_few_slots(kind, free, "free")
        self._arrange([])

    def _arrange(self, roles: Sequence[Sequence[int]]) -> None:
        """Decide which bundle is which slot, given the slots of each role."""
        node_of = placement_group_table(self._group)["bundles_to_node_id"]
        self._order = slot_order(node_of, roles)
        self._node_of_slot = [node_of[index] for index in self._order]

    def _too_few_slots(self, kind: str, available: int, word: str = "there") -> PlacementError:
        return PlacementError(
            f"placement asks for {self.num_slots} slots, {available} are {word} ({kind}s of the cluster), "
            f"{self.num_slots - available} are missing",
            remedy="let roles share slots, or give the run more GPUs"
            + ("" if kind == "GPU" else "; on CPU raise cluster.slots_per_core"),
        )

    def start_roles(
        self, roles: Mapping[str, tuple[type[Worker], list[WorkerSpec], tuple[int, ...]]], log_dir: Path, clock: Clock
    ) -> dict[str, RayWorkerGroup]:
        """Start all roles at the same time. Each has a worker class, a spec for each rank, and the slots of its ranks.

        Injected faults strike in phase ``start`` when a worker is made, and in ``load`` when it joins its peers and
        loads its model.
        """
        self._arrange([slots for _, _, slots in roles.values()])
        # A slot is divided evenly in Ray's count, and cores by the workers of a node: Ray enforces neither.
        sharing = [sum(slot in slots for _, _, slots in roles.values()) for slot in range(self.num_slots)]
        workers_on = dict.fromkeys(self._node_of_slot, 0)
        for slot, count in enumerate(sharing):
            workers_on[self._node_of_slot[slot]] += count
        groups = {}
        for name, (worker, specs, slots) in roles.items():
            environments = [self._environment(self._node_of_slot[slot], workers_on) for slot in slots]
            shares = [1.0 / sharing[slot] for slot in slots]
            logs = [log_dir / f"{name}-{rank.rank}.log" for rank in specs]
            spec = RoleSpec(worker, specs, slots, environments, shares, logs)
            groups[name] = RayWorkerGroup(name, spec, clock, self)
        self._start_processes(list(groups.values()))
        self.monitor.watch_daemons()
        return groups

    def _environment(self, node: str, workers_on: Mapping[str, int]) -> dict[str, str]:
        cores = {info["NodeID"]: int(info["Resources"].get("CPU", 1)) for info in ray.nodes()}
        # Our own Ray counts slots (`cluster.slots_per_core`), not cores.
        num_cores = (os.cpu_count() or 1) if self.session.own else cores[node]
        return worker_environment(num_cores, workers_on[node], self.session.own)

    def _create_actors(self, role: str, spec: RoleSpec) -> list[Member]:
        """New actors in the slots of a role."""
        members = []
        for rank, slot in enumerate(spec.slots):
            actor = ray.remote(WorkerActor).options(
                num_cpus=spec.shares[rank],
                num_gpus=spec.shares[rank] if self.on_gpu else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self._order[slot]),
                runtime_env={"env_vars": spec.environments[rank]},
            )
            _write_log_header(spec.logs[rank], f"{role}-{rank}: starting a process on slot {slot}")
            handle = actor.remote(spec.logs[rank])
            members.append(Member(role, rank, handle, spec.logs[rank], spec.worker.stateless))
        return members

    def _start_processes(self, groups: Sequence[RayWorkerGroup]) -> None:
        """Start new processes for some roles, and wait until their models are loaded."""
        start = time.monotonic()
        deadline = start + self.section.start_timeout_s
        creations, loads = [], []
        # Every call of a stage is sent before the first is waited for: roles start and load side by side.
        for group in groups:
            spec = group.spec
            self.announce(f"{group.role}: starting on {ranges(spec.slots)}, logs in {spec.logs[0].parent}")
            self.monitor.members[group.role] = self._create_actors(group.role, spec)
            arguments = [(spec.worker, worker_spec) for worker_spec in spec.specs]
            creations.append(self._send(group, "start", "create_worker", arguments))
        for group, call in zip(groups, creations, strict=True):
            places: list[ProcessLocation] = self._wait_for_results(group, call, deadline)
            members = [replace(member, place=place) for member, place in zip(group.members, places, strict=True)]
            self.monitor.members[group.role] = members
        # Rank 0 opens the rendezvous on a free port of its node. Only then do the peers know where to connect.
        for group in groups:
            place = group.members[0].place
            host = LOOPBACK if self.session.own or place is None else place.host
            (port,) = self._wait_for_results(group, self._send(group, "meet", "open_store", [(host,)]), deadline)
            loads.append(self._send(group, "load", "start", group.everywhere(host, port)))
            seconds = time.monotonic() - start
            source = loading(group.spec.specs[0].section)
            self.announce(f"{group.role}: {source}, processes are up after {seconds:.1f} s")
        for group, call in zip(groups, loads, strict=True):
            self._wait_for_results(group, call, deadline)
            self.announce(f"{group.role}: ready after {time.monotonic() - start:.1f} s")

    def _send(self, group: RayWorkerGroup, phase: str, method: str, arguments: Sequence[tuple[Any, ...]]) -> WorkerCall:
        return group.send(WorkerCall(phase, group.clock.step, method, arguments))

    def _wait_for_results(self, group: RayWorkerGroup, call: WorkerCall, deadline: float) -> list[Any]:
        """Wait during a start. A process that dies here is not restarted."""
        left = max(0.0, deadline - time.monotonic())
        values = self.monitor.wait(group.role, call, left, "cluster.start_timeout_s")
        self.forget((group.role, call))
        return values

    def restart(self, group: RayWorkerGroup, error: WorkerDiedError) -> None:
        """Restart a stateless role in its slots, and send its open calls again.

        Raises ``error`` if the role has state, if a worker of another role died, or if no restart is left.
        """
        if error.role != group.role or not group.spec.worker.stateless or self.restarts_left < 1:
            raise error
        self.restarts_left -= 1
        line = str(error).splitlines()[0]
        self.report(f"{line}; restarting the stateless role {group.role}, {self.restarts_left} restarts left")
        open_calls = [call for role, call in self.monitor.calls if role == group.role]
        self._drop_calls(group.role)
        self._kill(group.members)
        try:
            self._start_processes([group])
        except WorkerDiedError as next_error:
            # The calls of the failed start are void; the open calls wait for the next try.
            self._drop_calls(group.role)
            self.monitor.calls += [(group.role, call) for call in open_calls]
            self.restart(group, next_error)
            return
        for call in open_calls:
            group.send(call)

    def _drop_calls(self, role: str) -> None:
        self.monitor.calls = [entry for entry in self.monitor.calls if entry[0] != role]
