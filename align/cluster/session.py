"""A session of Ray: one of our own on the loopback interface, or one that runs already."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] - compiled

from align.cluster import reaper
from align.cluster.process import inherited
from align.config import ClusterConfig
from align.errors import PlacementError, WorkerError

LOOPBACK = "127.0.0.1"
FOLDERS = Path("/tmp")
"""Short, because paths of sockets hold at most 107 characters."""
PREFIX = "align-ray-"
TOKEN = "token"
KNOCK_S = 1.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}


class Session:
    """Ray for the time of a context.

    Our own has a folder that only this user may enter, with a token of 256 bits without which nobody may ask anything
    of it. Ray knows two switches for that, an environment variable each; and one that keeps it on 127.0.0.1, made for
    other systems, without which it would listen on every interface.
    """

    def __init__(self, section: ClusterConfig):
        self.section = section
        self._folder: Path | None = None
        self._lock: int | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    @property
    def own(self) -> bool:
        """Whether this process starts and stops Ray."""
        return self.section.address is None

    def open(self) -> None:
        """Start or join. Raises `WorkerError` when that fails, and `PlacementError` where nothing listens at
        ``cluster.address``."""
        try:
            if self.own:
                remove_abandoned()
                self._open_own()
            else:
                self._knock(str(self.section.address))
                ray.init(address=self.section.address, **QUIET)
        except PlacementError:
            raise
        except Exception as error:  # Ray raises a bare one where its own processes are slow to start
            self.close()
            remedy = (
                "look for what else keeps this machine busy, and try again"
                if self.own
                else "check cluster.address=HOST:PORT, that its Ray has this version, and RAY_AUTH_TOKEN_PATH if it "
                "wants a token"
            )
            raise WorkerError(
                f"Ray cannot be reached or started: {str(error).strip() or type(error).__name__}",
                remedy=remedy,
            ) from error

    def _open_own(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDERS))
        token = self._folder / TOKEN
        self._lock = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # held as long as this process lives, see `remove_abandoned`
        os.write(self._lock, secrets.token_hex(32).encode())
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", reaper.__file__, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # a signal to the driver's group is not for it
        )
        with _surroundings(token):
            ray.init(
                address="local",
                num_cpus=(os.cpu_count() or 1) * self.section.slots_per_core,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(self._folder / "r"),  # which Ray opens to everybody; the folder around it stays closed
                **QUIET,
            )

    def _knock(self, address: str) -> None:
        """Wait until something listens there: Ray itself would try for minutes."""
        host, _, port = address.rpartition(":")
        deadline = time.monotonic() + self.section.start_timeout_s
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    waited = f"cluster.start_timeout_s ({self.section.start_timeout_s:g})"
                    raise PlacementError(
                        f"cluster.address={address} could not be reached within {waited}: {error}",
                        remedy="check host and port, that Ray runs there (ray start --head), and firewalls between",
                    ) from error
            time.sleep(KNOCK_S)

    def close(self) -> None:
        """End Ray, or leave the one that runs, and remove what lies in /tmp. Does not raise."""
        if ray.is_initialized():
            with suppress(Exception):
                ray.shutdown()
        if self._folder is not None:
            reaper.reap(self._folder)
            self._folder = None
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def _surroundings(token: Path) -> Iterator[None]:
    """The environment in which Ray's processes and all workers are started, and what Ray keeps of it in memory."""
    before, clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        _set_environment({**inherited(before), **mine})
        ray_constants.ENABLE_RAY_CLUSTER = False  # nodes of other machines cannot join, so 127.0.0.1 is address enough
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        _set_environment(before)


def _set_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def remove_abandoned() -> None:
    """Remove folders of drivers that were killed: those of this user whose token file nobody holds locked.

    A lock and not the number in the name decides: numbers are given anew, and mean nothing in another container that
    shares the file system.
    """
    for folder in FOLDERS.glob(f"{PREFIX}*-*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            lock = os.open(folder / TOKEN, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
