"""Scorers in other processes: replicas by Ray Serve, or one model whose weights are sharded over workers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from align import errors
from align.cluster import process
from align.cluster.health import RayDaemons
from align.cluster.ray_internals import block_grpc_port
from align.config import RewardServiceConfig
from align.data.chat import Dialogue
from align.errors import AlignError, PlacementError, WorkerError
from align.rewards.base import Groups, Ids, RewardScorer
from align.rewards.http_protocol import HTTPError
from align.rewards.scorers import build_scorer
from align.serve.batcher import Batcher, ResponseScores
from align.workers.reward import Reward

T = TypeVar("T")
NAME = "reward"
"""Name of the application in Ray Serve and of its only deployment."""
STATUS_S = 1.0
"""Seconds for which the number of replicas is cached."""
RAY_ERRORS = (RayError, RayServeException)
"""What Ray and Ray Serve raise; they have no common base class."""
RESTARTING_S = 5
"""Retry-After of a request whose replica ended, in seconds."""


def device() -> torch.device:
    """The device of a scorer that has a process to itself."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ShardedScorer(RewardScorer):
    """A reward model whose weights are sharded over workers."""

    def __init__(self, role: Reward):
        self._role = role
        self._lost: WorkerError | None = None

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        try:
            return self._role.score_dialogues(dialogues).result()
        except WorkerError as error:
            self._lost = error
            raise

    def raise_if_lost(self) -> None:
        """Raise the `WorkerError` after which workers were not restarted."""
        if self._lost is not None:
            raise self._lost


class ScoringReplica:
    """The deployment of Ray Serve: one scorer in one process."""

    def __init__(self, config: RewardServiceConfig, logs: Path):
        process.die_with_parent()
        process.open_log(logs / f"replica-{os.getpid()}.log")
        block_grpc_port()
        self._batcher = Batcher(build_scorer(config.reward, device()), config)

    async def score(self, dialogues: list[Dialogue]) -> ResponseScores | HTTPError:
        """Scores, or the error as a value: Ray Serve would report a raised error as a dead replica."""
        try:
            return await self._batcher.score(dialogues)
        except HTTPError as error:
            return error

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds; it replaces a replica that raises."""
        if reason := self._batcher.stuck():
            raise RuntimeError(reason)


class ReplicaBackend:
    """All replicas, as `align.serve.batcher.ScoringBackend`."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle
        self._running, self._status_time = 0, -STATUS_S
        self._lock = threading.Lock()
        self.last_running = time.monotonic()
        """When a replica was last running."""

    async def score(self, dialogues: list[Dialogue]) -> ResponseScores:
        response = self._handle.score.remote(dialogues)
        try:
            outcome = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RAY_ERRORS as error:
            message = f"no replica answers, or it ended while it scored: {type(error).__name__}"
            raise HTTPError(503, message, retry_after_s=RESTARTING_S) from error
        if isinstance(outcome, HTTPError):
            raise outcome
        return outcome

    async def replicas(self) -> int:
        return await asyncio.to_thread(self.running)

    def running(self) -> int:
        """Replicas that Ray Serve calls healthy, cached for a second; 0 while it cannot say."""
        with self._lock:  # Ray Serve is asked once, however many clients ask for the health of the service
            now = time.monotonic()
            if now - self._status_time >= STATUS_S:
                try:
                    states = serve.status().applications[NAME].deployments[NAME].replica_states
                except (*RAY_ERRORS, KeyError):
                    states = {}
                self._running, self._status_time = sum(n for state, n in states.items() if state == "RUNNING"), now
                self.last_running = now if self._running else self.last_running
            return self._running


@contextmanager
def start_replicas(
    config: RewardServiceConfig, stop: threading.Event, logs: Path
) -> Iterator[tuple[ReplicaBackend, Callable[[], None]]]:
    """Replicas by Ray Serve, on the Ray of this process, and a check that raises `WorkerError` when they are gone."""
    bound = _deployment(config).bind(config, logs)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    handle = _unless_stopped(stop, config.start_timeout_s, lambda: serve.run(bound, name=NAME, route_prefix=None))
    backend = ReplicaBackend(handle)
    daemons = RayDaemons({node["NodeID"]: "the service" for node in ray.nodes()})

    def check() -> None:
        if daemon := daemons.dead():
            raise WorkerError(f"{daemon} has ended", remedy="start the service again")
        if not backend.running() and time.monotonic() - backend.last_running > config.start_timeout_s:
            raise WorkerError(
                f"no replica has answered for start_timeout_s ({config.start_timeout_s:g})",
                where=f"{logs}",
                remedy="read the logs there, and start the service again",
            )

    yield backend, check


def _deployment(config: RewardServiceConfig) -> Any:
    """The deployment of Ray Serve. Raises `PlacementError` if the machine is too small."""
    replicas, resources = config.replicas, ray.cluster_resources()
    on_gpu = bool(replicas.gpus or (resources.get("GPU", 0) and replicas.gpus != 0))
    kind, size = "GPU" if on_gpu else "CPU", replicas.gpus or 1.0
    room = int(1 / size) * int(resources.get(kind, 0))  # a replica has a part of one GPU, not of two
    if replicas.max > room:
        raise PlacementError(
            f"{replicas.max} replicas of {size:g} {'GPUs' if on_gpu else 'CPU slots'} each, but there is room for "
            f"{room}: this machine has {resources.get(kind, 0):g}",
            remedy="lower replicas.max or replicas.gpus",
        )
    environment = process.worker_environment(os.cpu_count() or 1, replicas.max, loopback=True)
    autoscaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.target_requests,
    }
    fixed = replicas.max == replicas.min
    return serve.deployment(
        ScoringReplica,
        name=NAME,
        ray_actor_options={
            "num_cpus": 0 if on_gpu else 1,
            "num_gpus": size if on_gpu else 0,
            "runtime_env": {"env_vars": environment},
        },
        max_ongoing_requests=config.max_queue,
        graceful_shutdown_timeout_s=config.stop_timeout_s,
        max_constructor_retry_count=1,
        num_replicas=replicas.min if fixed else None,
        autoscaling_config=None if fixed else autoscaling,
    )


def _unless_stopped(stop: threading.Event, seconds: float, start: Callable[[], T]) -> T:
    """The result of ``start``, unless it takes too long or the service is asked to stop: Ray Serve would keep waiting.

    Raises the `AlignError` that a replica raised while it loaded.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(start())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="reward-replicas", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline and not stop.is_set():
        thread.join(0.1)
    if stop.is_set():
        raise KeyboardInterrupt(0)  # the exit status of a service that was asked to stop
    if not outcome:
        raise WorkerError(
            f"the replicas did not start within start_timeout_s ({seconds:g})", remedy="raise it, or read the logs"
        )
    if isinstance(outcome[0], Exception):
        raise _replica_error(outcome[0]) from outcome[0]
    return outcome[0]


def _replica_error(error: Exception) -> AlignError:
    """The error that a replica raised, parsed from the text of Ray Serve's error."""
    for name, message in re.findall(r"^align\.errors\.(\w+): (.*)$", str(error), re.MULTILINE):
        return getattr(errors, name, WorkerError)(message)
    return WorkerError(f"Ray Serve cannot start the replicas: {error}", remedy="read the message, and run again")
