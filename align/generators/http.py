"""HTTP client of reward services and model servers: JSON over POST, with threads, retries, deadlines and counts.

Retries are safe: a request has no effect on the server. Redirects are not followed and proxies are not used.
"""

from __future__ import annotations

import os
import random
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from align.config import HttpClientConfig
from align.errors import ConfigError

S = TypeVar("S")
T = TypeVar("T")

RETRIED = {408, 425, 429}
"""Statuses besides 5xx after which the request is retried."""
IDLE_S = 1.0
"""Connections that were idle for longer are not reused: servers close theirs after a few seconds."""
MAX_ERROR_CHARS = 500
"""Characters of a server's error text that a message quotes."""
TLS, REDIRECT = 0, 300
"""Keys of ``remedies`` for a certificate that is not trusted (no status came), and for every redirect."""


class RetryableError(Exception):
    """A request that failed and may be sent again."""

    def __init__(self, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BearerToken(NamedTuple):
    """A secret from an environment variable; both fields are empty for a server that needs none."""

    env: str
    value: str

    @classmethod
    def from_env(cls, name: str, where: str, remedy: str) -> BearerToken:
        """Raises `ConfigError` with ``where`` and ``remedy`` if ``name`` is given and the variable cannot be sent."""
        value = os.environ.get(name, "") if name else ""
        if name and not re.fullmatch(r"[!-~]+", value):
            fault = "contains characters that are not allowed in an HTTP header" if value else "is not set"
            raise ConfigError(f"environment variable {name} {fault}", where=where, remedy=remedy)
        return cls(name, value)

    def mask(self, text: str) -> str:
        """``text`` without the secret, which a server may echo. Mask before truncating, or a part would remain."""
        return text.replace(self.value, f"<{self.env}>") if self.value else text


class HttpClient:
    """Connections to one path of one server, a pool of threads, and counts. Thread-safe.

    ``requests`` (attempts) and ``retries`` are counted here; users add their own counts with `count`.
    """

    def __init__(
        self,
        config: HttpClientConfig,
        path: str,
        token: BearerToken,
        remedies: Mapping[int, str],
        read_error: Callable[[bytes], str],
    ):
        """``remedies`` by status (also `TLS` and `REDIRECT`) end the messages of errors that a retry does not help.
        ``read_error`` extracts the server's explanation from the body of a failed request."""
        self.config, self._token, self._remedies, self._read_error = config, token, remedies, read_error
        self._url = urlsplit(config.url)
        self._path = self._url.path.rstrip("/") + path
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token.value:
            self._headers["Authorization"] = f"Bearer {token.value}"
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._random = random.SystemRandom()  # leaves the random state of training alone
        self._pool = ThreadPoolExecutor(config.max_concurrency, "http-client")
        self._lock = threading.Lock()
        self._idle: list[tuple[float, HTTPConnection]] = []
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []

    def close(self) -> None:
        """End threads and connections."""
        self._pool.shutdown()
        for _, connection in self._idle:
            connection.close()

    def count(self, **counts: int) -> None:
        """Add to the counts."""
        with self._lock:
            self._counts.update(counts)

    def pop_counts(self) -> tuple[Counter[str], list[float]]:
        """Counts, and seconds of each successful attempt, since the last call."""
        with self._lock:
            counts, seconds = self._counts, self._seconds
            self._counts, self._seconds = Counter(), []
        return counts, seconds

    def map(
        self, function: Callable[[S, threading.Event], T], items: Sequence[S], finish_started: bool = False
    ) -> list[T]:
        """Results of ``function(item, stop)`` in the pool, in the order of ``items``.

        The first exception ends the call: waiting items are cancelled, retries end, and requests in flight are
        abandoned, or with ``finish_started`` waited for.
        """
        stop = threading.Event()
        futures = [self._pool.submit(function, item, stop) for item in items]
        try:
            for future in as_completed(futures):
                future.result()  # raises as soon as any request has failed, whatever its position
            return [future.result() for future in futures]
        except BaseException as error:
            stop.set()
            for future in futures:
                future.cancel()
            if finish_started and isinstance(error, Exception):
                wait(futures)
            raise

    def post(self, body: bytes, max_bytes: int, parse: Callable[[bytes], T], stop: threading.Event) -> T:
        """``parse`` of an answer with status 200 and at most ``max_bytes``, after as many retries as needed.

        ``parse`` raises ValueError for an answer that is unusable, which is retried. Raises `RetryableError` when the
        retries are used up or ``stop`` is set, and `ConfigError` for a failure that a retry does not change.
        """
        retry = 0
        self.count(requests=1)
        while True:
            start = time.perf_counter()
            try:
                data = self._post_once(body, max_bytes)
                try:
                    result = parse(data)
                except ValueError as error:
                    raise RetryableError(f"unusable answer: {error}") from error
                with self._lock:
                    self._seconds.append(time.perf_counter() - start)
                return result
            except RetryableError as error:
                if retry >= self.config.retries or stop.wait(self.pause(retry, error.retry_after_s)):
                    raise RetryableError(f"{retry + 1} attempts; last error: {error}") from None
            retry += 1
            self.count(requests=1, retries=1)

    def pause(self, retry: int, retry_after_s: float) -> float:
        """Random seconds before retry number ``retry``, from 0; at least ``retry_after_s`` within the bound."""
        bound = self.config.max_backoff_s
        # The exponent is limited because 2.0**1024 overflows.
        seconds = self._random.uniform(0, min(bound, self.config.backoff_s * 2.0 ** min(retry, 60)))
        return min(bound, max(seconds, retry_after_s))

    def _post_once(self, body: bytes, max_bytes: int) -> bytes:
        try:
            response, data = self._exchange(body, max_bytes)
        except ssl.SSLCertVerificationError as error:
            raise self._error(f"certificate is not trusted: {error.verify_message}", TLS) from error
        except (OSError, HTTPException) as error:
            raise RetryableError(f"{type(error).__name__}: {self._token.mask(str(error))}") from error
        status = response.status
        if status == 200:
            return data
        # Mask the bytes first: `read_error` may truncate them within the secret.
        raw = data.replace(self._token.value.encode() or b"\0", f"<{self._token.env}>".encode())
        text = self._token.mask(self._read_error(raw))[:MAX_ERROR_CHARS]
        if status in RETRIED or status >= 500:
            raise RetryableError(f"status {status}: {text}", retry_after(response.getheader("Retry-After")))
        if 300 <= status < 400:
            text = f"redirects to {self._token.mask(response.getheader('Location') or 'nowhere')[:200]}"
        raise self._error(f"the server refuses the request with status {status}: {text}", status)

    def _exchange(self, body: bytes, max_bytes: int) -> tuple[HTTPResponse, bytes]:
        """One request and its answer within ``timeout_s``."""
        seconds, start = self.config.timeout_s, time.monotonic()
        connection = self._connection()
        watchdog, late = None, threading.Event()
        try:
            if connection.sock is None:
                connection.connect()
            # The socket's timeout restarts with every byte; the watchdog also ends an answer that trickles in.
            remaining = max(0.0, start + seconds - time.monotonic())
            watchdog = threading.Timer(remaining, _shut_down, [connection.sock, late])
            watchdog.daemon = True
            watchdog.start()
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            data = response.read(max_bytes + 1)
            if late.is_set() or response.length or len(data) > max_bytes:
                raise HTTPException(f"the answer ends after {len(data)} bytes; the limit is {max_bytes}")
        except (OSError, HTTPException) as error:
            connection.close()
            if isinstance(error, TimeoutError) or late.is_set():
                raise TimeoutError(f"no complete answer within {seconds:g} s") from error
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()
        if not response.will_close:
            with self._lock:
                self._idle.append((time.monotonic(), connection))
        return response, data

    def _connection(self) -> HTTPConnection:
        """A connection that was used just now, or a new one."""
        while True:
            with self._lock:
                since, connection = self._idle.pop() if self._idle else (0.0, None)
            if connection is None:
                break
            if time.monotonic() - since < IDLE_S:
                return connection
            connection.close()
        host, port, seconds = str(self._url.hostname), self._url.port, self.config.timeout_s
        if self._tls is None:
            return HTTPConnection(host, port, timeout=seconds)
        return HTTPSConnection(host, port, timeout=seconds, context=self._tls)

    def _error(self, message: str, status: int) -> ConfigError:
        remedies = {TLS: "set SSL_CERT_FILE to the file of the certificate authority", **self._remedies}
        key = REDIRECT if status // 100 == 3 else status
        return ConfigError(message, where=self.config.url, remedy=remedies.get(key))


def _shut_down(connected: socket.socket, late: threading.Event) -> None:
    """End a connection that another thread reads from; ``late`` tells that thread why."""
    late.set()
    with suppress(OSError):
        # The TLS socket's own shutdown would discard its state while the other thread reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def retry_after(header: str | None) -> float:
    """Seconds of a ``Retry-After`` header, given as a number or as a date; 0 if it is absent or malformed."""
    if header is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        if header.strip().isdecimal():
            return max(0.0, float(header))
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0
