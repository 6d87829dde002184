"""What a client that sends no proper request can do to a service: over real sockets, few and for a short time."""

from __future__ import annotations

import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from align.config import CheckpointRewardConfig, RewardServiceConfig
from align.data.chat import Dialogue
from align.rewards import http_protocol
from align.rewards.base import RewardScorer
from align.serve.batcher import Batcher

app = pytest.importorskip("align.serve.app", reason="needs the extra 'serve'")
service = pytest.importorskip("align.serve.main", reason="needs the extra 'serve'")
connections = pytest.importorskip("align.serve.connections", reason="needs the extra 'serve'")

SECTION = RewardServiceConfig(
    reward=CheckpointRewardConfig(path="m"), port=0, stop_timeout_s=1.0, max_request_bytes=10_000
)
GOOD = {"input": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]}]}


class Lengths(RewardScorer):
    """A reward model whose score is the length of the response."""

    def __init__(self):
        pass

    def score(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
        return torch.tensor([float(len(dialogue.response)) for dialogue in dialogues])


@contextmanager
def front(**settings: Any) -> Iterator[tuple[str, int]]:
    """Host and port of a service."""
    section = replace(SECTION, **settings)
    with service.HTTPServer(section, app.RewardApp(Batcher(Lengths(), section), section, "m")) as up:
        host, _, port = up.url.removeprefix("http://").partition(":")
        yield host, int(port)


def ask(
    address: tuple[str, int], method: str = "POST", path: str = http_protocol.REWARDS, body: Any = GOOD, **headers: str
):
    """Status, headers and body of an answer."""
    connection = HTTPConnection(*address, timeout=5)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, content


def scores(address: tuple[str, int]) -> bool:
    """Whether an honest client gets its score."""
    status, _, body = ask(address)
    return status == 200 and json.loads(body)["data"][0]["score"] == 3.0


def until_closed(connection: socket.socket) -> bytes:
    """What comes until the service ends the connection, for 3 seconds at most."""
    connection.settimeout(3)
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_headers_without_end_are_refused_and_not_held():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with front() as address, socket.create_connection(address, timeout=3) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        with suppress(ConnectionError):
            for _ in range(160):
                connection.sendall(b"a" * 65536)
        assert until_closed(connection).startswith(b"HTTP/1.1 431")
        assert scores(address)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_240  # KiB; as many were sent


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHo",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",
        b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1",
    ],
    ids=["nothing", "headers", "second request", "body", "chunk"],
)
def test_a_client_that_sends_slowly_is_not_waited_for(begin: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.3)
    with front(request_timeout_s=0.3) as address, socket.create_connection(address) as connection:
        start, slow = time.monotonic(), threading.Event()

        def drip() -> None:
            with suppress(OSError):
                connection.sendall(begin)
                while begin and not slow.wait(0.05):
                    connection.sendall(b"1")

        dripping = threading.Thread(target=drip)
        dripping.start()
        until_closed(connection)
        assert 0.2 < time.monotonic() - start < 2.5
        slow.set()
        dripping.join()


def test_half_open_connections_beyond_the_limit_keep_nobody_out(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    with front() as address:
        half_open = []
        for number in range(100):
            half_open.append(socket.create_connection(address, timeout=3))
            half_open[-1].sendall(
                b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\n" + b"Content-Length: 9\r\n\r\n" * (number % 2)
            )
            if number % 20 == 19:
                start = time.monotonic()
                assert scores(address)
                assert time.monotonic() - start < 1
        ended = 0
        for connection in half_open:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                try:
                    ended += connection.recv(1) == b""
                except ConnectionError:
                    ended += 1
            connection.close()
        assert 80 <= ended <= 85
        assert scores(address)
    assert caplog.messages == []


def test_a_connection_that_is_scored_is_not_ended_for_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with front(batch_wait_s=0.5) as address:
        replies: list[bool] = []
        asking = [threading.Thread(target=lambda: replies.append(scores(address))) for _ in range(2)]
        for thread in asking:
            thread.start()
        time.sleep(0.1)
        half_open = [socket.create_connection(address) for _ in range(10)]
        for thread in asking:
            thread.join(5)
        for connection in half_open:
            connection.close()
    assert replies == [True, True]


def test_bad_requests_are_logged_once(caplog: pytest.LogCaptureFixture):
    for name in ("uvicorn.error", "asyncio"):
        for limit in service.logging.getLogger(name).filters:
            limit._kinds.clear()
    with front() as address:
        for _ in range(20):
            with socket.create_connection(address) as connection:
                connection.sendall(b"\x16\x03\x01\x00\r\n\r\n")
                assert until_closed(connection).startswith(b"HTTP/1.1 400")
    assert caplog.messages == ["Invalid HTTP request received."]


@pytest.mark.parametrize(
    "path", [http_protocol.HEALTH, http_protocol.MODELS, http_protocol.METRICS, http_protocol.OPENAPI]
)
def test_head_answers_as_get_without_a_body(path: str):
    with front() as address:
        got, headed = (ask(address, method, path, None) for method in ("GET", "HEAD"))
        assert got[0] == headed[0] == 200 and headed[2] == b""
        names = ("content-type", "content-length")
        assert [headed[1][name] for name in names] == [got[1][name] for name in names] and got[2]
        status, headers, _ = ask(address, "DELETE", path, None)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_what_is_no_json_by_its_header_or_its_text():
    with front() as address:
        assert ask(address, "PUT")[1]["allow"] == "POST"
        for kind, status in [
            ("application/json; charset=utf-8", 200),
            ("application/x-www-form-urlencoded", 200),
            ("text/plain", 415),
            ("multipart/form-data; boundary=x", 415),
        ]:
            assert ask(address, **{"Content-Type": kind})[0] == status
        plain = json.dumps(GOOD).encode()
        for body in [
            plain.replace(b"abc", b"\xed\xa0\x80"),
            plain.replace(b'{"input"', b'{"input": [], "input"'),
            plain.replace(b'"abc"', b'"abc", "content": "abc"'),
            plain.replace(b'"abc"', b"Infinity"),
            *(plain.replace(b'"abc"', b"[" * depth + b"]" * depth) for depth in (10, 500, 900, 990, 4000)),
        ]:
            status, _, content = ask(address, body=body)
            assert status == 400, content
            assert len(content) < 300


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_above_the_limit_is_refused_as_it_comes(chunked: bool):
    with front() as address, socket.create_connection(address, timeout=3) as connection:
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 20000"
        connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + kind + b"\r\n\r\n")
        connection.sendall((b"4e20\r\n" + b" " * 20000 + b"\r\n0\r\n\r\n") if chunked else b" " * 20000)
        assert until_closed(connection).startswith(b"HTTP/1.1 413")


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "BODIES", 1)
    with front() as address:
        open_sockets = [socket.create_connection(address, timeout=3) for _ in range(2)]
        for connection in open_sockets:
            connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n" + b" " * 8000)
        open_sockets[1].settimeout(3)
        refused = any(b" 429 " in part for part in _first_of(open_sockets))
        for connection in open_sockets:
            connection.close()
        assert refused


def _first_of(open_sockets: list[socket.socket]) -> Iterator[bytes]:
    for connection in open_sockets[::-1]:
        connection.settimeout(1)
        with suppress(TimeoutError):
            yield connection.recv(100)


def test_random_requests_never_fail_the_service(capfd: pytest.CaptureFixture[str]):
    """Requests of which bytes are changed, left out, doubled or cut off: an answer below 500, or none."""
    draw = random.Random(0)
    body = json.dumps(GOOD).encode()
    seeds = [
        b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body),
        b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        % (len(body), body),
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /openapi.json HTTP/1.0\r\n\r\n",
    ]
    with front(request_timeout_s=2.0) as address:
        for _ in range(200):
            data = bytearray(draw.choice(seeds))
            for _ in range(draw.randint(0, 6)):
                at, length = draw.randrange(len(data)), draw.randint(1, 8)
                piece = draw.choice(
                    [bytes(draw.randbytes(length)), b"", bytes(data[at : at + length]) * 2, b"\r\n", b'"']
                )
                data[at : at + draw.choice([0, length])] = piece
                data = data or bytearray(b"\n")
            with socket.create_connection(address, timeout=3) as connection, suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = until_closed(connection)
                assert not answer or answer[:9] in (b"HTTP/1.1 ", b"HTTP/1.0 "), data
                assert b"HTTP/1.1 5" not in answer, (bytes(data), answer)
        assert scores(address)
    assert "Traceback" not in capfd.readouterr().err


def test_the_description_is_true():
    with front() as address:
        _, _, content = ask(address, "GET", http_protocol.OPENAPI, None)
        paths = json.loads(content)["paths"]
        for path, methods in paths.items():
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
                status, _, reply = ask(address, method, path, GOOD if method == "POST" else None)
                assert (status == 200) == (method.lower() in methods), (method, path)
                assert (status == 405) == (method.lower() not in methods)
                if method in ("GET", "POST") and status == 200 and path != http_protocol.METRICS:
                    schema = methods[method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
                    assert fits(json.loads(reply), schema), path
        request = paths[http_protocol.REWARDS]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert request["properties"]["input"]["maxItems"] == SECTION.max_conversations
        assert fits(GOOD, request) and not fits({**GOOD, "x": 1}, request)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema, as far as the description uses JSON Schema."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, kinds[kind]) for kind in types):
        return False
    if isinstance(value, list):
        items = schema.get("items")
        return items is None or all(fits(item, items) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        has_right_keys = set(schema["required"]) <= value.keys() <= properties.keys()
        return has_right_keys and all(fits(item, properties[name]) for name, item in value.items())
    return True
