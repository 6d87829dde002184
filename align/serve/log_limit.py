"""Log lines of which there are no more than one a minute of a kind, without secrets."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

from align.utils.redact import redact

PERIOD_S = 60.0
"""Seconds in which what is logged again of one kind is only counted."""
MAX_KINDS = 1000
"""Kinds that are told apart; beyond, all are forgotten and begin anew."""


class LogLimit(logging.Filter):
    """Lets the first message of a kind through in each `PERIOD_S`, with the number of those before that it held back.

    As a filter of a logger it takes messages with one format for one kind. Threads may use it at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[str, tuple[float, int]] = {}

    def admit(self, kind: str) -> int | None:
        """Messages of this kind that were held back since the last one; None where this one is held back too."""
        now = time.monotonic()
        with self._lock:
            since, count = self._kinds.get(kind, (-PERIOD_S, 0))
            if now - since < PERIOD_S:
                self._kinds[kind] = since, count + 1
                return None
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            self._kinds[kind] = now, 0
        return count

    def print(self, kind: str, text: str) -> None:
        """Write ``text`` to stderr, unless its kind was logged within the last `PERIOD_S`."""
        held_back = self.admit(kind)
        if held_back is not None:
            more = f"\n(and {held_back} more of this kind before)" if held_back else ""
            print(redact(text + more), file=sys.stderr, flush=True)

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`. The text that is logged holds no secret; of an exception, type and frames alone."""
        held_back = self.admit(f"{record.name} {str(record.msg)[:100]}")
        if held_back is None:
            return False
        text = record.getMessage()
        if record.exc_info and record.exc_info[0]:
            frames = "".join(traceback.format_tb(record.exc_info[2]))
            text = f"{text}: {record.exc_info[0].__name__}\n{frames}".rstrip()
        more = f" (and {held_back} more of this kind before)" if held_back else ""
        record.msg, record.args, record.exc_info, record.exc_text = redact(text + more), (), None, None
        return True
