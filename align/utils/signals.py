"""Signals that ask a process to stop, and what they do while there is nothing to save yet."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from align.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop."""
IGNORED_STAYS_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that a shell or ``nohup`` has a process in the background ignore, and that it goes on ignoring."""


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Leave at each of `SIGNALS` with the status of `StoppedError`, which asks for another start: before a run owns its
    folder, and after it has given it back, there is nothing to save.

    Only the main thread can set handlers; elsewhere nothing happens.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number not in IGNORED_STAYS_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave(number: int, _: FrameType | None) -> None:
    with contextlib.suppress(Exception):  # the handler may have interrupted a write to the same stream
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"align: {signal.Signals(number).name}: there is nothing to save; run it again to go on\n".encode())
    os._exit(StoppedError.exit_status)
