"""`align serve reward`: replicas of a judge by Ray Serve, or one in this process, and HTTP in front of them.

HTTP is spoken by this process and not by Ray Serve's proxy: so the token stays here, limits and counts hold for all
replicas together, and a port that is taken is known before anything is loaded.
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
from typing import Any

import uvicorn
from rich.console import Console

from align.cluster import connections
from align.cluster.roles import start_reward
from align.cluster.session import Session
from align.config import ClusterConfig, RewardServiceConfig
from align.errors import ConfigError, WorkerError
from align.rewards import checkpoint_format, functions
from align.rewards.scorers import build_scorer
from align.serve import app
from align.serve.app import Application, Batcher, Loading, Scorer
from align.serve.log_limit import LogLimit
from align.serve.replicas import Sharded, device, replicated
from align.utils.security import require_private
from align.workers.announce import announced, loading, to_stdout

MIN_TOKEN = 16
"""Characters of the shortest bearer token."""
LOOK_S = 1.0
"""Seconds between two looks at what the service consists of."""
KEEP_ALIVE_S = 30
"""Seconds that a connection may lie idle."""
SLOTS_PER_CORE = 2
"""Replicas or shards that one core offers where there are no GPUs; the default of ``cluster.slots_per_core``."""


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align serve reward``."""
    section: RewardServiceConfig = arguments.loaded.config
    token = check(section)
    if arguments.check:
        console.print(f"{arguments.recipe}: can be served", highlight=False)
        return 0
    os.environ.pop(section.token_env, None)  # so that no process of Ray inherits it
    application = Application(Loading(), section, name_of(section), token)
    with Stop() as stop, Front(section, application) as front, _up(section, stop) as (scorer, look):
        if not stop.asked.is_set():
            application.scorer = scorer
            console.print(f"serving {name_of(section)} on {front.url}", highlight=False)
            sys.stdout.flush()
        while not stop.asked.wait(LOOK_S):
            front.look()
            look()
        front.finish()
    return 0


def check(section: RewardServiceConfig) -> str:
    """The token. Raises an error for what cannot be served, before anything is started."""
    require_private(Path(section.dir).expanduser())
    if section.reward.is_model:
        checkpoint_format.head_specs(section.reward)
    else:
        functions.load(section.reward.function)
    token = os.environ.get(section.token_env, "") if section.token_env else ""
    if section.token_env and not re.fullmatch(rf"[!-~]{{{MIN_TOKEN},}}", token):
        raise ConfigError(
            f"the environment variable {section.token_env} is not set, or holds no token of {MIN_TOKEN} and more "
            "printable characters without blanks",
            where="token_env",
            remedy=f"export {section.token_env}=$(openssl rand -hex 32)",
        )
    return token


def name_of(section: RewardServiceConfig) -> str:
    """What the model is called: a hub id, the last part of a folder's name, or the name of a function."""
    if not section.reward.is_model:
        return section.reward.function.rpartition(":")[2]
    folder = Path(section.reward.path).expanduser()
    return folder.resolve().name if folder.is_dir() else section.reward.path


class Stop:
    """Whether SIGTERM or SIGINT came. One more of them, after a second and later, ends the process as it would have."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self.install()
        return self

    def install(self) -> None:
        """Set the handlers, again after ``ray.init``, which has one of its own. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._on_signal)
                self._before.setdefault(number, before)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked.is_set() and now - self._first > LOOK_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.asked.is_set():
            self._first = now
            self.asked.set()


class Front:
    """HTTP in a thread, for the time of the context. Of two on one port the second is refused as it begins."""

    def __init__(self, section: RewardServiceConfig, application: Application):
        self._section = section
        self._socket = socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET)
        settings: Any = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none", "loop": "asyncio"}
        limit = connections.max_connections()
        self._server = uvicorn.Server(
            uvicorn.Config(
                application,  # type: ignore[arg-type] - scopes are plain dictionaries here
                http=connections.protocol(section.request_timeout_s + app.BODY_S, limit),
                h11_max_incomplete_event_size=connections.MAX_HEADER_BYTES,
                limit_concurrency=limit + 1,  # beyond, a request is answered with 503
                backlog=connections.BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(section.stop_timeout_s)),
                server_header=False,
                proxy_headers=False,
                **settings,
            )
        )
        for name in ("uvicorn.error", "asyncio"):
            logger = logging.getLogger(name)
            if not any(isinstance(one, LogLimit) for one in logger.filters):
                logger.addFilter(LogLimit())
        run = lambda: asyncio.run(self._server.serve(sockets=[self._socket]))  # noqa: E731
        self._thread = threading.Thread(target=run, name="reward-http", daemon=True)

    def __enter__(self) -> Front:
        # Lets a port be taken again whose last connections linger. Until one listens it lets others take it as well.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._section.host, self._section.port))
            self._socket.listen(connections.BACKLOG)
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"cannot listen on {self._section.host}:{self._section.port}: {error.strerror or error}",
                remedy="choose host and another port, or port=0 for a free one",
            ) from error
        self._thread.start()
        while not self._server.started:
            self.look()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        """Without waiting for requests under way."""
        self._server.force_exit = True
        self.finish()
        self._socket.close()

    @property
    def url(self) -> str:
        """Where the service is."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def look(self) -> None:
        """Raises `WorkerError` where the thread has ended."""
        if not self._thread.is_alive():
            raise WorkerError("the thread that speaks HTTP has ended", remedy="start the service again")

    def finish(self) -> None:
        """Hear nobody new, and answer the requests under way within their time."""
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def _up(section: RewardServiceConfig, stop: Stop) -> Iterator[tuple[Scorer, Callable[[], None]]]:
    """What scores, and a look at it that raises `WorkerError` when it is gone."""
    logs = Path(section.dir).expanduser().absolute() / "logs"
    slots_per_core = max(SLOTS_PER_CORE, section.replicas.shards)
    cluster = ClusterConfig(
        slots_per_core=slots_per_core,
        start_timeout_s=section.start_timeout_s,
        call_timeout_s=section.request_timeout_s,
    )
    if section.executor == "local":
        with announced(to_stdout, "reward", section.reward, "in this process"):
            batcher = Batcher(build_scorer(section.reward, device()), section)
        yield batcher, lambda: _look_at(batcher)
    elif section.replicas.shards > 1:
        slots = tuple(range(section.replicas.shards))
        # A conversation without a score is answered as such, and does not fail those beside it.
        reward = replace(section.reward, failed="drop")
        with start_reward(reward, "ray", slots, cluster, logs, to_stdout) as role:
            stop.install()
            sharded = Sharded(role)
            batcher = Batcher(sharded, section)
            yield batcher, sharded.look
    else:
        session = Session(cluster)
        to_stdout("starting Ray on this machine")
        session.open()
        try:
            stop.install()
            to_stdout(f"reward: {loading(section.reward)} in replicas, {section.replicas.min} at first, logs in {logs}")
            with replicated(section, stop.asked, logs) as (scorer, look):
                yield scorer, look
        finally:
            session.close()


def _look_at(batcher: Batcher) -> None:
    if reason := batcher.stuck():
        raise WorkerError(reason, remedy="start the service again; lower max_batch_size or raise request_timeout_s")
