"""The cast on Ray: slots, worker processes, and calls that end with an answer or with a cause.

A slot is a bundle of one placement group: a GPU with a CPU, or a CPU where the cluster has no GPU. Roles that share a
slot share its device. Workers are never restarted by Ray: a fresh process would silently have base weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.errors import AlignError, PlacementError, WorkerError
from align.run import Clock
from align.sections import Cluster
from align.workers.base import Answer, Ranks, Spec, Worker
from align.workers.process import open_log, worker_environment

T = TypeVar("T")
U = TypeVar("U")

LOOPBACK = "127.0.0.1"
TAIL_LINES = 15


class _Process:
    """The Ray actor around a `Worker`: its log file first, then calls by method name."""

    def __init__(self, worker: type[Worker], spec: Spec, log: Path):
        open_log(log)
        self._worker = worker(spec)

    def address(self) -> str:
        """IP address of this node, as other nodes reach it."""
        return ray.util.get_node_ip_address()

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method of the worker; what it prints goes to the log."""
        return getattr(self._worker, method)(*arguments)


class RayFuture(Generic[U]):
    """Answers under way from every rank of a role."""

    def __init__(self, ranks: RayRanks, phase: str, references: Sequence[Any], gather: Callable[[list[Any]], U]):
        self._ranks, self._phase, self._references, self._gather = ranks, phase, references, gather

    def result(self) -> U:
        """Wait; see `align.roles.Future`."""
        answers = self._ranks.wait(self._references, self._phase, self._ranks.timeout_s)
        self._ranks.clock.record(self._phase, [answer.span for answer in answers])
        return self._gather([answer.value for answer in answers])


class RayRanks(Ranks):
    """The worker processes of one role."""

    def __init__(self, role: str, handles: Sequence[Any], logs: Sequence[Path], clock: Clock, timeout_s: float):
        self.role, self.handles, self.logs, self.clock, self.timeout_s = role, handles, logs, clock, timeout_s
        self.world_size = len(handles)

    def call(
        self,
        phase: str,
        method: Callable[..., Answer[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> RayFuture[U]:
        """See `align.workers.base.Ranks`."""
        self.clock.begin(phase)
        return RayFuture(self, phase, self.ask(method.__name__, arguments), gather)

    def start(self, method: Callable[..., Answer[T]], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `align.workers.base.Ranks`."""
        return self.ask(method.__name__, arguments)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """References to what each rank will answer."""
        return [h.call.remote(method, *own) for h, own in zip(self.handles, arguments, strict=True)]

    def wait(self, references: Sequence[Any], what: str, timeout_s: float) -> list[Any]:
        """Answers in rank order. The first rank that fails ends the wait, though its peers may hang in a collective."""
        deadline, pending, answers = time.monotonic() + timeout_s, list(references), {}
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = ", ".join(f"{self.role}-{references.index(reference)}" for reference in pending)
                raise WorkerError(
                    f"{late}: no answer to {what} within {timeout_s:.0f} s",
                    remedy=f"read {self.logs[references.index(pending[0])]}, or raise cluster.call_timeout_s",
                )
            rank = references.index(done[0])
            answers[rank] = self._get(done[0], rank, what)
        return [answers[rank] for rank in range(len(references))]

    def _get(self, reference: Any, rank: int, what: str) -> Any:
        name, log = f"{self.role}-{rank}", self.logs[rank]
        try:
            return ray.get(reference, timeout=self.timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, AlignError):
                raise error.cause from None
            raise WorkerError(f"{name} failed in {what}\n{str(error).strip()}\n  log: {log}") from None
        except RayActorError as error:
            cause = str(error).strip().splitlines()[0]
            raise WorkerError(f"{name} died in {what}: {cause}\n{_tail(log)}\n  log: {log}") from None
        except GetTimeoutError:
            raise WorkerError(f"{name}: its answer to {what} could not be fetched\n  log: {log}") from None


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines) or "  | (its log is empty)"


class RayCluster:
    """A Ray cluster for the time of a run, and one placement group on it. Use as a context manager."""

    def __init__(self, section: Cluster, num_slots: int):
        self.section, self.num_slots = section, num_slots
        self._temporary: Path | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> RayCluster:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        try:
            if self.section.address is None:
                self._temporary = Path(tempfile.mkdtemp(prefix="align-ray-", dir="/tmp"))
                num_cpus = (os.cpu_count() or 1) * self.section.slots_per_core
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(self._temporary),
                    **common,
                )
            else:
                ray.init(address=self.section.address, **common)
            self._reserve()
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            self.__exit__()
            raise WorkerError(
                f"Ray cannot be reached or started: {str(error).strip() or type(error).__name__}",
                remedy="check cluster.address=HOST:PORT, and that its Ray has this version",
            ) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end_workers()
        if ray.is_initialized():
            ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def end_workers(self) -> None:
        """Kill every worker process; their slots become free."""
        for handle in self._handles:
            ray.kill(handle)
        self._handles.clear()

    def _reserve(self) -> None:
        """Get the slots, or say what was asked, what is there and what is missing."""
        deadline = time.monotonic() + self.section.start_timeout_s
        kind = "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
        while (there := int(ray.cluster_resources().get(kind, 0))) < self.num_slots:
            if self.section.address is None or time.monotonic() > deadline:
                raise self._refusal(kind, there)
            time.sleep(1.0)  # nodes of a running cluster may still be joining
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
        """Start every role: worker class, one spec a rank, and the slots of its ranks. All come up at the same time."""
        sharing = [sum(slot in slots for _, _, slots in roles.values()) for slot in range(self.num_slots)]
        on_node = dict.fromkeys(self._node_of_slot, 0)
        for slot, count in enumerate(sharing):
            on_node[self._node_of_slot[slot]] += count
        pools = {}
        for name, (worker, specs, slots) in roles.items():
            handles, logs = [], []
            for spec, slot in zip(specs, slots, strict=True):
                logs.append(log_dir / f"{name}-{spec.rank}.log")
                share = 1.0 / sharing[slot]
                actor = ray.remote(_Process).options(
                    num_cpus=share,
                    num_gpus=share if self.on_gpu else 0,
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self._order[slot]),
                    runtime_env={"env_vars": self._environment(self._node_of_slot[slot], on_node)},
                )
                handles.append(actor.remote(worker, spec, logs[-1]))
            self._handles += handles
            pools[name] = RayRanks(name, handles, logs, clock, self.section.call_timeout_s)
        self._rendezvous(pools)
        return pools

    def _environment(self, node: str, workers_on: Mapping[str, int]) -> dict[str, str]:
        cores = {one["NodeID"]: int(one["Resources"].get("CPU", 1)) for one in ray.nodes()}
        own = (os.cpu_count() or 1) if self._loopback else cores[node]  # our own cluster counts slots, not cores
        return worker_environment(own, workers_on[node], self._loopback)

    @property
    def _loopback(self) -> bool:
        return self.section.address is None

    def _rendezvous(self, pools: Mapping[str, RayRanks]) -> None:
        deadline = time.monotonic() + self.section.start_timeout_s
        starting = []
        for pool in pools.values():
            left = deadline - time.monotonic()
            first = pool.handles[0]
            host = LOOPBACK if self._loopback else pool.wait([first.address.remote()], "its address", left)[0]
            port = pool.wait([first.call.remote("open_store", host)], "its meeting point", left)[0]
            starting.append((pool, pool.ask("start", pool.everywhere(host, port))))
        for pool, references in starting:
            pool.wait(references, "coming up", deadline - time.monotonic())
