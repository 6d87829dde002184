"""The end of our own Ray: kills what is left of its processes and removes its folder.

Also a program, which `align.cluster.session` starts beside Ray: it waits for the driver to end, however it ends. Ray's
processes look after each other, but one that wants to report the death of another to a third that is dead as well
takes minutes. Imports the standard library only, so that it starts at once and stays small.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

LAST_S = 10.0
"""Seconds for killed processes to be gone; one that waits for a dead disk is given up."""


def processes_of(folder: Path) -> list[int]:
    """Processes that were started with a token in ``folder``, which nobody else's are."""
    marker, found = f"RAY_AUTH_TOKEN_PATH={folder}/".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
    return found


def reap(folder: Path) -> None:
    """Kill the processes of ``folder`` and remove it. Does not raise."""
    deadline = time.monotonic() + LAST_S
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # it ended meanwhile
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()  # ends when the driver does, which holds the other end of the pipe
    reap(Path(sys.argv[1]))
