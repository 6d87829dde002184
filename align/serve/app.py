"""The reward service without the processes around it: an ASGI application, and batches for a judge.

The application is plain ASGI, so that it runs under any such server. It holds no model: what scores is a `Scorer`, here
or in other processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from align.config import RewardServiceConfig
from align.data.chat import Dialogue
from align.errors import AlignError, ConversationError
from align.rewards import http_protocol
from align.rewards.base import RewardScorer
from align.rewards.http_protocol import HTTPError
from align.serve import openapi
from align.serve.log_limit import LogLimit

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
DRAINED = 4
"""A body that is too long is read up to this many times the limit, so that its sender hears why it is refused."""
BODIES = 16
"""Bodies of the greatest length whose bytes are held at a time while they are read."""
BODY_S = 60.0
"""Seconds for a body to come, where ``request_timeout_s`` is not less."""
GONE = 499
"""Status that is counted where the client went away before its answer."""
LOADING_S = 5
"""Seconds after which a client is to ask again that came before there was a replica."""
ERRORS = LogLimit()
"""What the service logs of scores that failed."""
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the histogram of latencies."""


class Scores(NamedTuple):
    """What a judge says of conversations, in their order."""

    values: list[float]
    names: tuple[str, ...]
    """Of the attributes; none for a judge without."""
    attributes: list[list[float]]

    def slice(self, start: int, end: int) -> Scores:
        """Those of some of the conversations."""
        return Scores(self.values[start:end], self.names, self.attributes[start:end])


class Scorer(Protocol):
    """Where the application sends conversations."""

    async def score(self, dialogues: list[Dialogue]) -> Scores:
        """Raises `HTTPError`."""
        ...

    async def replicas(self) -> int:
        """How many replicas answer."""
        ...


class Loading:
    """The `Scorer` of a service that has none yet."""

    async def score(self, dialogues: list[Dialogue]) -> Scores:
        """Raises `HTTPError`."""
        raise HTTPError(503, "the model is being loaded", retry_after_s=LOADING_S)

    async def replicas(self) -> int:
        """None."""
        return 0


def ask(scorer: RewardScorer, dialogues: Sequence[Dialogue]) -> Scores:
    """Scores, with attributes if the head has several."""
    if not scorer.attribute_names:
        return Scores(scorer.score(dialogues).tolist(), (), [])
    score_B, attribute_BA = scorer.score_attributes(dialogues)
    return Scores(score_B.tolist(), scorer.attribute_names, attribute_BA.tolist())


class Batcher:
    """A judge that scores conversations of several requests at a time, in a thread of its own."""

    def __init__(self, judge: RewardScorer, section: RewardServiceConfig):
        self._judge, self._section = judge, section
        self._queue: queue.SimpleQueue[tuple[list[Dialogue], Future[Scores]]] = queue.SimpleQueue()
        self._since: float | None = None
        self._thread = threading.Thread(target=self._work, name="reward-batches", daemon=True)
        self._thread.start()

    async def score(self, dialogues: list[Dialogue]) -> Scores:
        """See `Scorer`. A request that is cancelled before its batch begins costs nothing."""
        future: Future[Scores] = Future()
        self._queue.put((dialogues, future))
        return await asyncio.wrap_future(future)

    async def replicas(self) -> int:
        """See `Scorer`."""
        return int(self.stuck() is None)

    def stuck(self) -> str | None:
        """Why nothing more is to be expected of this judge."""
        since = self._since
        if since is not None and time.monotonic() - since > self._section.request_timeout_s:
            return f"a batch takes longer than request_timeout_s ({self._section.request_timeout_s:g})"
        return None if self._thread.is_alive() else "the thread that scores has ended"

    def _work(self) -> None:
        while True:
            waiting = [one for one in self._gather() if one[1].set_running_or_notify_cancel()]
            if waiting:
                self._score(waiting)
                self._since = None

    def _gather(self) -> list[tuple[list[Dialogue], Future[Scores]]]:
        """Requests until the batch is full, without those that were cancelled, or has waited for its time."""
        batch = [self._queue.get()]
        end = time.monotonic() + self._section.batch_wait_s
        while sum(len(dialogues) for dialogues, one in batch if not one.cancelled()) < self._section.max_batch_size:
            try:
                batch.append(self._queue.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _score(self, batch: Sequence[tuple[list[Dialogue], Future[Scores]]]) -> None:
        """Answer all requests of a batch. Where it fails, each is scored alone: one must not spoil the others."""
        self._since = time.monotonic()
        together = [dialogue for dialogues, _ in batch for dialogue in dialogues]
        try:
            scores = ask(self._judge, together)
        except BaseException as error:  # SystemExit too: without this thread nothing more would be scored
            if len(batch) == 1:
                batch[0][1].set_exception(refusal(error))
                return
            for one in batch:
                self._score([one])
            return
        ends = list(accumulate(len(dialogues) for dialogues, _ in batch))
        for (dialogues, future), end in zip(batch, ends, strict=True):
            future.set_result(scores.slice(end - len(dialogues), end))


def refusal(error: BaseException) -> HTTPError:
    """What the client is told of an error: of a conversation that cannot be read, why; of any other, the type alone.

    The log gets the frames, without the text of the error, which may quote a conversation.
    """
    if isinstance(error, ConversationError) and error.public:
        return HTTPError(400, error.public, "input")
    while isinstance(error, AlignError) and error.__cause__ is not None:
        error = error.__cause__  # what a function or a template raised
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    ERRORS.print(f"{kind} at {place}", f"scoring failed: {kind}\n{''.join(traceback.format_list(frames))}".rstrip())
    return HTTPError(500, f"scoring failed: {kind}")


class Application:
    """The service's side of `align.rewards.http_protocol`, as an ASGI application."""

    def __init__(self, scorer: Scorer, section: RewardServiceConfig, model: str, token: str = ""):
        """``model`` is the name that the model is served by. Without a ``token`` none is asked for."""
        self.scorer = scorer
        """Who scores the requests to come; may be replaced."""
        self._section, self._model = section, model
        self._token = _digest(token) if token else None
        self._pending = 0
        self._counts: Counter[str] = Counter()
        self._seconds: list[int] = [0] * (len(SECONDS) + 1)
        self._seconds_sum = 0.0
        self._held_bytes = 0
        self._handlers: dict[str, Callable[[dict[str, Any], Receive], Awaitable[bytes]]] = {
            http_protocol.REWARDS: self._rewards,
            http_protocol.HEALTH: self._health,
            http_protocol.MODELS: self._models,
            http_protocol.METRICS: self._metrics,
            http_protocol.OPENAPI: self._openapi,
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        headers = [(b"content-type", b"application/json")]
        try:
            status, body = 200, await self._route(scope, receive)
        except (Exception, asyncio.CancelledError) as error:
            refused = _refused(error)
            status, body = refused.status, json.dumps(refused.body()).encode()
            headers += [(b"retry-after", b"%d" % refused.retry_after_s)] if refused.retry_after_s is not None else []
            headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
            headers += [(b"allow", ", ".join(self._methods(scope["path"])).encode())] if status == 405 else []
        if scope["path"] == http_protocol.METRICS and status == 200:
            headers = [(b"content-type", b"text/plain; version=0.0.4")]
        if scope["path"] == http_protocol.REWARDS:
            self._counts[f'requests_total{{status="{status}"}}'] += 1
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})

    async def _route(self, scope: dict[str, Any], receive: Receive) -> bytes:
        path = scope["path"]
        if path != http_protocol.HEALTH:
            self._authenticate(scope)
        if path not in self._handlers:
            raise HTTPError(404, f"there is no {path[:100]}; paths: {', '.join(self._handlers)}")
        if scope["method"] not in (methods := self._methods(path)):
            raise HTTPError(405, f"{path} takes {' and '.join(methods)}, not {scope['method'][:20]}")
        return await self._handlers[path](scope, receive)

    @staticmethod
    def _methods(path: str) -> tuple[str, ...]:
        return ("POST",) if path == http_protocol.REWARDS else ("GET", "HEAD")

    def _authenticate(self, scope: dict[str, Any]) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("", "", "")
        # The same length for all, and in time that tells nothing about where two differ.
        equal = self._token is None or hmac.compare_digest(_digest(token.strip()), self._token)
        if not equal or (self._token is not None and scheme.lower() != "bearer"):
            raise HTTPError(401, "this service asks for its token: Authorization: Bearer TOKEN")

    async def _health(self, _: dict[str, Any], __: Receive) -> bytes:
        replicas = await self.scorer.replicas()
        if not replicas:
            raise HTTPError(503, "no replica answers", retry_after_s=LOADING_S)
        return json.dumps({"status": "ok", "replicas": replicas}).encode()

    async def _models(self, _: dict[str, Any], __: Receive) -> bytes:
        model = {"id": self._model, "object": "model", "owned_by": "align"}
        return json.dumps({"object": "list", "data": [model]}).encode()

    async def _openapi(self, _: dict[str, Any], __: Receive) -> bytes:
        return json.dumps(openapi.description(self._section, bool(self._token))).encode()

    async def _metrics(self, _: dict[str, Any], __: Receive) -> bytes:
        """Prometheus' text format."""
        counts = {**self._counts, "pending_conversations": self._pending, "replicas": await self.scorer.replicas()}
        bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
        for bound, number in zip(bounds, accumulate(self._seconds), strict=True):
            counts[f'seconds_bucket{{le="{bound}"}}'] = number
        lines = [f"align_reward_{name} {value}" for name, value in counts.items()]
        lines += [
            f"align_reward_seconds_sum {self._seconds_sum:.6f}",
            f"align_reward_seconds_count {sum(self._seconds)}",
        ]
        return ("\n".join(lines) + "\n").encode()

    async def _rewards(self, scope: dict[str, Any], receive: Receive) -> bytes:
        begun = time.perf_counter()
        asked = http_protocol.read_request(await self._body(scope, receive), self._section.max_conversations)
        if asked.model not in (None, self._model):
            raise HTTPError(404, f"model {asked.model[:100]!r} is not served here, but {self._model!r}", "model")
        number = len(asked.dialogues)
        if self._pending + number > self._section.max_queue:
            raise HTTPError(429, f"{self._pending} conversations are waited for, try again later", retry_after_s=1)
        self._pending += number
        try:
            scores = await self._while_connected(self.scorer.score(asked.dialogues), receive)
        finally:
            self._pending -= number
        found = [dict(zip(scores.names, row, strict=True)) for row in scores.attributes]
        reply = http_protocol.answer_body(self._model, scores.values, found)
        self._counts["conversations_total"] += number
        self._counts["unscored_total"] += sum(item["score"] is None for item in reply["data"])
        self._observe(time.perf_counter() - begun)
        return json.dumps(reply).encode()

    def _observe(self, seconds: float) -> None:
        self._seconds[sum(seconds > bound for bound in SECONDS)] += 1
        self._seconds_sum += seconds

    async def _body(self, scope: dict[str, Any], receive: Receive) -> bytes:
        """Raises `HTTPError` for a body that is not JSON by its header, is too long or comes too slowly."""
        _require_json(scope["headers"])
        limit, seconds = self._section.max_request_bytes, min(BODY_S, self._section.request_timeout_s)
        try:
            async with asyncio.timeout(seconds):
                body, length = await self._read(receive, limit)
        except TimeoutError:
            raise HTTPError(408, f"no whole body in {seconds:g} s") from None
        if length > limit:
            raise HTTPError(413, f"the body is longer than {limit} bytes: ask for fewer conversations in one request")
        return body

    async def _read(self, receive: Receive, limit: int) -> tuple[bytes, int]:
        """A body and its length; of one that is longer than ``limit``, no more than that is held, and of all bodies
        that are being read no more than `BODIES` times that."""
        parts, length, held, more = [], 0, 0, True
        try:
            while more and length <= DRAINED * limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HTTPError(GONE, "the client went away")
                chunk, more = message.get("body", b""), message.get("more_body", False)
                length += len(chunk)
                if length <= limit:
                    parts.append(chunk)
                    held += len(chunk)
                    self._held_bytes += len(chunk)
                    if self._held_bytes > BODIES * limit:
                        raise HTTPError(429, "too many bodies are being read, try again later", retry_after_s=1)
            return b"".join(parts), length
        finally:
            self._held_bytes -= held

    async def _while_connected(self, coroutine: Awaitable[Scores], receive: Receive) -> Scores:
        """A result, unless it takes too long or nobody waits for it any more."""
        work, gone = asyncio.ensure_future(coroutine), asyncio.ensure_future(receive())
        try:
            seconds = self._section.request_timeout_s
            await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise HTTPError(GONE, "the client went away")
            raise HTTPError(504, f"not scored within {seconds:g} s", retry_after_s=1)
        finally:
            work.cancel()
            gone.cancel()


def _refused(error: BaseException) -> HTTPError:
    """The answer to a request that failed."""
    if isinstance(error, asyncio.CancelledError):
        return HTTPError(503, "the service ends", retry_after_s=LOADING_S)
    return error if isinstance(error, HTTPError) else refusal(error)


def _require_json(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise `HTTPError` for a body with another content type. ``application/x-www-form-urlencoded`` passes: it is the
    default of curl and of Python's urllib."""
    for name, value in headers:
        kind = value.decode("latin-1").partition(";")[0].strip().lower()
        if name == b"content-type" and kind not in ("application/json", "application/x-www-form-urlencoded"):
            raise HTTPError(415, f"the body is application/json, not {kind[:100]}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
