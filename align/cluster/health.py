"""Waiting for workers: the cause behind the first failure, and who is slow when a deadline passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from align.cluster import stack_dump
from align.cluster.actor import Member
from align.cluster.daemons import Daemons
from align.cluster.failures import Call, DiedError, Evidence, Kind, judge
from align.errors import AlignError, WorkerError

POLL_S = 1.0
"""Seconds after which a wait looks up: for a second signal, for Ray's own processes."""
FETCH_S = 60.0
"""Seconds that an answer which is there may take to be read."""
SEARCH_S = 2.0
"""Seconds in which a better cause than the first failure may show up."""
ENOUGH_S = 0.3
"""The same after a process was found dead: another one's own error may be under way."""


class Watch:
    """All workers of a cluster, what was asked of them and not answered yet, and what may end a wait."""

    def __init__(self, interrupted: Callable[[], None]):
        self.interrupted = interrupted
        """Called in each turn of a wait; may raise."""
        self.members: dict[str, list[Member]] = {}
        self.calls: list[tuple[str, Call]] = []
        """Open calls with the role that was asked."""
        self.daemons: Daemons | None = None
        """Looked after once all workers have come up."""
        self.broken = False
        """Whether one of Ray's own processes is gone, so that nothing can be asked of Ray any more."""
        self.hung = False
        """Whether a deadline has passed: workers may not listen to Ray any more."""
        self._looked = 0.0
        """When `gives_up` looked after Ray's own processes last."""

    def look_after_daemons(self) -> None:
        """From now on, end a wait when one of Ray's own processes on the workers' nodes is gone."""
        names: dict[str, list[str]] = {}
        for member in self._all:
            if member.place is not None:
                names.setdefault(member.place.node, []).append(member.name)
        self.daemons = Daemons({node: ", ".join(there) for node, there in names.items()})

    @property
    def _all(self) -> list[Member]:
        return [one for members in self.members.values() for one in members]

    def wait(self, role: str, call: Call, timeout_s: float, key: str) -> list[Any]:
        """Answers in the order of ranks. The first failure ends the wait, though peers may hang in a collective.

        ``timeout_s`` counts from `Call.since`; ``key`` is the key of the recipe that gave it. Raises `DiedError` when a
        process ended, `WorkerError` for a deadline or any other failure, and an `AlignError` of the worker as itself.
        """
        try:
            return self._wait(role, call, timeout_s, key)
        except DiedError:
            raise  # the role may be renewed, and asked again what is still open
        except BaseException:
            self.calls.remove((role, call))
            raise

    def _wait(self, role: str, call: Call, timeout_s: float, key: str) -> list[Any]:
        deadline = call.waited_for() + timeout_s
        rank_of = {reference: call.first + index for index, reference in enumerate(call.references)}
        pending, answers = list(rank_of), {}
        while pending:
            left = max(0.0, deadline - time.monotonic())
            done, pending = ray.wait(pending, timeout=min(POLL_S, left))
            self.interrupted()
            for reference in done:
                rank = rank_of[reference]
                try:
                    answers[rank] = ray.get(reference, timeout=FETCH_S)
                except RayError as error:
                    raise self._cause(role, call, rank, error) from None
            if pending and not done:
                self._check_daemons(role, call)
                if time.monotonic() >= deadline:
                    raise self._late(role, call, [rank_of[one] for one in pending], (timeout_s, key))
        return [answers[rank] for rank in sorted(answers)]

    def gives_up(self, call: Call, timeout_s: float) -> bool:
        """Whether a call that has not been answered has had its time, or one of Ray's own processes is gone."""
        now = time.monotonic()
        if now >= call.waited_for() + timeout_s:
            return True
        if self.daemons is None or now < self._looked + POLL_S:
            return False
        self._looked = now
        return self.daemons.dead() is not None

    def _check_daemons(self, role: str, call: Call) -> None:
        dead = self.daemons.dead() if self.daemons else None
        if dead is not None:
            self.broken = True
            raise WorkerError(
                f"{dead}, is gone; {role} was asked for {call.place}; remedy: run again, and look for what ended it "
                "(out of memory, `ray stop`, a node that went down)"
            )

    def _cause(self, role: str, call: Call, rank: int, error: RayError) -> AlignError:
        """The strongest evidence that all workers of all roles give within `SEARCH_S`."""
        found = [Evidence(judge(error), self.members[role][rank], call, error)]
        asked: dict[Any, tuple[Member, Call]] = {}
        for other, open_call in self.calls:
            members = self.members[other][open_call.first :]
            asked.update({r: (m, open_call) for r, m in zip(open_call.references, members, strict=False)})
        for member in self._all:
            asked[member.handle.ping.remote()] = (member, self._current(member, call))
        begun, pending = time.monotonic(), list(asked)
        while pending:
            patience = ENOUGH_S if self._best(found, role).kind <= Kind.DIED else SEARCH_S
            if time.monotonic() - begun > patience:
                break
            done, pending = ray.wait(pending, timeout=0.1, fetch_local=False)
            self.interrupted()
            for reference in done:
                try:
                    ray.get(reference, timeout=FETCH_S)
                except RayError as other_error:
                    found.append(Evidence(judge(other_error), *asked[reference], other_error))
        return self._best(found, role).error()

    def _best(self, found: Sequence[Evidence], role: str) -> Evidence:
        """The strongest; among deaths one that no restart can mend; then one of the role that was waited for."""
        return min(
            found, key=lambda one: (one.kind, one.kind == Kind.DIED and one.member.stateless, one.member.role != role)
        )

    def _current(self, member: Member, default: Call) -> Call:
        """What a worker was asked for last, else what is being waited for."""
        return next((call for role, call in reversed(self.calls) if role == member.role), default)

    def _late(self, role: str, call: Call, late: Sequence[int], limit: tuple[float, str]) -> WorkerError:
        """Who did not answer, where all stand, and who is the slowest."""
        self.hung = True
        standings = stack_dump.dump(self._all)
        own = [one for one in standings if one.member.role == role and one.member.rank in late]
        concerned = [one for one in standings if one in own or one.busy]
        slowest = stack_dump.slowest(concerned) or own
        names = ", ".join(one.member.name for one in slowest)
        waiting = ", ".join(f"{role}-{rank}" for rank in late)
        seconds, key = limit
        lines = [
            f"{names}: no answer to {call.phase} within {seconds:.3g} s, step {call.step}: {slowest[0].briefly}; "
            f"remedy: look at the stacks in its log, or raise {key}",
            f"  waited for: {waiting}",
            *(f"  | {one}" for one in concerned),
            *(f"  log: {one.member.log}" for one in slowest),
        ]
        return WorkerError("\n".join(lines))
