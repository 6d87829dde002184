"""A reward service as a judge: requests that are repeated, remembered and counted."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from align.data.chat import Dialogue
from align.errors import ConfigError, WorkerError
from align.rewards import api
from align.sections import Http

RETRIED = {408, 425, 429}
"""Statuses beside 5xx after which the same request may succeed."""
IDLE_S = 1.0
"""A connection that lay idle for longer is not used again: servers close theirs after a few seconds."""
ANSWER_BYTES, SCORE_BYTES = 1 << 16, 1 << 12
"""Length of the longest answer that is read, and what each conversation adds to it."""
TLS = 0
"""Stands for a status where no answer came because the certificate is not trusted."""


class _Again(Exception):
    """A request that failed and may be sent again."""

    def __init__(self, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class _Counts:
    requests: int = 0
    retries: int = 0
    failures: int = 0
    cache_hits: int = 0
    scored: int = 0
    unscored: int = 0
    seconds: list[float] = field(default_factory=list)


class HttpJudge:
    """Scores of a reward service.

    A request has no effect on the service, so sending it again is safe. Scores of requests that were answered are
    remembered also when another one of the same call fails. Redirects are not followed, and proxies are not used.
    """

    def __init__(self, section: Http, failed: Literal["fail", "drop"] = "fail"):
        """``failed`` is what follows when the retries are used up: `WorkerError`, or NaN for those conversations.

        Raises `ConfigError` where the token is missing or cannot be sent.
        """
        self._section, self._failed = section, failed
        self._url = urlsplit(section.url)
        self._token = _token(section.token_env)
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._pool = ThreadPoolExecutor(section.max_concurrency, "reward-http")
        self._random = random.SystemRandom()  # the generators that training goes by stay as they are
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._idle: list[tuple[float, HTTPConnection]] = []
        self._counts = _Counts()

    def score(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """(B,) float32; NaN where the service gave no score, or with ``drop`` did not answer.

        Raises `WorkerError` when the retries are used up, and `ConfigError` at once for an answer that repeating cannot
        change.
        """
        keys = [self._key(index, dialogue) for index, dialogue in enumerate(dialogues)]
        known = self._recall(keys)
        asked = [(key, one) for key, one in dict(zip(keys, dialogues, strict=True)).items() if key not in known]
        with self._lock:
            self._counts.cache_hits += len(keys) - len(asked)
        stop, size = threading.Event(), self._section.batch_size
        futures = [
            self._pool.submit(self._ask, asked[start : start + size], stop) for start in range(0, len(asked), size)
        ]
        try:
            for future in as_completed(futures):
                known |= future.result()
        except BaseException as error:
            _give_up(futures, stop, wait_for_them=isinstance(error, Exception))
            raise
        return torch.tensor([known[key] for key in keys], dtype=torch.float32)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, which it sets back.

        ``requests`` sent, ``retries`` among them, ``failures`` given up; conversations: ``cache_hits`` that were not
        asked for, ``scored`` with a number, ``unscored`` without; ``latency_*`` in seconds of requests that were
        answered, when there are any.
        """
        with self._lock:
            counts, self._counts = self._counts, _Counts()
        found = {name: float(value) for name, value in vars(counts).items() if name != "seconds"}
        if seconds := sorted(counts.seconds):
            found["latency_mean"] = sum(seconds) / len(seconds)
            for percent in (50, 95):
                found[f"latency_p{percent}"] = seconds[math.ceil(percent / 100 * len(seconds)) - 1]
        return found

    def close(self) -> None:
        """End threads and connections."""
        self._pool.shutdown()
        for _, connection in self._idle:
            connection.close()

    def _key(self, index: int, dialogue: Dialogue) -> bytes:
        """What tells conversations apart: their content where scores are remembered, else their place."""
        return hashlib.sha256(api.canonical(dialogue)).digest() if self._section.cache_size else b"%d" % index

    def _recall(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
            for key in known:
                self._cache.move_to_end(key)
        return known

    def _remember(self, scores: dict[bytes, float]) -> None:
        finite = {key: score for key, score in scores.items() if math.isfinite(score)}
        with self._lock:
            self._counts.scored += len(finite)
            self._counts.unscored += len(scores) - len(finite)
            self._cache |= finite
            while len(self._cache) > self._section.cache_size:
                self._cache.popitem(last=False)

    def _ask(self, part: Sequence[tuple[bytes, Dialogue]], stop: threading.Event) -> dict[bytes, float]:
        """Scores of the conversations of one request, by key."""
        keys = [key for key, _ in part]
        body = api.request([dialogue for _, dialogue in part])
        repeat = 0
        while True:
            with self._lock:
                self._counts.requests += 1
                self._counts.retries += bool(repeat)
            try:
                scores = dict(zip(keys, self._send(body, len(part)), strict=True))
                self._remember(scores)
                return scores
            except _Again as error:
                if repeat < self._section.retries and not stop.wait(self._pause(repeat, error.retry_after_s)):
                    repeat += 1
                    continue
                with self._lock:
                    self._counts.failures += 1
                    self._counts.unscored += len(keys)
                if self._failed == "fail":
                    raise self._given_up(repeat + 1, error) from None
                return dict.fromkeys(keys, math.nan)

    def _pause(self, repeat: int, retry_after_s: float) -> float:
        """Seconds before a request is sent again."""
        bound = self._section.max_backoff_s
        # The exponent is cut where a float would overflow.
        drawn = self._random.uniform(0, min(bound, self._section.backoff_s * 2.0 ** min(repeat, 60)))
        return min(bound, max(drawn, retry_after_s))

    def _given_up(self, attempts: int, error: _Again) -> WorkerError:
        return WorkerError(
            f"the reward service gave no scores in {attempts} attempts; the last one: {error}",
            where=self._section.url,
            remedy=f"see that it runs (GET {api.HEALTH}) and its log; wait for longer with http.retries and "
            "http.timeout_s; failed=drop goes on without such prompts",
        )

    def _send(self, body: bytes, count: int) -> list[float]:
        """One request. Raises `_Again`, or `ConfigError`."""
        begun = time.perf_counter()
        try:
            response, data = self._exchange(body, ANSWER_BYTES + count * SCORE_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise self._refused(f"its certificate is not trusted: {error.verify_message}", TLS) from error
        except (OSError, HTTPException) as error:
            raise _Again(f"{type(error).__name__}: {error}") from error
        said = api.message_of(data).replace(self._token or "\0", f"<{self._section.token_env}>")
        if response.status in RETRIED or response.status >= 500:
            raise _Again(f"status {response.status}: {said}", _retry_after(response.getheader("Retry-After")))
        if 300 <= response.status < 400:
            said = f"it redirects to {(response.getheader('Location') or 'nowhere')[:200]}"
        if response.status != 200:
            raise self._refused(f"the service refuses with status {response.status}: {said}", response.status)
        try:
            scores = api.read_answer(data, count)
        except ValueError as error:
            raise _Again(f"an answer that cannot be used: {error}") from error
        with self._lock:
            self._counts.seconds.append(time.perf_counter() - begun)
        return scores

    def _exchange(self, body: bytes, limit: int) -> tuple[HTTPResponse, bytes]:
        """Status and headers of an answer, and its body of at most ``limit`` bytes, within the time of a request."""
        seconds, begun = self._section.timeout_s, time.monotonic()
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
            connection.request("POST", self._url.path.rstrip("/") + api.REWARDS, body, self._headers())
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
        host, port, seconds = str(self._url.hostname), self._url.port, self._section.timeout_s
        if self._tls is None:
            return HTTPConnection(host, port, timeout=seconds)
        return HTTPSConnection(host, port, timeout=seconds, context=self._tls)

    def _headers(self) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Content-Type": "application/json", "Accept": "application/json", **token}

    def _refused(self, message: str, status: int) -> ConfigError:
        """An error that repeating does not change."""
        token = f"environment variable {self._section.token_env}" if self._token else "http.token_env=NAME"
        remedies = {
            401: f"set the token of the service: {token}",
            403: f"set the token of the service: {token}",
            404: f"http.url is the address without {api.REWARDS}",
            413: "lower http.batch_size, or raise the limits of the service",
            TLS: "name the file of its authority in the environment variable SSL_CERT_FILE",
        }
        remedy = "set http.url to where the service is" if 300 <= status < 400 else remedies.get(status)
        return ConfigError(message, where=self._section.url, remedy=remedy)


def _token(name: str) -> str:
    """Value of an environment variable; nothing without a name."""
    value = os.environ.get(name, "")
    if name and not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            f"the environment variable {name} {'holds signs that no header can' if value else 'is not set'}",
            where="http.token_env",
            remedy=f"export {name}=TOKEN before the start; workers on Ray get it when its name begins with "
            "ALIGN_REWARD_TOKEN",
        )
    return value


def _cut(connected: socket.socket, late: threading.Event) -> None:
    """End a connection that another thread reads from, once ``late`` tells it why."""
    late.set()
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # that of TLS would take its state from under the reader


def _retry_after(header: str | None) -> float:
    """Seconds that a service asks to wait, as a number or as a date; 0 where it does not say."""
    if header is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        return max(
            0.0,
            float(header) if header.strip().isdecimal() else parsedate_to_datetime(header).timestamp() - time.time(),
        )
    return 0.0


def _give_up(futures: Sequence[Future[dict[bytes, float]]], stop: threading.Event, wait_for_them: bool) -> None:
    """Send nothing more. Requests under way are waited for, because their scores are kept."""
    stop.set()
    for future in futures:
        future.cancel()
    if wait_for_them:
        wait(futures)
