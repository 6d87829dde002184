"""HTTP connections of a service that a client cannot use up, before its token is checked.

uvicorn bounds neither the time that a client takes for the headers of a request nor the number of connections that wait
for them. Here each step has a deadline, and where there are too many connections the one that has waited longest for
its client is ended. A request that is being answered is never ended for another one.
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
"""Length of the headers of a request, and of the line before a chunk of a body."""
HEADER_S = 10.0
"""Seconds from the first moment of a connection, or the first byte of a further request, to the end of its headers."""
REFUSED_S = 1.0
"""Seconds in which a client whose request cannot be read may hear so; what else it sends is thrown away."""
ANSWER_S = 60.0
"""Seconds beyond ``request_timeout_s`` and the time of a body for a client to take its answer."""
BACKLOG = 128
"""Connections that wait until they are accepted, and that are accepted at a time."""
MAX_CONNECTIONS = 1024
"""Connections at a time, where the process may open as many files."""
MIN_CONNECTIONS = 8
SPARE_FILES = 64
"""Files that the process may open beside its connections."""


def max_connections() -> int:
    """How many connections there may be at a time, within the limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    free = soft - len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else soft // 2
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, free - SPARE_FILES - BACKLOG))


class Connection(H11Protocol):
    """One connection. ``request_s`` bounds a request from the end of its headers until its answer is taken."""

    limit, request_s = MAX_CONNECTIONS, 0.0
    _deadline: asyncio.TimerHandle | None = None
    _refused = False
    since = 0.0
    """When the client was last waited for anew, by the loop's clock."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers, in the place of a connection that has waited longer where there are too many."""
        super().connection_made(transport)
        self._wait(HEADER_S)
        if len(self.connections) > self.limit:
            waiting = [one for one in self.connections if isinstance(one, Connection) and one.waits and one is not self]
            if waiting:
                min(waiting, key=lambda one: one.since).end()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a client; further ones of a request that was refused are thrown away."""
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
            self._wait(HEADER_S)  # the first bytes of a further request; more of them do not lengthen it

    def on_response_complete(self) -> None:
        """The client may ask again; what is pipelined begins here."""
        before = self.cycle
        self._forget()
        self.since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing() or self._refused:
            return
        if self.cycle is not before:
            self._wait(self.request_s)
        elif self.conn.trailing_data[0]:
            self._wait(HEADER_S)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or headers without end (431)."""
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
        """Whether it is the client's turn: for headers, a body, or taking the answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_started or cycle.more_body

    def end(self) -> None:
        """Close at once, and count no more."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self._forget()
        self.since = self.loop.time()
        self._deadline = self.loop.call_later(seconds, self.end)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def protocol(request_s: float, limit: int) -> Any:
    """The class of connections, ``limit`` of them, whose requests take ``request_s`` seconds at most."""
    return type("Connection", (Connection,), {"limit": limit, "request_s": request_s + ANSWER_S})
