"""The client of a model server against a server that fails in every way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

import pytest

from align.config import EndpointGeneratorConfig, SamplingConfig
from align.data.chat import Message
from align.errors import ConfigError, WorkerError
from align.generators.base import Request
from align.generators.endpoint import EndpointGenerator

SAMPLING = SamplingConfig(max_tokens=64, temperature=0.6, top_p=0.95)
KEY = "sk-0123456789abcdef"


def answer(text: str, **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()


Fault = Callable[[int, dict[str, Any]], tuple[int, bytes]]


@contextmanager
def server(
    fault: Fault, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, str]]]]:
    """``fault`` gets the number of a request, from 1, and its body, and returns status and answer; ``more`` are headers
    of every answer."""
    bodies: list[dict[str, Any]] = []
    headers: list[dict[str, str]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body)
                headers.append({"path": self.path, **self.headers})
                number = len(bodies)
            status, data = fault(number, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # the default of 5 resets connections when 16 come together

    http = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", bodies, headers
    finally:
        http.shutdown()
        http.server_close()


@contextmanager
def client(url: str, **fields: Any) -> Iterator[EndpointGenerator]:
    quick = {"backoff_s": 0.001, "max_backoff_s": 0.01, "timeout_s": 5.0, "retries": 3}
    found = EndpointGenerator(EndpointGeneratorConfig(url=url, model="judge", **quick | fields), seed=1)
    try:
        yield found
    finally:
        found.close()


def requests(count: int) -> list[Request]:
    return [Request((Message("user", f"question {number}"),), sample=number) for number in range(count)]


def test_answers_come_in_the_order_of_the_requests_through_failures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", KEY)

    def fault(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        said = body["messages"][-1]["content"]
        return (503, b"busy") if number % 3 == 0 else (200, answer(said.upper()))

    with server(fault) as (url, bodies, headers), client(url, key_env="MY_KEY", retries=30) as found:
        completions = found.complete(requests(20), SAMPLING)
        assert [one.text for one in completions] == [f"QUESTION {number}" for number in range(20)]
        counts = found.metrics()
    assert counts["requests"] == len(bodies) == 20 + counts["retries"] and counts["retries"] >= 9
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (140.0, 60.0)
    assert {one["Authorization"] for one in headers} == {f"Bearer {KEY}"}
    assert {one["path"] for one in headers} == {"/v1/chat/completions"}
    assert len({body["seed"] for body in bodies}) == 20, "each request has a seed of its own, each repeat the same"


def test_fields_of_a_request():
    with server(lambda number, body: (200, answer("yes"))) as (url, bodies, _):
        with client(url, extra={"max_tokens": None, "max_completion_tokens": 9}, seeded=False) as found:
            found.complete(requests(1), SAMPLING, margins=True)
        with client(url) as found:
            found.complete(requests(1), SamplingConfig(max_tokens=5, top_k=40, min_p=0.1))
    assert bodies[0] == {
        "model": "judge",
        "messages": [{"role": "user", "content": "question 0"}],
        "max_completion_tokens": 9,
        "temperature": 0.6,
        "top_p": 0.95,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert (bodies[1]["max_tokens"], bodies[1]["top_k"], bodies[1]["min_p"]) == (5, 40, 0.1)


def test_reasoning_and_cut_answers_are_told_apart():
    message = {"role": "assistant", "content": "7", "reasoning_content": "so"}
    told = [answer("", message=message), answer("7", finish_reason="length"), answer("", message={"content": None})]
    with server(lambda number, body: (200, told[number - 1])) as (url, _, _), client(url, max_concurrency=1) as found:
        first, second, third = found.complete(requests(3), SAMPLING)
    assert (first.text, first.finished) == ("<think>so</think>7", True)
    assert (second.text, second.finished) == ("7", False)
    assert third.text == ""


def logprobs(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": token,
                "logprob": others[token],
                "top_logprobs": [{"token": word, "logprob": value} for word, value in others.items()],
            }
            for token, others in tokens
        ]
    }


@pytest.mark.parametrize(
    ("told", "margin"),
    [
        (logprobs(("No", {"No": -0.5, "Yes": -2.0}), (".", {".": 0.0})), -1.5),
        (logprobs(("Yes", {"Yes": -3.0, "No": -1.0}), (" Yes", {" Yes": -0.25, " No": -1.5})), 1.25),
        (logprobs(("Yes", {"Yes": -0.1, "yes": -3.0})), None),
        (logprobs(("maybe", {"maybe": -0.1})), None),
        (None, None),
    ],
    ids=["no", "the last one", "no is not among them", "neither", "none sent"],
)
def test_the_margin_is_read_where_the_last_verdict_stands(told: Any, margin: float | None):
    with server(lambda number, body: (200, answer("Yes", logprobs=told))) as (url, _, _), client(url) as found:
        assert found.complete(requests(1), SAMPLING, margins=True)[0].margin == margin


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"not json", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 7}}]}', b"\xff\xfe"],
)
def test_answers_that_cannot_be_used_are_asked_for_again(data: bytes):
    with (
        server(lambda number, body: (200, data if number < 3 else answer("there"))) as (url, bodies, _),
        client(url) as found,
    ):
        assert found.complete(requests(1), SAMPLING)[0].text == "there"
    assert len(bodies) == 3


def test_what_never_answers_ends_with_the_last_cause():
    with (
        server(lambda number, body: (429, b'{"error": {"message": "too many"}}')) as (url, bodies, _),
        client(url) as found,
        pytest.raises(WorkerError, match=r"4 attempts; last error: status 429: too many"),
    ):
        found.complete(requests(1), SAMPLING)
    assert len(bodies) == 4


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "MY_KEY"), (404, "without /chat/completions"), (400, "extra adds"), (302, "url")]
)
def test_what_repeating_cannot_change_is_an_error_at_once(status: int, remedy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", KEY)
    said = json.dumps({"error": {"message": f"no, {KEY}"}}).encode()
    with (
        server(lambda number, body: (status, said)) as (url, bodies, _),
        client(url, key_env="MY_KEY") as found,
        pytest.raises(ConfigError, match=remedy) as failed,
    ):
        found.complete(requests(1), SAMPLING)
    assert len(bodies) == 1 and KEY not in str(failed.value)


def test_the_first_failure_does_not_wait_for_who_is_slow():
    """The request that fails is not the first; the first has no answer before the test is over."""
    over, waited = threading.Event(), threading.Event()

    def fault(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if body["messages"][-1]["content"] == "question 0":
            if not over.wait(10.0):
                waited.set()
            return 200, answer("late")
        return (400, b"no") if body["messages"][-1]["content"] == "question 2" else (200, answer("yes"))

    with server(fault) as (url, _, _), client(url, timeout_s=20.0) as found:
        try:
            with pytest.raises(ConfigError, match="status 400"):
                found.complete(requests(3), SAMPLING)
            assert not waited.is_set()
        finally:
            over.set()


@pytest.mark.parametrize("status", [400, 302, 503])
def test_the_key_is_in_no_message_where_a_text_is_cut(status: int, monkeypatch: pytest.MonkeyPatch):
    """At whatever place the limit of a message falls into it."""
    monkeypatch.setenv("MY_KEY", KEY)
    for place in (190, 290, 490):
        said = f"{'x' * place}{KEY}"
        told = said.encode() if status != 302 else b""
        with (
            server(lambda number, body, told=told: (status, told), {"Location": said}) as (url, _, _),
            client(url, key_env="MY_KEY", retries=0) as found,
            pytest.raises((ConfigError, WorkerError)) as failed,
        ):
            found.complete(requests(1), SAMPLING)
        assert "xxx" in str(failed.value) and KEY[:4] not in str(failed.value)


def test_the_key_must_be_there_and_an_opening_cannot_be_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        EndpointGenerator(EndpointGeneratorConfig(url="http://127.0.0.1:1/v1", model="m", key_env="MY_KEY"))
    with client("http://127.0.0.1:1/v1") as found, pytest.raises(ConfigError, match="begins with 'well'"):
        found.complete([requests(1)[0]._replace(opening="well")], SAMPLING)
