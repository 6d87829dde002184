"""A reward service as a judge: requests that are repeated, remembered and counted."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from align.config import HttpConfig
from align.data.chat import Dialogue
from align.errors import WorkerError
from align.generators import http
from align.generators.http import Again, Transport
from align.rewards import http_protocol

ANSWER_BYTES, SCORE_BYTES = 1 << 16, 1 << 12
"""Length of the longest answer that is read, and what each conversation adds to it."""


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

    Scores of requests that were answered are remembered also when another one of the same call fails.
    """

    def __init__(self, section: HttpConfig, failed: Literal["fail", "drop"] = "fail"):
        """``failed`` is what follows when the retries are used up: `WorkerError`, or NaN for those conversations.

        Raises `ConfigError` where the token is missing or cannot be sent.
        """
        self._section, self._failed = section, failed
        token = http.secret(section.token_env, "http.token_env", _EXPORT.format(name=section.token_env))
        self._transport = Transport(section, section.token_env, token, _remedies(section))
        self._pool = ThreadPoolExecutor(section.max_concurrency, "reward-http")
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, float] = OrderedDict()
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
        self._transport.close()

    def _key(self, index: int, dialogue: Dialogue) -> bytes:
        """What tells conversations apart: their content where scores are remembered, else their place."""
        return hashlib.sha256(http_protocol.canonical(dialogue)).digest() if self._section.cache_size else b"%d" % index

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
        body = http_protocol.request([dialogue for _, dialogue in part])
        self._sent()
        try:
            found = self._transport.repeated(lambda: self._send(body, len(part)), stop, lambda: self._sent(again=True))
        except Again as error:
            with self._lock:
                self._counts.failures += 1
                self._counts.unscored += len(keys)
            if self._failed == "fail":
                raise self._given_up(error) from None
            return dict.fromkeys(keys, math.nan)
        scores = dict(zip(keys, found, strict=True))
        self._remember(scores)
        return scores

    def _sent(self, again: bool = False) -> None:
        with self._lock:
            self._counts.requests += 1
            self._counts.retries += again

    def _given_up(self, error: Again) -> WorkerError:
        return WorkerError(
            f"the reward service gave no scores in {error}",
            where=self._section.url,
            remedy=f"see that it runs (GET {http_protocol.HEALTH}) and its log; wait for longer with http.retries and "
            "http.timeout_s; failed=drop goes on without such prompts",
        )

    def _send(self, body: bytes, count: int) -> list[float]:
        """One request. Raises `Again`, or `ConfigError`."""
        begun = time.perf_counter()
        data = self._transport.post(
            http_protocol.REWARDS, body, ANSWER_BYTES + count * SCORE_BYTES, http_protocol.message_of
        )
        try:
            scores = http_protocol.read_answer(data, count)
        except ValueError as error:
            raise Again(f"an answer that cannot be used: {error}") from error
        with self._lock:
            self._counts.seconds.append(time.perf_counter() - begun)
        return scores


_EXPORT = "export {name}=TOKEN before the start; workers on Ray get it when its name begins with ALIGN_REWARD_TOKEN"


def _remedies(section: HttpConfig) -> dict[int, str]:
    token = f"environment variable {section.token_env}" if section.token_env else "http.token_env=NAME"
    return {
        http.MOVED: "set http.url to where the service is",
        401: f"set the token of the service: {token}",
        403: f"set the token of the service: {token}",
        404: f"http.url is the address without {http_protocol.REWARDS}",
        413: "lower http.batch_size, or raise the limits of the service",
    }


def _give_up(futures: Sequence[Future[dict[bytes, float]]], stop: threading.Event, wait_for_them: bool) -> None:
    """Send nothing more. Requests under way are waited for, because their scores are kept."""
    stop.set()
    for future in futures:
        future.cancel()
    if wait_for_them:
        wait(futures)
