"""Clean-up of a private Ray: kill its processes and remove its folder.

Also a program, which `align.cluster.session` starts beside Ray. It waits until the driver ends, in whatever way. Ray's
processes watch each other, but a process that reports a death to another dead process takes minutes. This module
imports the standard library only, so that the program starts at once and stays small.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

KILL_TIMEOUT_S = 10.0
"""Seconds for killed processes to end. A process that waits for a dead disk does not."""


def processes_of(folder: Path) -> list[int]:
    """Pids of the processes that were started with the token in ``folder``."""
    marker, pids = f"RAY_AUTH_TOKEN_PATH={folder}/".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                pids.append(int(process.name))
        except OSError:
            continue  # the process has ended, or belongs to another user
    return pids


def reap(folder: Path) -> None:
    """Kill the processes of ``folder`` and remove it. Does not raise."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (pids := processes_of(folder)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # the process has ended
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()  # returns when the driver, which holds the other end of the pipe, has ended
    reap(Path(sys.argv[1]))
