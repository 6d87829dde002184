"""``align serve reward``: a reward model behind HTTP: replicas by Ray Serve, sharded over workers, or in this process.

This process speaks HTTP, and not Ray Serve's proxy: so the token stays here, limits and counters hold for all replicas
together, and a port that is taken is found before anything is loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from align.cluster.roles import start_reward
from align.cluster.session import Session
from align.config import ClusterConfig, FunctionRewardConfig, RewardServiceConfig
from align.errors import ConfigError, WorkerError
from align.rewards import checkpoint_format, functions
from align.rewards.scorers import build_scorer
from align.serve import connections
from align.serve.app import BODY_S, RewardApp
from align.serve.batcher import Batcher, LoadingBackend, ScoringBackend
from align.serve.log_limit import LogLimit
from align.serve.replicas import ShardedScorer, device, start_replicas
from align.utils.security import require_private
from align.utils.signals import SignalHandlers
from align.workers.announce import announced, loading, to_stdout

MIN_TOKEN = 16
"""Characters of the shortest bearer token."""
CHECK_S = 1.0
"""Seconds between two checks of the service's threads and processes."""
KEEP_ALIVE_S = 30
"""Seconds that a connection may be idle."""
SLOTS_PER_CORE = 2
"""Replicas or shards per core on a machine without GPUs; the default of ``cluster.slots_per_core``."""


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Serve until SIGTERM or SIGINT."""
    config: RewardServiceConfig = arguments.loaded.config
    token = check(config)
    if arguments.check:
        console.print(f"{arguments.recipe}: can be served", highlight=False)
        return 0
    os.environ.pop(config.token_env, None)  # so that no process of Ray inherits it
    app = RewardApp(LoadingBackend(), config, model_name(config), token)
    with (
        StopSignal() as stop,
        HTTPServer(config, app) as server,
        _start_backend(config, stop) as (backend, check_alive),
    ):
        if not stop.requested.is_set():
            app.backend = backend
            console.print(f"serving {model_name(config)} on {server.url}", highlight=False)
            sys.stdout.flush()
        while not stop.requested.wait(CHECK_S):
            server.check()
            check_alive()
        server.drain()
    return 0


def check(config: RewardServiceConfig) -> str:
    """The token. Raises an error for what cannot be served, before anything is started."""
    require_private(Path(config.dir).expanduser())
    if isinstance(config.reward, FunctionRewardConfig):
        functions.load(config.reward.function)
    else:
        checkpoint_format.head_specs(config.reward)
    token = os.environ.get(config.token_env, "") if config.token_env else ""
    if config.token_env and not re.fullmatch(rf"[!-~]{{{MIN_TOKEN},}}", token):
        raise ConfigError(
            f"the environment variable {config.token_env} is not set, or is not a token of at least {MIN_TOKEN} "
            "printable characters without spaces",
            where="token_env",
            remedy=f"export {config.token_env}=$(openssl rand -hex 32)",
        )
    return token


def model_name(config: RewardServiceConfig) -> str:
    """The name in the API: a hub id, the last part of a folder's path, or the name of a function."""
    if isinstance(config.reward, FunctionRewardConfig):
        return config.reward.function.rpartition(":")[2]
    folder = Path(config.reward.path).expanduser()
    return folder.resolve().name if folder.is_dir() else config.reward.path


class StopSignal:
    """Whether SIGTERM or SIGINT came. A second one, more than a second later, ends the process at once."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._first = 0.0
        self._handlers = SignalHandlers(self._on_signal, (signal.SIGTERM, signal.SIGINT), stay_ignored=())

    def __enter__(self) -> StopSignal:
        self.install()
        return self

    def install(self) -> None:
        """Set the handlers; again after ``ray.init``, which replaces them."""
        self._handlers.install()

    def __exit__(self, *_: object) -> None:
        self._handlers.restore()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested.is_set() and now - self._first > CHECK_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.requested.is_set():
            self._first = now
            self.requested.set()


class HTTPServer:
    """uvicorn in a thread, for the time of the context."""

    def __init__(self, config: RewardServiceConfig, app: RewardApp):
        self._config = config
        self._socket = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
        limit = connections.max_connections()
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=connections.protocol(config.request_timeout_s + BODY_S, limit),
                h11_max_incomplete_event_size=connections.MAX_HEADER_BYTES,
                limit_concurrency=limit + 1,  # beyond it, a request is answered with 503
                backlog=connections.BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(config.stop_timeout_s)),
                server_header=False,
                proxy_headers=False,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                loop="asyncio",
            )
        )
        for name in ("uvicorn.error", "asyncio"):
            logger = logging.getLogger(name)
            if not any(isinstance(log_filter, LogLimit) for log_filter in logger.filters):
                logger.addFilter(LogLimit())
        run = lambda: asyncio.run(self._server.serve(sockets=[self._socket]))  # noqa: E731
        self._thread = threading.Thread(target=run, name="reward-http", daemon=True)

    def __enter__(self) -> HTTPServer:
        # SO_REUSEADDR lets a port be taken while connections of an earlier service linger. It also lets another process
        # bind the port until this one listens, so listen at once: of two services the second is refused.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._config.host, self._config.port))
            self._socket.listen(connections.BACKLOG)
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"cannot listen on {self._config.host}:{self._config.port}: {error.strerror or error}",
                remedy="choose host and another port, or port=0 for a free one",
            ) from error
        self._thread.start()
        while not self._server.started:
            self.check()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop without waiting for requests in flight."""
        self._server.force_exit = True
        self.drain()
        self._socket.close()

    @property
    def url(self) -> str:
        """The address of the service."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def check(self) -> None:
        """Raise `WorkerError` if the thread has ended."""
        if not self._thread.is_alive():
            raise WorkerError("the HTTP thread has ended", remedy="start the service again")

    def drain(self) -> None:
        """Stop accepting connections and drain in-flight requests."""
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def _start_backend(
    config: RewardServiceConfig, stop: StopSignal
) -> Iterator[tuple[ScoringBackend, Callable[[], None]]]:
    """The backend, and a check that raises `WorkerError` when it is gone."""
    logs = Path(config.dir).expanduser().absolute() / "logs"
    cluster = ClusterConfig(
        slots_per_core=max(SLOTS_PER_CORE, config.replicas.shards),
        start_timeout_s=config.start_timeout_s,
        call_timeout_s=config.request_timeout_s,
    )
    if config.executor == "local":
        with announced(to_stdout, "reward", config.reward, "in this process"):
            batcher = Batcher(build_scorer(config.reward, device()), config)
        yield batcher, batcher.check
    elif config.replicas.shards > 1:
        slots = tuple(range(config.replicas.shards))
        # A conversation without a score is answered with null, and does not fail those beside it.
        reward = replace(config.reward, failed="drop")
        with start_reward(reward, "ray", slots, cluster, logs, to_stdout) as role:
            stop.install()
            scorer = ShardedScorer(role)
            yield Batcher(scorer, config), scorer.raise_if_lost
    else:
        session = Session(cluster)
        to_stdout("starting Ray on this machine")
        session.open()
        try:
            stop.install()
            to_stdout(f"reward: {loading(config.reward)} in replicas, {config.replicas.min} at first, logs in {logs}")
            with start_replicas(config, stop.requested, logs) as (backend, check_alive):
                yield backend, check_alive
        finally:
            session.close()
