"""Signals that ask a process to stop: handlers that are set and restored together, and a stop with nothing to save."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from align.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a process to stop."""
IGNORED_STAYS_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that a shell or ``nohup`` sets to ignored for a background process; they stay ignored."""


class SignalHandlers:
    """One handler for several signals. Only the main thread can set handlers; in another thread nothing happens."""

    def __init__(
        self,
        handler: Callable[[int, FrameType | None], None],
        signals: Sequence[signal.Signals] = SIGNALS,
        stay_ignored: Sequence[signal.Signals] = IGNORED_STAYS_IGNORED,
    ):
        self._handler, self._signals, self._stay_ignored = handler, signals, stay_ignored
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Set the handler. A second call sets it again where a library has replaced it: ``ray.init`` sets a handler
        for SIGTERM that raises SystemExit."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            current = signal.getsignal(number)
            if current == self._handler or (number in self._stay_ignored and current is signal.SIG_IGN):
                continue
            self._previous.setdefault(number, signal.SIG_DFL if current is None else current)
            signal.signal(number, self._handler)

    def set_default(self) -> None:
        """Let the next signal act as if no handler had been set."""
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        """Set the handlers that were there before `install`."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        self._previous = {}


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Exit at each of `SIGNALS` with the status of `StoppedError`, which asks for another start.

    For the time before a run owns its folder and after it has released it, when there is nothing to save.
    """
    handlers = SignalHandlers(_leave)
    handlers.install()
    try:
        yield
    finally:
        handlers.restore()


def _leave(number: int, _: FrameType | None) -> None:
    with contextlib.suppress(Exception):  # the handler may have interrupted a write to the same stream
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        text = f"align: {signal.Signals(number).name}: nothing to save; run the same command again to resume\n"
        os.write(2, text.encode())
    os._exit(StoppedError.exit_status)
