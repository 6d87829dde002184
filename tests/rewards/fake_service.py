"""A reward service that a test makes fail in every way."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from align.config import HttpRewardConfig
from align.data.chat import Dialogue, Message
from align.rewards import http, http_protocol
from align.rewards.http import HttpScorer

QUICK = {"backoff_s": 0.001, "max_backoff_s": 0.01, "timeout_s": 5.0}


NAN = math.nan


def dialogue(number: int, text: str = "") -> Dialogue:
    """A conversation whose score is its number."""
    return Dialogue((Message("system", "be brief"), Message("user", f"{number}?")), text or str(number))


def true_scores(body: bytes) -> list[float]:
    """The score of each conversation of a request: the number in its question."""
    asked = http_protocol.read_request(body, 1000)
    return [float(one.context[-1].content.removesuffix("?")) for one in asked.dialogues]


class Service:
    """A service whose answers a test chooses: ``fault`` gets the number of a request, from 1, and its handler, and
    returns True when it has answered in its own way."""

    def __init__(self, fault: Callable[[int, BaseHTTPRequestHandler], bool] = lambda number, handler: False):
        self.fault = fault
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self._lock = threading.Lock()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            number = len(self.bodies)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            time.sleep(self.delay)
            if not self.fault(number, handler):
                reply(handler, 200, http_protocol.answer_body("m", true_scores(body), None))
        finally:
            with self._lock:
                self.at_once -= 1

    @property
    def asked(self) -> list[float]:
        """Scores of all conversations that were asked for, sorted."""
        return sorted(score for body in self.bodies for score in true_scores(body))


def reply(handler: BaseHTTPRequestHandler, status: int, content: Any, **headers: str) -> bool:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)
    return True


@contextmanager
def running(service: Service, port: int = 0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            service.handle(self)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def judging(url: str, failed: Any = "fail", **settings: Any) -> Iterator[HttpScorer]:
    judge = HttpScorer(HttpRewardConfig(url=url, **{**QUICK, **settings}, failed=failed))
    try:
        yield judge
    finally:
        judge.close()


def counts(judge: HttpScorer) -> dict[str, float]:
    return {name: value for name, value in judge.metrics().items() if not name.startswith("latency")}


def expected(**numbers: float) -> dict[str, float]:
    names = ("requests", "retries", "failures", "cache_hits", "scored", "unscored")
    return {**dict.fromkeys(names, 0.0), **numbers}


def hang_up(_: int, handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def reset_in_the_body(_: int, handler: BaseHTTPRequestHandler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    return hang_up(0, handler)


def answering(*scores: Any, indices: list[Any] | None = None) -> Callable[[int, BaseHTTPRequestHandler], bool]:
    data = [{"index": i, "score": s} for i, s in zip(indices or range(len(scores)), scores, strict=True)]
    return lambda _, handler: reply(handler, 200, {"data": data})


def raw(data: bytes) -> Callable[[int, BaseHTTPRequestHandler], bool]:
    return lambda _, handler: reply(handler, 200, data)


def status(number: int, **headers: str) -> Callable[[int, BaseHTTPRequestHandler], bool]:
    return lambda _, handler: reply(handler, number, {"error": {"message": "not now"}}, **headers)


FAULTS = {
    "500": status(500),
    "502 in HTML": lambda _, handler: reply(handler, 502, b"<html>bad gateway</html>"),
    "503": status(503, Retry_After="0"),
    "429": status(429, Retry_After="0"),
    "408": status(408),
    "hang up": hang_up,
    "reset in the body": reset_in_the_body,
    "bad JSON": raw(b'{"data": [{"index": 0, "sco'),
    "deep JSON": raw(b"[" * 100_000),
    "no object": raw(b"[]"),
    "data is null": raw(b'{"data": null}'),
    "NaN": raw(b'{"data": [{"index": 0, "score": NaN}, {"index": 1, "score": 1}]}'),
    "infinity": raw(b'{"data": [{"index": 0, "score": 1e999}, {"index": 1, "score": 1}]}'),
    "beyond float32": answering(1e39, 1.0),
    "too many digits": raw(b'{"data": [{"index": 0, "score": %s}, {"index": 1, "score": 1}]}' % (b"9" * 5000)),
    "text": answering("1.0", 1.0),
    "true": answering(True, 1.0),
    "no score": raw(b'{"data": [{"index": 0}, {"index": 1, "score": 1}]}'),
    "too few": answering(1.0),
    "too many": answering(1.0, 2.0, 3.0),
    "one twice": answering(1.0, 2.0, 3.0, indices=[0, 1, 1]),
    "one missing": answering(1.0, 2.0, indices=[0, 2]),
    "index is text": answering(1.0, 2.0, indices=["0", "1"]),
    "index is true": answering(1.0, 2.0, indices=[False, True]),
    "endless": raw(b" " * (http.ANSWER_BYTES + 3 * http.SCORE_BYTES)),
}
