"""The HTTP application of the reward service: routes, token, limits, errors and counters, on Starlette.

It holds no model: a `ScoringBackend` scores, in this process or in others. The protocol is
`align.rewards.http_protocol`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Awaitable
from itertools import accumulate
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from align.config import RewardServiceConfig
from align.rewards import http_protocol
from align.rewards.http_protocol import HTTPError
from align.serve import openapi
from align.serve.batcher import LOADING_S, ResponseScores, ScoringBackend, error_answer

DRAINED = 4
"""A body that is too long is read up to this many times the limit, so that its sender gets the reason."""
BODIES = 16
"""Bodies of the greatest length whose bytes are held while they are read."""
BODY_S = 60.0
"""Seconds for a body to arrive, if ``request_timeout_s`` is not less."""
CLIENT_GONE = 499
"""Status that is counted if the client disconnects before its answer."""
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the latency histogram."""


class RewardApp:
    """An ASGI application with the routes of `align.rewards.http_protocol`."""

    def __init__(self, backend: ScoringBackend, config: RewardServiceConfig, model: str, token: str = ""):
        """``model`` is the name that the model is served under. An empty ``token`` lets everyone in."""
        self.backend = backend
        """Scores the requests to come; may be replaced."""
        self._config, self._model = config, model
        self._token = _digest(token) if token else None
        self._pending = 0
        self._counts: Counter[str] = Counter()
        self._seconds = [0] * (len(SECONDS) + 1)
        self._seconds_sum = 0.0
        self._held_bytes = 0
        self._router = Router(
            [
                Route(http_protocol.REWARDS, self._rewards, methods=["POST"]),
                Route(http_protocol.HEALTH, self._health),
                Route(http_protocol.MODELS, self._models),
                Route(http_protocol.METRICS, self._metrics),
                Route(http_protocol.OPENAPI, self._openapi),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Every error becomes a JSON answer."""
        path, started = scope["path"], False

        async def counting_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if path == http_protocol.REWARDS:
                    self._counts[f'requests_total{{status="{message["status"]}"}}'] += 1
            await send(message)

        scope["app"] = self  # so that the router raises HTTPException for an unknown path or method
        try:
            if path != http_protocol.HEALTH:
                self._authenticate(Request(scope))
            await self._router(scope, receive, counting_send)
        except (Exception, asyncio.CancelledError) as error:
            if started:
                raise
            await self._error(scope, error)(scope, receive, counting_send)

    def _error(self, scope: Scope, error: BaseException) -> Response:
        headers = {}
        if isinstance(error, asyncio.CancelledError):
            error = HTTPError(503, "the service is shutting down", retry_after_s=LOADING_S)
        elif isinstance(error, ClientDisconnect):
            error = HTTPError(CLIENT_GONE, "the client disconnected")
        elif isinstance(error, HTTPException) and error.status_code == 405:
            methods = sorted((error.headers or {})["Allow"].split(", "))
            headers["allow"] = ", ".join(methods)
            error = HTTPError(405, f"{scope['path']} takes {' and '.join(methods)}, not {scope['method'][:20]}")
        elif isinstance(error, HTTPException):
            paths = ", ".join(route.path for route in self._router.routes if isinstance(route, Route))
            error = HTTPError(404, f"there is no {scope['path'][:100]}; paths: {paths}")
        elif not isinstance(error, HTTPError):
            error = error_answer(error)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return _json(error.body(), error.status, headers)

    def _authenticate(self, request: Request) -> None:
        values = request.headers.getlist("authorization")
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        # Digests have one length, and the time of the comparison does not depend on where they differ.
        equal = self._token is None or hmac.compare_digest(_digest(token.strip()), self._token)
        if not equal or (self._token is not None and scheme.lower() != "bearer"):
            raise HTTPError(401, "this service requires its token: Authorization: Bearer TOKEN")

    async def _health(self, request: Request) -> Response:
        replicas = await self.backend.replicas()
        if not replicas:
            raise HTTPError(503, "no replica answers", retry_after_s=LOADING_S)
        return _json({"status": "ok", "replicas": replicas})

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [{"id": self._model, "object": "model", "owned_by": "align"}]})

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi.description(self._config, bool(self._token)))

    async def _metrics(self, request: Request) -> Response:
        """Counters in the text format of Prometheus."""
        counts = {**self._counts, "pending_conversations": self._pending, "replicas": await self.backend.replicas()}
        bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
        for bound, number in zip(bounds, accumulate(self._seconds), strict=True):
            counts[f'seconds_bucket{{le="{bound}"}}'] = number
        counts |= {"seconds_sum": f"{self._seconds_sum:.6f}", "seconds_count": sum(self._seconds)}
        text = "".join(f"align_reward_{name} {value}\n" for name, value in counts.items())
        return Response(text, headers={"content-type": "text/plain; version=0.0.4"})

    async def _rewards(self, request: Request) -> Response:
        start = time.perf_counter()
        parsed = http_protocol.read_request(await self._body(request), self._config.max_conversations)
        if parsed.model not in (None, self._model):
            raise HTTPError(404, f"model {parsed.model[:100]!r} is not served here, but {self._model!r}", "model")
        number = len(parsed.dialogues)
        if self._pending + number > self._config.max_queue:
            raise HTTPError(429, f"{self._pending} conversations are waiting, try again later", retry_after_s=1)
        self._pending += number
        try:
            scores = await self._while_connected(self.backend.score(parsed.dialogues), request)
        finally:
            self._pending -= number
        attributes = [dict(zip(scores.attribute_names, row, strict=True)) for row in scores.attributes]
        reply = http_protocol.answer_body(self._model, scores.values, attributes)
        self._counts["conversations_total"] += number
        self._counts["unscored_total"] += sum(item["score"] is None for item in reply["data"])
        seconds = time.perf_counter() - start
        self._seconds[sum(seconds > bound for bound in SECONDS)] += 1
        self._seconds_sum += seconds
        return _json(reply)

    async def _body(self, request: Request) -> bytes:
        """The body. Raises `HTTPError` if its header says that it is not JSON, if it is too long or too slow."""
        for value in request.headers.getlist("content-type"):
            kind = value.partition(";")[0].strip().lower()
            # curl and urllib send application/x-www-form-urlencoded unless their user sets a type.
            if kind not in ("application/json", "application/x-www-form-urlencoded"):
                raise HTTPError(415, f"the body must be application/json, not {kind[:100]}")
        limit, seconds = self._config.max_request_bytes, min(BODY_S, self._config.request_timeout_s)
        try:
            async with asyncio.timeout(seconds):
                body, length = await self._read(request, limit)
        except TimeoutError:
            raise HTTPError(408, f"the body did not arrive within {seconds:g} s") from None
        if length > limit:
            raise HTTPError(413, f"the body is longer than {limit} bytes: send fewer conversations in one request")
        return body

    async def _read(self, request: Request, limit: int) -> tuple[bytes, int]:
        """A body and its length. It holds at most ``limit`` bytes of this body, and `BODIES` times that of all bodies
        that are being read."""
        parts, length, held_bytes = [], 0, 0
        try:
            async for chunk in request.stream():
                length += len(chunk)
                if length <= limit:
                    parts.append(chunk)
                    held_bytes += len(chunk)
                    self._held_bytes += len(chunk)
                    if self._held_bytes > BODIES * limit:
                        raise HTTPError(429, "too many bodies are being read, try again later", retry_after_s=1)
                if length > DRAINED * limit:
                    break
            return b"".join(parts), length
        finally:
            self._held_bytes -= held_bytes

    async def _while_connected(self, scoring: Awaitable[ResponseScores], request: Request) -> ResponseScores:
        """The scores, unless they take too long or the client disconnects."""
        work, disconnect = asyncio.ensure_future(scoring), asyncio.ensure_future(request.receive())
        try:
            seconds = self._config.request_timeout_s
            await asyncio.wait({work, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if disconnect.done():
                raise ClientDisconnect
            raise HTTPError(504, f"not scored within {seconds:g} s", retry_after_s=1)
        finally:
            work.cancel()
            disconnect.cancel()


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, {**(headers or {}), "content-type": "application/json"})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
