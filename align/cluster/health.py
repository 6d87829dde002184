"""Waiting for workers: the cause of the first failure, the slow workers at a deadline, and the health of Ray itself."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import ray
from ray.exceptions import RayError

from align.cluster import failures
from align.cluster.actor import Member, WorkerCall
from align.cluster.failures import Failure, FailureKind, WorkerDiedError, classify_failure
from align.errors import AlignError, WorkerError

POLL_S = 1.0
"""Seconds between two checks of a wait: for a second signal, and for Ray's own processes."""
FETCH_S = 60.0
"""Seconds to fetch a result that is ready."""
SEARCH_S = 2.0
"""Seconds to wait for a better cause than the first failure."""
ENOUGH_S = 0.3
"""Seconds to wait for a more informative error once a process has died."""
CONNECT_TIMEOUT_S = 1.0
MAX_MISSES = 3
"""Failed checks in a row after which a daemon counts as dead. A refused connection counts twice."""
NODES_PER_CHECK = 8
"""Raylets that one check connects to."""


class RayDaemons:
    """Ray's control store (GCS) and the raylet of each node, checked by opening a connection.

    Ray itself reports their end late, or ends the driver without a message after a minute.
    """

    def __init__(self, names_on: Mapping[str, str]):
        """``names_on`` holds the names of the workers on each node, by Ray's node id. Messages use them."""
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._store = f"Ray's control store (gcs_server) at {host}:{port}"
        self._addresses = {self._store: (host, int(port))}
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] in names_on:
                address = node["NodeManagerAddress"], node["NodeManagerPort"]
                name = f"the raylet at {address[0]}:{address[1]}, node of {names_on[node['NodeID']]}"
                self._addresses[name] = address
        self._raylets = cycle([name for name in self._addresses if name != self._store] or [self._store])
        self._misses: Counter[str] = Counter()

    def dead(self) -> str | None:
        """Name of a daemon that is gone, or None if those of this check answer: the store and the next raylets."""
        for name in {self._store: None, **dict.fromkeys(islice(self._raylets, NODES_PER_CHECK))}:
            try:
                socket.create_connection(self._addresses[name], timeout=CONNECT_TIMEOUT_S).close()
                self._misses[name] = 0
            except ConnectionRefusedError:
                self._misses[name] += 2
            except OSError:
                self._misses[name] += 1
            if self._misses[name] >= MAX_MISSES:
                return name
        return None


class HealthMonitor:
    """All workers of a cluster, the calls in flight, and what can end a wait."""

    def __init__(self, interrupted: Callable[[], None]):
        self.interrupted = interrupted
        """Called in each turn of a wait. It may raise."""
        self.members: dict[str, list[Member]] = {}
        self.calls: list[tuple[str, WorkerCall]] = []
        """Calls in flight, each with its role."""
        self.daemons: RayDaemons | None = None
        """Set when all workers run."""
        self.broken = False
        """Whether a Ray daemon is gone, so that Ray answers nothing any more."""
        self.hung = False
        """Whether a deadline has passed, so that workers may not react to Ray any more."""
        self._last_check = 0.0
        """When `is_expired` last checked Ray's daemons."""

    def watch_daemons(self) -> None:
        """From now on, end a wait when a Ray daemon of the workers' nodes is gone."""
        names: dict[str, list[str]] = {}
        for member in self._all_members:
            if member.place is not None:
                names.setdefault(member.place.node, []).append(member.name)
        self.daemons = RayDaemons({node: ", ".join(names_there) for node, names_there in names.items()})

    @property
    def _all_members(self) -> list[Member]:
        return [member for members in self.members.values() for member in members]

    def wait(self, role: str, call: WorkerCall, timeout_s: float, key: str) -> list[Any]:
        """Results in the order of ranks. The first failure ends the wait, even if peers hang in a collective.

        ``timeout_s`` counts from `WorkerCall.wait_start`; ``key`` is the recipe key that sets it. Raises
        `WorkerDiedError` if a process ended, `WorkerError` for a deadline or any other failure, and an `AlignError`
        of the worker as it is.
        """
        try:
            return self._wait(role, call, timeout_s, key)
        except WorkerDiedError:
            raise  # the role may be restarted, and its open calls sent again
        except BaseException:
            self.calls.remove((role, call))
            raise

    def _wait(self, role: str, call: WorkerCall, timeout_s: float, key: str) -> list[Any]:
        deadline = call.start_waiting() + timeout_s
        rank_of = {reference: call.first + index for index, reference in enumerate(call.references)}
        pending, results = list(rank_of), {}
        while pending:
            # Short waits, so that signals and dead daemons are noticed while workers compute for hours.
            timeout = min(POLL_S, max(0.0, deadline - time.monotonic()))
            ready, pending = ray.wait(pending, timeout=timeout)
            self.interrupted()
            for reference in ready:
                rank = rank_of[reference]
                try:
                    results[rank] = ray.get(reference, timeout=FETCH_S)
                except RayError as error:
                    raise self._find_failure(role, call, rank, error) from None
            if pending and not ready:
                self._check_ray(role, call)
                if time.monotonic() >= deadline:
                    ranks = [rank_of[reference] for reference in pending]
                    raise self._timeout_error(role, call, ranks, (timeout_s, key))
        return [results[rank] for rank in sorted(results)]

    def is_expired(self, call: WorkerCall, timeout_s: float) -> bool:
        """Whether a call without results is past its deadline, or a Ray daemon is gone."""
        now = time.monotonic()
        if now >= call.start_waiting() + timeout_s:
            return True
        if self.daemons is None or now < self._last_check + POLL_S:
            return False
        self._last_check = now
        return self.daemons.dead() is not None

    def _check_ray(self, role: str, call: WorkerCall) -> None:
        daemon = self.daemons.dead() if self.daemons else None
        if daemon is not None:
            self.broken = True
            raise WorkerError(
                f"{daemon}, is gone, while {role} was in {call.place}; remedy: run again, and look for what ended it "
                "(out of memory, `ray stop`, a node that went down)"
            )

    def _find_failure(self, role: str, call: WorkerCall, rank: int, error: RayError) -> AlignError:
        """The error of the strongest failure that any worker of any role reports within `SEARCH_S`.

        The first failure is often a consequence: a rank dies, and Ray first delivers the gloo error of its peer.
        """
        candidates = [Failure(classify_failure(error), self.members[role][rank], call, error)]
        probes: dict[Any, tuple[Member, WorkerCall]] = {}
        for other, open_call in self.calls:
            members = self.members[other][open_call.first :]
            probes.update({r: (m, open_call) for r, m in zip(open_call.references, members, strict=False)})
        for member in self._all_members:
            probes[member.handle.ping.remote()] = (member, self._current_call(member, call))
        start, pending = time.monotonic(), list(probes)
        while pending:
            patience = ENOUGH_S if self._strongest(candidates, role).kind <= FailureKind.DIED else SEARCH_S
            if time.monotonic() - start > patience:
                break
            ready, pending = ray.wait(pending, timeout=0.1, fetch_local=False)
            self.interrupted()
            for reference in ready:
                try:
                    ray.get(reference, timeout=FETCH_S)
                except RayError as other_error:
                    candidates.append(Failure(classify_failure(other_error), *probes[reference], other_error))
        return self._strongest(candidates, role).error()

    def _strongest(self, candidates: Sequence[Failure], role: str) -> Failure:
        """The strongest kind; among deaths a role with state, which no restart can replace; then the role of the
        call."""

        def order(failure: Failure) -> tuple[FailureKind, bool, bool]:
            restartable = failure.kind == FailureKind.DIED and failure.member.stateless
            return failure.kind, restartable, failure.member.role != role

        return min(candidates, key=order)

    def _current_call(self, member: Member, default: WorkerCall) -> WorkerCall:
        """The last open call of a worker, else ``default``."""
        return next((call for role, call in reversed(self.calls) if role == member.role), default)

    def _timeout_error(
        self, role: str, call: WorkerCall, late_ranks: Sequence[int], limit: tuple[float, str]
    ) -> WorkerError:
        """An error that names the slowest workers, and what all busy workers are doing."""
        self.hung = True
        statuses = failures.dump_stacks(self._all_members)
        late = [status for status in statuses if status.member.role == role and status.member.rank in late_ranks]
        listed = [status for status in statuses if status in late or status.busy]
        slowest = failures.slowest(listed) or late
        names = ", ".join(status.member.name for status in slowest)
        waiting = ", ".join(f"{role}-{rank}" for rank in late_ranks)
        seconds, key = limit
        lines = [
            f"{names}: no answer to {call.phase} within {seconds:.3g} s, step {call.step}: {slowest[0].summary}; "
            f"remedy: look at the stacks in its log, or raise {key}",
            f"  waited for: {waiting}",
            *(f"  | {status}" for status in listed),
            *(f"  log: {status.member.log}" for status in slowest),
        ]
        return WorkerError("\n".join(lines))
