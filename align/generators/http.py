"""HTTP requests that are sent again until they are answered: for clients of reward services and of model servers.

A request has no effect on the server, so sending it again is safe. Redirects are not followed, and proxies are not
used.
"""

from __future__ import annotations

import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from align.errors import ConfigError

T = TypeVar("T")

RETRIED = {408, 425, 429}
"""Statuses beside 5xx after which the same request may succeed."""
IDLE_S = 1.0
"""A connection that lay idle for longer is not used again: servers close theirs after a few seconds."""
WORDS = 500
"""Signs of what a server says of a failure that a message holds."""
TLS, MOVED = 0, 300
"""Stand for a status where no answer came because the certificate is not trusted, and for all redirects."""


class Again(Exception):
    """A request that failed and may be sent again."""

    def __init__(self, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Wire(Protocol):
    """What a section says of a server: `align.config.HttpConfig`, `align.config.EndpointConfig`."""

    @property
    def url(self) -> str:
        """Address that paths are put behind."""
        ...

    @property
    def timeout_s(self) -> float:
        """Seconds that one request may take."""
        ...

    @property
    def retries(self) -> int:
        """How often a request is sent again."""
        ...

    @property
    def backoff_s(self) -> float:
        """Bound on the wait before the first repeat."""
        ...

    @property
    def max_backoff_s(self) -> float:
        """Bound on every wait."""
        ...


def secret(name: str, where: str, remedy: str) -> str:
    """Value of an environment variable that goes into a header; nothing without a name. Raises `ConfigError`."""
    value = os.environ.get(name, "")
    if name and not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            f"the environment variable {name} {'holds signs that no header can' if value else 'is not set'}",
            where=where,
            remedy=remedy,
        )
    return value


class Transport:
    """Connections to one server. Threads may use it at the same time."""

    def __init__(self, section: Wire, token_env: str, token: str, remedies: Mapping[int, str]):
        """``token``, the value of the variable ``token_env``, is sent as a bearer token where there is one.
        ``remedies``, by status (`TLS` and `MOVED` among them), end the messages of requests that repeating does not
        help."""
        self.section, self._token_env, self._token, self._remedies = section, token_env, token, remedies
        self._url = urlsplit(section.url)
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._random = random.SystemRandom()  # the generators that training goes by stay as they are
        self._lock = threading.Lock()
        self._idle: list[tuple[float, HTTPConnection]] = []

    def close(self) -> None:
        """End connections."""
        for _, connection in self._idle:
            connection.close()

    def repeated(self, attempt: Callable[[], T], stop: threading.Event, again: Callable[[], None]) -> T:
        """What ``attempt`` returns. As long as it raises `Again` it is called once more, ``again`` before each, until
        ``stop`` is set or the retries are used up; then its last `Again` is raised."""
        repeat = 0
        while True:
            try:
                return attempt()
            except Again as error:
                if repeat >= self.section.retries or stop.wait(self.pause(repeat, error.retry_after_s)):
                    raise Again(f"{repeat + 1} attempts; the last one: {error}") from None
            repeat += 1
            again()

    def pause(self, repeat: int, retry_after_s: float) -> float:
        """Seconds before a request is sent again."""
        bound = self.section.max_backoff_s
        # The exponent is cut where a float would overflow.
        drawn = self._random.uniform(0, min(bound, self.section.backoff_s * 2.0 ** min(repeat, 60)))
        return min(bound, max(drawn, retry_after_s))

    def post(self, path: str, body: bytes, limit: int, message_of: Callable[[bytes], str]) -> bytes:
        """The body of an answer with status 200, at most ``limit`` bytes; ``message_of`` reads the bodies of others.

        Raises `Again`, or `ConfigError` for what repeating does not change.
        """
        try:
            response, data = self._exchange(path, body, limit)
        except ssl.SSLCertVerificationError as error:
            raise self._refused(f"its certificate is not trusted: {error.verify_message}", TLS) from error
        except (OSError, HTTPException) as error:
            raise Again(f"{type(error).__name__}: {self._masked(str(error))}") from error
        raw = data.replace(self._token.encode() or b"\0", f"<{self._token_env}>".encode())  # `message_of` may cut it
        said = self._masked(message_of(raw))[:WORDS]
        if response.status in RETRIED or response.status >= 500:
            raise Again(f"status {response.status}: {said}", retry_after(response.getheader("Retry-After")))
        if 300 <= response.status < 400:
            said = f"it redirects to {self._masked(response.getheader('Location') or 'nowhere')[:200]}"
        if response.status != 200:
            raise self._refused(f"the service refuses with status {response.status}: {said}", response.status)
        return data

    def _masked(self, text: str) -> str:
        """Without the token, which a server may send back; to be done before a text is cut, or a part would stay."""
        return text.replace(self._token or "\0", f"<{self._token_env}>")

    def _exchange(self, path: str, body: bytes, limit: int) -> tuple[HTTPResponse, bytes]:
        """Status and headers of an answer, and its body of at most ``limit`` bytes, within the time of a request."""
        seconds, begun = self.section.timeout_s, time.monotonic()
        connection = self._connection()
        watchdog, late = None, threading.Event()
        try:
            if connection.sock is None:
                connection.connect()
            # A timeout of the socket starts anew with every byte; this ends an answer that comes by drops as well.
            left = max(0.0, begun + seconds - time.monotonic())
            watchdog = threading.Timer(left, _cut, [connection.sock, late])
            watchdog.daemon = True
            watchdog.start()
            connection.request("POST", self._url.path.rstrip("/") + path, body, self._headers())
            response = connection.getresponse()
            data = response.read(limit + 1)
            if late.is_set() or response.length or len(data) > limit:
                raise HTTPException(f"the answer ends after {len(data)} bytes, {limit} are the most")
        except (OSError, HTTPException) as error:
            connection.close()
            if isinstance(error, TimeoutError) or late.is_set():
                raise TimeoutError(f"no whole answer within {seconds:g} s") from error
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()
        if not response.will_close:
            with self._lock:
                self._idle.append((time.monotonic(), connection))
        return response, data

    def _connection(self) -> HTTPConnection:
        """One that was used just now, or a new one."""
        while True:
            with self._lock:
                since, connection = self._idle.pop() if self._idle else (0.0, None)
            if connection is None:
                break
            if time.monotonic() - since < IDLE_S:
                return connection
            connection.close()
        host, port, seconds = str(self._url.hostname), self._url.port, self.section.timeout_s
        if self._tls is None:
            return HTTPConnection(host, port, timeout=seconds)
        return HTTPSConnection(host, port, timeout=seconds, context=self._tls)

    def _headers(self) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Content-Type": "application/json", "Accept": "application/json", **token}

    def _refused(self, message: str, status: int) -> ConfigError:
        """An error that repeating does not change."""
        remedies = {TLS: "name the file of its authority in the environment variable SSL_CERT_FILE", **self._remedies}
        return ConfigError(
            message, where=self.section.url, remedy=remedies.get(MOVED if status // 100 == 3 else status)
        )


def _cut(connected: socket.socket, late: threading.Event) -> None:
    """End a connection that another thread reads from, once ``late`` tells it why."""
    late.set()
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # that of TLS would take its state from under the reader


def retry_after(header: str | None) -> float:
    """Seconds that a service asks to wait, as a number or as a date; 0 where it does not say."""
    if header is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        return max(
            0.0,
            float(header) if header.strip().isdecimal() else parsedate_to_datetime(header).timestamp() - time.time(),
        )
    return 0.0
