"""Log lines without secrets, at most one per minute and kind."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

from align.utils.security import redact

PERIOD_S = 60.0
"""Seconds in which further messages of a kind are only counted."""
MAX_KINDS = 1000
"""Kinds whose times are kept; beyond it, all are forgotten."""


class LogLimit(logging.Filter):
    """Lets one message of each kind through per `PERIOD_S`, with the number of messages that it held back before.

    As a filter of a logger, the kind of a message is its format. Threads may share one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[str, tuple[float, int]] = {}

    def admit(self, kind: str) -> str | None:
        """None if this message is held back, otherwise a note on how many of its kind were."""
        now = time.monotonic()
        with self._lock:
            last, count = self._kinds.get(kind, (-PERIOD_S, 0))
            if now - last < PERIOD_S:
                self._kinds[kind] = last, count + 1
                return None
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            self._kinds[kind] = now, 0
        return f"(and {count} more of this kind before)" if count else ""

    def print(self, kind: str, text: str) -> None:
        """Write ``text`` to stderr, unless a message of its kind was logged within `PERIOD_S`."""
        note = self.admit(kind)
        if note is not None:
            print(redact(f"{text}\n{note}" if note else text), file=sys.stderr, flush=True)

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`. Of an exception, only type and frames are logged: its text may hold secrets."""
        note = self.admit(f"{record.name} {str(record.msg)[:100]}")
        if note is None:
            return False
        text = record.getMessage()
        if record.exc_info and record.exc_info[0]:
            frames = "".join(traceback.format_tb(record.exc_info[2]))
            text = f"{text}: {record.exc_info[0].__name__}\n{frames}".rstrip()
        record.msg, record.args = redact(f"{text} {note}" if note else text), ()
        record.exc_info = record.exc_text = None
        return True
