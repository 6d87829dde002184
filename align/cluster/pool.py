"""The cast on Ray: slots, worker processes, and calls that end with an answer or with a cause.

A slot is a bundle of one placement group: a GPU with a CPU, or a CPU where the cluster has no GPU. Roles that share a
slot share its device. Ray itself never restarts a worker: a fresh process would silently have base weights. Only roles
without state are brought up anew, by `RayCluster.renew`.
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

from align.cluster.actor import Member, Place, Process, signal_all
from align.cluster.failures import Call, DiedError
from align.cluster.health import FETCH_S, Watch
from align.cluster.process import worker_environment
from align.cluster.session import LOOPBACK, Session
from align.config import ClusterConfig
from align.errors import PlacementError, WorkerError
from align.prechecks.placement import ranges
from align.run import Clock
from align.utils import fault_injection
from align.workers.announce import Announce, loading, silent
from align.workers.base import Answer, Ranks, Spec, Worker

T = TypeVar("T")
U = TypeVar("U")

NODE_POLL_S = 1.0


def _begin_log(path: Path, line: str) -> None:
    """Write a worker's log from its start on: the worker opens it after seconds of imports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@dataclass(frozen=True)
class Cast:
    """How a role is brought up."""

    worker: type[Worker]
    specs: list[Spec]
    """Of each rank."""
    slots: tuple[int, ...]
    """Of each rank."""
    environments: list[dict[str, str]]
    """Variables of each rank's process."""
    shares: list[float]
    """Part of its slot that each rank takes."""
    logs: list[Path]
    """Of each rank."""


class RayFuture(Generic[U]):
    """Answers under way from every rank of a role."""

    def __init__(self, ranks: RayRanks, call: Call, gather: Callable[[list[Any]], U]):
        self._ranks, self._call, self._gather = ranks, call, gather
        self._sound: set[Any] = set()
        """References whose answers were looked at and are no errors."""

    def result(self) -> U:
        """Wait; see `align.roles.Future`."""
        answers = self._ranks.answers(self._call)
        self._ranks.clock.record(self._call.phase, [answer.span for answer in answers])
        return self._gather([answer.value for answer in answers])

    def done(self) -> bool:
        """See `align.roles.Future`. True also where an answer cannot come, which `result` then says."""
        references = self._call.references
        ready, pending = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        return not pending or self._failed(ready) or self._ranks.given_up(self._call)

    def _failed(self, ready: Sequence[Any]) -> bool:
        """Whether a rank has failed while others have not answered: they may hang in a collective."""
        for reference in ready:
            if reference not in self._sound:
                try:
                    ray.get(reference, timeout=FETCH_S)
                except RayError:
                    return True
                self._sound.add(reference)
        return False


class RayRanks(Ranks):
    """The worker processes of one role."""

    def __init__(self, role: str, cast: Cast, clock: Clock, cluster: RayCluster):
        self.role, self.cast, self.clock, self.cluster = role, cast, clock, cluster
        self.world_size = len(cast.specs)

    @property
    def members(self) -> list[Member]:
        """The processes as they are now."""
        return self.cluster.watch.members[self.role]

    def call(
        self,
        phase: str,
        method: Callable[..., Answer[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> RayFuture[U]:
        """See `align.workers.base.Ranks`."""
        self.clock.begin(phase)
        return RayFuture(self, self.ask(Call(phase, self.clock.step, method.__name__, arguments)), gather)

    def start(self, method: Callable[..., Answer[T]], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `align.workers.base.Ranks`."""
        call = self.ask(Call("sync", self.clock.step, method.__name__, arguments))
        self.cluster.started.append((self.role, call))
        return call.references

    def ask(self, call: Call) -> Call:
        """Send a call to its ranks, with the fault that is due there."""
        members = self.members[call.first : call.first + len(call.arguments)]
        kinds = [fault_injection.next_fault(self.role, one.rank, call.phase, call.step) for one in members]
        try:
            call.references = [
                member.handle.call.remote(call.method, kind, *own)
                for member, kind, own in zip(members, kinds, call.arguments, strict=True)
            ]
        except (RayError, TypeError, pickle.PicklingError) as error:
            cause = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"{self.role}: {call.place} cannot be sent to its workers: {type(error).__name__}: {cause}; remedy: "
                "losses and their arguments must be picklable, and fit into Ray's object store (/dev/shm)"
            ) from error
        call.since = None
        self.cluster.watch.calls.append((self.role, call))
        return call

    def answers(self, call: Call) -> list[Any]:
        """Wait for a call, within the time its phase has. A role without state is renewed and asked again."""
        while True:
            try:
                found = self.wait(call)
                self.cluster.forget((self.role, call))
                return found
            except DiedError as error:
                self.cluster.renew(self, error)

    def wait(self, call: Call) -> list[Any]:
        """Wait for a call, within the time its phase has."""
        return self.cluster.watch.wait(self.role, call, *self._limit(call))

    def given_up(self, call: Call) -> bool:
        """Whether `wait` would not go on waiting for a call that is not answered."""
        return self.cluster.watch.gives_up(call, self._limit(call)[0])

    def _limit(self, call: Call) -> tuple[float, str]:
        """Seconds that a call may take, and the key of the recipe that says so."""
        section = self.cluster.section
        if call.phase in section.phase_timeout_s:
            return section.phase_timeout_s[call.phase], f"cluster.phase_timeout_s.{call.phase}"
        return section.call_timeout_s, "cluster.call_timeout_s"


class RayCluster:
    """A Ray cluster for the time of a run, and one placement group on it. Use as a context manager."""

    def __init__(
        self,
        section: ClusterConfig,
        num_slots: int,
        interrupted: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        max_restarts: int = 0,
        announce: Announce = silent,
    ):
        """``interrupted`` is called at least once a second while workers are waited for; what it raises ends the wait.
        ``max_restarts``: how often roles without state are brought up anew, each time with a line to ``report``.
        ``announce`` gets a line for each thing that starts and that is up."""
        self.section, self.num_slots, self.report, self.announce = section, num_slots, report, announce
        self.restarts_left = max_restarts
        self.session = Session(section)
        self.watch = Watch(interrupted)
        self.started: list[tuple[str, Call]] = []
        """Calls that nobody waits for."""

    def __enter__(self) -> RayCluster:
        begun = time.monotonic()
        where = "on this machine" if self.session.own else f"at {self.section.address}"
        self.announce(f"{'starting' if self.session.own else 'joining'} Ray {where}, for {self.num_slots} slots")
        self.session.open()
        try:
            self._reserve()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, (RayError, ConnectionError)):
                raise WorkerError(f"Ray failed while slots were taken: {error}", remedy="run again") from error
            raise
        nodes = len(set(self._node_of_slot))
        self.announce(f"Ray: up in {time.monotonic() - begun:.1f} s (slots {self.num_slots}, nodes {nodes})")
        return self

    def __exit__(self, *_: object) -> None:
        self.end_workers()
        self.session.close()

    def end_workers(self) -> None:
        """Kill every worker process; their slots become free. Does not raise."""
        members = [one for members in self.watch.members.values() for one in members]
        self.watch.members.clear()
        self.watch.calls.clear()
        self.started.clear()
        self._kill(members)

    def _kill(self, members: Sequence[Member]) -> None:
        """Ray first, so that it knows that it is meant; then the system, for a stopped process does not hear Ray."""
        if not members or not ray.is_initialized():  # or Ray would start itself, to answer
            return
        with suppress(Exception):
            for member in members:
                if not self.watch.broken:
                    ray.kill(member.handle)
            signal_all(members, signal.SIGKILL, elsewhere=self.watch.hung and not self.watch.broken)

    def forget(self, done: tuple[str, Call]) -> None:
        """A call was answered, and with it all calls that nobody waits for and that are through."""
        self.watch.calls.remove(done)
        for one in list(self.started):
            ready, _ = ray.wait(one[1].references, num_returns=len(one[1].references), timeout=0, fetch_local=False)
            if len(ready) == len(one[1].references):
                self.started.remove(one)
                self.watch.calls.remove(one)

    def _reserve(self) -> None:
        """Get the slots, or say what was asked, what is there and what is missing."""
        deadline = time.monotonic() + self.section.start_timeout_s
        kind = "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
        while (there := int(ray.cluster_resources().get(kind, 0))) < self.num_slots:
            if self.session.own or time.monotonic() > deadline:
                raise self._refusal(kind, there)
            time.sleep(NODE_POLL_S)  # nodes of a running cluster may still be joining
        self.on_gpu = kind == "GPU"
        bundle = {"CPU": 1.0, "GPU": 1.0} if self.on_gpu else {"CPU": 1.0}
        self._group: PlacementGroup = placement_group([bundle] * self.num_slots, strategy="PACK")
        if not self._group.wait(max(1.0, deadline - time.monotonic())):
            free = int(ray.available_resources().get(kind, 0))
            raise self._refusal(kind, free, "free")
        table = placement_group_table(self._group)
        node_of = table["bundles_to_node_id"]
        # Neighbouring slots lie on one node, so that a role of eight slots starting at 0 fills a node of eight GPUs.
        self._order = sorted(range(self.num_slots), key=lambda index: (node_of[index], index))
        self._node_of_slot = [node_of[index] for index in self._order]

    def _refusal(self, kind: str, there: int, word: str = "there") -> PlacementError:
        return PlacementError(
            f"placement asks for {self.num_slots} slots, {there} are {word} ({kind}s of the cluster), "
            f"{self.num_slots - there} are missing",
            remedy="let roles share slots, or give the run more GPUs"
            + ("" if kind == "GPU" else "; on CPU raise cluster.slots_per_core"),
        )

    def bring_up(
        self, roles: Mapping[str, tuple[type[Worker], list[Spec], tuple[int, ...]]], log_dir: Path, clock: Clock
    ) -> dict[str, RayRanks]:
        """Start every role: worker class, one spec a rank, and the slots of its ranks. All come up at the same time.

        Faults on purpose strike in phase ``start`` as the worker is made, in ``load`` as it joins its peers and loads.
        """
        sharing = [sum(slot in slots for _, _, slots in roles.values()) for slot in range(self.num_slots)]
        on_node = dict.fromkeys(self._node_of_slot, 0)
        for slot, count in enumerate(sharing):
            on_node[self._node_of_slot[slot]] += count
        pools = {}
        for name, (worker, specs, slots) in roles.items():
            environments = [self._environment(self._node_of_slot[slot], on_node) for slot in slots]
            shares = [1.0 / sharing[slot] for slot in slots]
            logs = [log_dir / f"{name}-{spec.rank}.log" for spec in specs]
            pools[name] = RayRanks(name, Cast(worker, specs, slots, environments, shares, logs), clock, self)
        self._come_up(list(pools.values()))
        self.watch.look_after_daemons()
        return pools

    def _environment(self, node: str, workers_on: Mapping[str, int]) -> dict[str, str]:
        cores = {one["NodeID"]: int(one["Resources"].get("CPU", 1)) for one in ray.nodes()}
        own = (os.cpu_count() or 1) if self.session.own else cores[node]  # our own cluster counts slots, not cores
        return worker_environment(own, workers_on[node], self.session.own)

    def _processes(self, role: str, cast: Cast) -> list[Member]:
        """New processes in the slots of a role."""
        members = []
        for rank, slot in enumerate(cast.slots):
            actor = ray.remote(Process).options(
                num_cpus=cast.shares[rank],
                num_gpus=cast.shares[rank] if self.on_gpu else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self._order[slot]),
                runtime_env={"env_vars": cast.environments[rank]},
            )
            _begin_log(cast.logs[rank], f"{role}-{rank}: a process is started on slot {slot}")
            handle = actor.remote(cast.logs[rank])
            members.append(Member(role, rank, handle, cast.logs[rank], cast.worker.stateless))
        return members

    def _come_up(self, pools: Sequence[RayRanks]) -> None:
        """New processes for some roles, all at the same time, until their models are loaded."""
        begun = time.monotonic()
        deadline = begun + self.section.start_timeout_s
        made, calls = [], []
        for pool in pools:
            slots = ranges(pool.cast.slots)
            self.announce(f"{pool.role}: starting on {slots}, logs in {pool.cast.logs[0].parent}")
            self.watch.members[pool.role] = self._processes(pool.role, pool.cast)
            made.append(self._ask(pool, "start", "come_up", [(pool.cast.worker, spec) for spec in pool.cast.specs]))
        for pool, call in zip(pools, made, strict=True):
            places: list[Place] = self._answers(pool, call, deadline)
            members = [replace(member, place=place) for member, place in zip(pool.members, places, strict=True)]
            self.watch.members[pool.role] = members
        for pool in pools:
            place = pool.members[0].place
            host = LOOPBACK if self.session.own or place is None else place.host
            (port,) = self._answers(pool, self._ask(pool, "meet", "open_store", [(host,)]), deadline)
            calls.append(self._ask(pool, "load", "start", pool.everywhere(host, port)))
            up = time.monotonic() - begun
            self.announce(f"{pool.role}: {loading(pool.cast.specs[0].section)}, processes are up after {up:.1f} s")
        for pool, call in zip(pools, calls, strict=True):
            self._answers(pool, call, deadline)
            self.announce(f"{pool.role}: ready after {time.monotonic() - begun:.1f} s")

    def _ask(self, pool: RayRanks, phase: str, method: str, arguments: Sequence[tuple[Any, ...]]) -> Call:
        return pool.ask(Call(phase, pool.clock.step, method, arguments))

    def _answers(self, pool: RayRanks, call: Call, deadline: float) -> list[Any]:
        """Wait while roles come up: a process that dies here is not renewed."""
        left = max(0.0, deadline - time.monotonic())
        found = self.watch.wait(pool.role, call, left, "cluster.start_timeout_s")
        self.forget((pool.role, call))
        return found

    def renew(self, ranks: RayRanks, error: DiedError) -> None:
        """Bring up a role without state anew in its slots, and ask it again what it has not answered.

        Raises ``error`` for a role with state, for the death of another role's worker, and when it was often enough.
        """
        if error.role != ranks.role or not ranks.cast.worker.stateless or self.restarts_left < 1:
            raise error
        self.restarts_left -= 1
        line = str(error).splitlines()[0]
        self.report(
            f"{line}; {ranks.role} has no state and is brought up anew, {self.restarts_left} more times at most"
        )
        unanswered = [call for role, call in self.watch.calls if role == ranks.role]
        self.watch.calls = [one for one in self.watch.calls if one[0] != ranks.role]
        self._kill(ranks.members)
        try:
            self._come_up([ranks])
        except DiedError as again:
            self.watch.calls = [one for one in self.watch.calls if one[0] != ranks.role]
            self.watch.calls += [(ranks.role, call) for call in unanswered]
            self.renew(ranks, again)
            return
        for call in unanswered:
            ranks.ask(call)
