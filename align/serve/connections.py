"""HTTP connections with deadlines and limits, so that a client cannot use them up before its token is checked.

uvicorn bounds neither the time that a client takes to send headers nor the number of connections that wait for them.
Here each step has a deadline. Beyond the limit of connections, the one that has waited longest for its client is
closed. A request that is being answered is never closed for another one.
"""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 32768
"""Greatest length of the headers of a request, and of the line before a chunk of a body."""
HEADER_S = 10.0
"""Seconds for headers, from the start of a connection or from the first byte of a further request."""
REFUSED_S = 1.0
"""Seconds for a client to receive the answer to a malformed request; what else it sends is discarded."""
ANSWER_S = 60.0
"""Seconds for a client to receive its answer, beyond ``request_timeout_s`` and the time of its body."""
BACKLOG = 128
"""Connections that wait to be accepted, and that are accepted at once."""
MAX_CONNECTIONS = 1024
"""Open connections, if the process may open as many files."""
MIN_CONNECTIONS = 8
SPARE_FILES = 64
"""Files that the process may open besides its connections."""


def max_connections() -> int:
    """Number of connections within the limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    free = soft - len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else soft // 2
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, free - SPARE_FILES - BACKLOG))


class LimitedConnection(H11Protocol):
    """A connection. ``request_s`` bounds a request from the end of its headers until its answer is received."""

    limit, request_s = MAX_CONNECTIONS, 0.0
    _deadline: asyncio.TimerHandle | None = None
    _refused = False
    since = 0.0
    """When the current wait for the client began, by the clock of the event loop."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers. Beyond the limit, close the connection that has waited longest for its client."""
        super().connection_made(transport)
        self._wait(HEADER_S)
        if len(self.connections) > self.limit:
            others = [other for other in self.connections if isinstance(other, LimitedConnection) and other is not self]
            waiting = [other for other in others if other.waits]
            if waiting:
                min(waiting, key=lambda other: other.since).end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read bytes of the client; what follows a malformed request is discarded."""
        if self._refused:
            return
        before = self.cycle
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self.cycle is not before or (self.cycle is not None and not self.cycle.response_complete):
            if self.cycle is not before:
                self._wait(self.request_s)
        elif self._deadline is None:
            self._wait(HEADER_S)  # first bytes of a further request; later ones do not extend it

    def on_response_complete(self) -> None:
        """Wait for the next request; a pipelined one begins here."""
        before = self.cycle
        self._cancel_deadline()
        self.since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing() or self._refused:
            return
        if self.cycle is not before:
            self._wait(self.request_s)
        elif self.conn.trailing_data[0]:
            self._wait(HEADER_S)

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP (400), or headers that are too long (431)."""
        self._refused = True
        self._unset_keepalive_if_required()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.end()
            return
        large = len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES
        status, text = (431, "The headers are too long.") if large else (400, msg)
        headers = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(text)))]
        answer = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
        for event in (answer, h11.Data(data=text.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.flow.resume_reading()
        self._wait(REFUSED_S)

    @property
    def waits(self) -> bool:
        """Whether the service waits for the client: for headers, a body, or its receiving the answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_started or cycle.more_body

    def end(self) -> None:
        """Close at once and leave the count of connections."""
        self._cancel_deadline()
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self._cancel_deadline()
        self.since = self.loop.time()
        self._deadline = self.loop.call_later(seconds, self.end)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def protocol(request_s: float, limit: int) -> Any:
    """A connection class for at most ``limit`` connections whose requests take at most ``request_s`` seconds."""
    return type("LimitedConnection", (LimitedConnection,), {"limit": limit, "request_s": request_s + ANSWER_S})
