"""Judges in other processes, for a service: replicas by Ray Serve, or one whose weights are spread over workers."""

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

import grpc
import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from align import errors
from align.cluster import process
from align.cluster.daemons import Daemons
from align.config import RewardServiceConfig
from align.data.chat import Dialogue
from align.errors import AlignError, PlacementError, WorkerError
from align.rewards.base import Groups, Ids, RewardScorer
from align.rewards.http_protocol import HTTPError
from align.rewards.scorers import build_scorer
from align.serve.app import Batcher, Scores
from align.workers.reward import Reward

T = TypeVar("T")
NAME = "reward"
"""Of the application in Ray Serve, and of its only deployment."""
LOOK_S = 1.0
"""Seconds for which it is known how many replicas there are."""
FAULTS = (RayError, RayServeException)
"""What Ray and Ray Serve raise; neither is the other's."""
RESTARTING_S = 5
"""Seconds after which a client is to ask again that met a replica which ended."""


def device() -> torch.device:
    """Where a judge computes that has a process to itself."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Sharded(RewardScorer):
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

    def look(self) -> None:
        """Raises the `WorkerError` after which workers were not brought up again."""
        if self._lost is not None:
            raise self._lost


class Replica:
    """The judge in a process of Ray Serve."""

    def __init__(self, section: RewardServiceConfig, logs: Path):
        process.die_with_parent()
        process.open_log(logs / f"replica-{os.getpid()}.log")
        _open_no_port()
        self._batcher = Batcher(build_scorer(section.reward, device()), section)

    async def score(self, dialogues: list[Dialogue]) -> Scores | HTTPError:
        """Scores, or why there are none: what is raised here would tell of a dead replica."""
        try:
            return await self._batcher.score(dialogues)
        except HTTPError as refused:
            return refused

    def check_health(self) -> None:
        """Asked by Ray Serve every few seconds; what it raises has this replica replaced."""
        if reason := self._batcher.stuck():
            raise RuntimeError(reason)


def _open_no_port() -> None:
    """Keep Ray Serve from listening in this process.

    After the constructor of a deployment it opens a port on all interfaces, for calls that are made by gRPC instead of
    by Ray. It asks nobody for a token and unpickles what it gets, so whoever reaches it can run code. Nothing here is
    called that way.
    """
    grpc.aio._server.Server.add_insecure_port = lambda self, address: 0  # type: ignore[method-assign]


class Replicated:
    """All replicas, as `align.serve.app.Scorer`."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle
        self._running, self._looked = 0, -LOOK_S
        self._lock = threading.Lock()
        self.last = time.monotonic()
        """When there was a replica."""

    async def score(self, dialogues: list[Dialogue]) -> Scores:
        """See `Scorer`."""
        response = self._handle.score.remote(dialogues)
        try:
            outcome = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except FAULTS as error:
            message = f"no replica answers, or it ended while it scored: {type(error).__name__}"
            raise HTTPError(503, message, retry_after_s=RESTARTING_S) from error
        if isinstance(outcome, HTTPError):
            raise outcome
        return outcome

    async def replicas(self) -> int:
        """See `Scorer`."""
        return await asyncio.to_thread(self.running)

    def running(self) -> int:
        """Replicas that Ray Serve finds healthy, known for a second; none while it cannot say."""
        with self._lock:  # Ray Serve is asked once, however many clients ask for the health of the service
            now = time.monotonic()
            if now - self._looked >= LOOK_S:
                try:
                    states = serve.status().applications[NAME].deployments[NAME].replica_states
                except (*FAULTS, KeyError):
                    states = {}
                self._running, self._looked = sum(n for state, n in states.items() if state == "RUNNING"), now
                self.last = now if self._running else self.last
            return self._running


@contextmanager
def replicated(
    section: RewardServiceConfig, stop: threading.Event, logs: Path
) -> Iterator[tuple[Replicated, Callable[[], None]]]:
    """Replicas by Ray Serve, on the Ray of this process, and a look at them that raises `WorkerError`."""
    bound = _deployment(section).bind(section, logs)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    handle = _unless_asked(stop, section.start_timeout_s, lambda: serve.run(bound, name=NAME, route_prefix=None))
    scorer = Replicated(handle)
    daemons = Daemons({node["NodeID"]: "the service" for node in ray.nodes()})

    def look() -> None:
        if gone := daemons.dead():
            raise WorkerError(f"{gone} has ended", remedy="start the service again")
        if not scorer.running() and time.monotonic() - scorer.last > section.start_timeout_s:
            raise WorkerError(
                f"no replica has answered for start_timeout_s ({section.start_timeout_s:g})",
                where=f"{logs}",
                remedy="see the logs there, and start the service again",
            )

    yield scorer, look


def _deployment(section: RewardServiceConfig) -> Any:
    """The deployment of Ray Serve. Raises `PlacementError` where the machine has too little."""
    replicas, there = section.replicas, ray.cluster_resources()
    kind = "GPU" if there.get("GPU", 0) and replicas.gpus != 0 else "CPU"
    each, wanted = replicas.gpus or 1.0, "GPU" if replicas.gpus else kind
    room = int(1 / each) * int(there.get(wanted, 0))  # a replica has its part of one GPU, not of two
    if replicas.max > room:
        raise PlacementError(
            f"{replicas.max} replicas of {each:g} {'GPUs' if wanted == 'GPU' else 'CPU slots'} each, there is room for "
            f"{room}: there are {there.get(wanted, 0):g}",
            remedy="lower replicas.max or replicas.gpus",
        )
    environment = process.worker_environment(os.cpu_count() or 1, replicas.max, loopback=True)
    many = replicas.max > replicas.min
    scaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.target_requests,
    }
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options={
            "num_cpus": 1 if kind == "CPU" else 0,
            "num_gpus": each if kind == "GPU" else 0,
            "runtime_env": {"env_vars": environment},
        },
        max_ongoing_requests=section.max_queue,
        graceful_shutdown_timeout_s=section.stop_timeout_s,
        max_constructor_retry_count=1,
        num_replicas=None if many else replicas.min,
        autoscaling_config=scaling if many else None,
    )


def _unless_asked(stop: threading.Event, seconds: float, start: Callable[[], T]) -> T:
    """What ``start`` returns, unless it takes too long or the service is asked to stop: Ray Serve would wait on.

    Raises the `AlignError` that a replica raised as it loaded.
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
        raise KeyboardInterrupt(0)  # the status of a service that was asked to stop
    if not outcome:
        raise WorkerError(
            f"the replicas were not up within start_timeout_s ({seconds:g})", remedy="raise it, or see the logs"
        )
    if isinstance(outcome[0], Exception):
        raise _cause(outcome[0]) from outcome[0]
    return outcome[0]


def _cause(error: Exception) -> AlignError:
    """The error of a replica, out of the text in which Ray Serve tells of it."""
    for name, message in re.findall(r"^align\.errors\.(\w+): (.*)$", str(error), re.MULTILINE):
        return getattr(errors, name, WorkerError)(message)
    return WorkerError(f"Ray Serve cannot bring the replicas up: {error}", remedy="see the message, and run again")
