"""A Ray session: a private one on the loopback interface, or a connection to a running cluster."""

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

from align.cluster import ray_internals, reaper
from align.cluster.process import inherited
from align.config import ClusterConfig
from align.errors import PlacementError, WorkerError

LOOPBACK = "127.0.0.1"
FOLDERS = Path("/tmp")
"""Parent of the session folders. Short, because a socket path holds at most 107 characters."""
PREFIX = "align-ray-"
TOKEN = "token"
CONNECT_RETRY_S = 1.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}


class Session:
    """Ray of this process.

    A private Ray has a folder that only this user may enter. The folder holds a token of 256 bits, which every request
    to this Ray must carry. See `align.cluster.ray_internals.private_cluster` for the address it listens on.
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
        """Start or join. Raises `PlacementError` if nothing listens at ``cluster.address`` or if this version of Ray is
        not supported, and `WorkerError` for any other failure."""
        ray_internals.check_version()
        try:
            if self.own:
                remove_abandoned()
                self._open_own()
            else:
                self._wait_for_address(str(self.section.address))
                ray.init(address=self.section.address, **QUIET)
        except PlacementError:
            raise
        except Exception as error:  # Ray raises a plain Exception if its own processes start slowly
            self.close()
            remedy = (
                "check what else keeps this machine busy, and try again"
                if self.own
                else "check cluster.address=HOST:PORT, that its Ray has this version, and RAY_AUTH_TOKEN_PATH if it "
                "requires a token"
            )
            raise WorkerError(
                f"Ray cannot be reached or started: {str(error).strip() or type(error).__name__}",
                remedy=remedy,
            ) from error

    def _open_own(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDERS))
        token = self._folder / TOKEN
        self._lock = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # held until this process ends, see `remove_abandoned`
        os.write(self._lock, secrets.token_hex(32).encode())
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", reaper.__file__, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # so that a signal to the driver's process group does not reach it
        )
        with _session_environment(token), ray_internals.private_cluster():
            ray.init(
                address="local",
                num_cpus=(os.cpu_count() or 1) * self.section.slots_per_core,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(self._folder / "r"),  # Ray opens this folder to everybody, but not the one around it
                **QUIET,
            )

    def _wait_for_address(self, address: str) -> None:
        """Wait until a process listens at the address. Ray itself would try for minutes."""
        host, _, port = address.rpartition(":")
        deadline = time.monotonic() + self.section.start_timeout_s
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=CONNECT_RETRY_S).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    waited = f"cluster.start_timeout_s ({self.section.start_timeout_s:g})"
                    raise PlacementError(
                        f"cluster.address={address} could not be reached within {waited}: {error}",
                        remedy="check host and port, that Ray runs there (ray start --head), and firewalls between",
                    ) from error
            time.sleep(CONNECT_RETRY_S)

    def close(self) -> None:
        """End the private Ray and remove its folder, or disconnect from the running one. Does not raise."""
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
def _session_environment(token: Path) -> Iterator[None]:
    """Within it, the environment of this process is the one that Ray's processes and all workers inherit."""
    previous = dict(os.environ)
    session = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        _set_environment({**inherited(previous), **session})
        yield
    finally:
        _set_environment(previous)


def _set_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def remove_abandoned() -> None:
    """Remove the folders of drivers that were killed: those of this user whose token file no process has locked.

    The lock decides and not the pid in the name: the system reuses pids, and another container that shares /tmp has
    different ones.
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
