"""The client of a reward service against a service that fails in every way, and the service's application."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from align.config import HttpConfig, RewardConfig
from align.data.chat import Dialogue, Message
from align.errors import ConfigError, WorkerError
from align.generators import http as transport
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
    judge = HttpScorer(RewardConfig(kind="http", http=HttpConfig(url=url, **{**QUICK, **settings}), failed=failed))
    try:
        yield judge
    finally:
        judge.close()


def counts(judge: HttpScorer) -> dict[str, float]:
    return {name: value for name, value in judge.metrics().items() if not name.startswith("latency")}


def expected(**numbers: float) -> dict[str, float]:
    names = ("requests", "retries", "failures", "cache_hits", "scored", "unscored")
    return {**dict.fromkeys(names, 0.0), **numbers}


def test_scores_come_in_order_and_each_conversation_is_sent_whole():
    service = Service()
    with running(service) as url, judging(url, batch_size=3) as judge:
        scores = judge.score([dialogue(n) for n in (5, -2, 0, 7, 1, 3, 4)])
        assert torch.equal(scores, torch.tensor([5.0, -2.0, 0.0, 7.0, 1.0, 3.0, 4.0]))
        assert counts(judge) == expected(requests=3, scored=7)
        assert judge.score([]).shape == (0,)
    whole = {"system": "be brief", "user": "5?", "assistant": "5"}
    first = next(body for body in service.bodies if len(true_scores(body)) == 3 and 5.0 in true_scores(body))
    assert json.loads(first)["input"][0]["messages"] == [{"role": r, "content": c} for r, c in whole.items()]


def test_latencies_are_summed_up_by_nearest_rank():
    judge = HttpScorer(RewardConfig(kind="http", http=HttpConfig(url="http://127.0.0.1:1")))
    judge._client._seconds += [float(n) for n in range(100, 0, -1)]
    found = judge.metrics()
    assert [found[f"latency_{name}"] for name in ("mean", "p50", "p95")] == [50.5, 50.0, 95.0]
    judge._client._seconds += [3.0]
    found = judge.metrics()
    assert [found[f"latency_{name}"] for name in ("mean", "p50", "p95")] == [3.0, 3.0, 3.0]
    assert "latency_mean" not in judge.metrics()


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


@pytest.mark.parametrize("name", FAULTS)
def test_after_each_fault_the_scores_are_those_without_faults(name: str):
    service = Service(lambda number, handler: number == 1 and FAULTS[name](number, handler))
    with running(service) as url, judging(url, batch_size=2, max_concurrency=1) as judge:
        assert judge.score([dialogue(n) for n in range(6)]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert counts(judge) == expected(requests=4, retries=1, scored=6)


def test_scores_are_placed_by_their_index():
    service = Service(answering(2.0, 0.0, 1.0, indices=[2, 0, 1]))
    with running(service) as url, judging(url) as judge:
        assert judge.score([dialogue(n) for n in range(3)]).tolist() == [0.0, 1.0, 2.0]


def test_a_service_that_fails_often_loses_nothing_and_is_counted_exactly():
    kinds = ["503", "hang up", "bad JSON", "too few", "429"]

    def fault(number: int, handler: BaseHTTPRequestHandler) -> bool:
        return number % 5 == 0 and FAULTS[kinds[number // 5 % len(kinds)]](number, handler)

    service = Service(fault)
    with running(service) as url, judging(url, batch_size=2, retries=20) as judge:
        assert judge.score([dialogue(n) for n in range(200)]).tolist() == [float(n) for n in range(200)]
        found = counts(judge)
    # 100 requests must succeed and every fifth fails: the 124th is the hundredth that does not.
    assert len(service.bodies) == 124
    assert found == expected(requests=124, retries=24, scored=200)


@pytest.mark.parametrize(
    ("header", "lowest", "highest"),
    [
        (None, 0.0, 2.0),
        ("3", 3.0, 3.0),
        ("1000", 8.0, 8.0),
        ("-5", 0.0, 2.0),
        ("soon", 0.0, 2.0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 8.0, 8.0),
        (formatdate(0, usegmt=True), 0.0, 2.0),
    ],
)
def test_the_pause_is_random_and_at_least_what_the_service_asks_for(header: str | None, lowest: float, highest: float):
    judge = HttpScorer(
        RewardConfig(kind="http", http=HttpConfig(url="http://127.0.0.1:1", backoff_s=0.5, max_backoff_s=8.0))
    )
    pauses = [judge._client.pause(2, transport.retry_after(header)) for _ in range(200)]  # at most 0.5 * 2 ** 2
    assert all(lowest <= pause <= highest for pause in pauses)
    if lowest < highest:
        assert min(pauses) < 0.5 and max(pauses) > 1.5
    assert max(judge._client.pause(9000, 0.0) for _ in range(200)) <= 8.0


def test_retry_after_is_waited_for():
    service = Service(lambda number, handler: number == 1 and status(429, Retry_After="1")(number, handler))
    with running(service) as url, judging(url, max_backoff_s=0.2) as judge:
        begun = time.monotonic()
        judge.score([dialogue(1)])
        assert time.monotonic() - begun >= 0.2  # the bound


@pytest.mark.parametrize("drip", [False, True])
def test_an_answer_that_does_not_come_in_time_is_given_up(drip: bool):
    done = threading.Event()

    def slowly(_: int, handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while drip and not done.wait(0.05):
            handler.wfile.write(b" ")
        done.wait(5)
        return True

    with running(Service(slowly)) as url, judging(url, timeout_s=0.3, retries=1) as judge:
        begun = time.monotonic()
        with pytest.raises(
            WorkerError, match=r"in 2 attempts; last error: TimeoutError: no complete answer within 0.3 s"
        ):
            judge.score([dialogue(1)])
        assert 0.6 <= time.monotonic() - begun < 5  # one whole answer takes 5 s
        done.set()


def test_a_service_that_is_away_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with judging(f"http://127.0.0.1:{port}", retries=200) as judge:
        scores: list[Any] = []
        asking = threading.Thread(target=lambda: scores.append(judge.score([dialogue(1), dialogue(2)])))
        asking.start()
        time.sleep(0.3)
        assert not scores
        with running(Service(), port):
            asking.join(5)
        assert scores[0].tolist() == [1.0, 2.0]
        found = counts(judge)
        assert found["requests"] == found["retries"] + 1 > 2 and found["scored"] == 2


def test_when_retries_are_used_up_the_error_names_what_was_tried_and_the_other_scores_are_kept():
    down = [True]
    service = Service(lambda _, handler: down[0] and 3.0 in true_scores(service.bodies[-1]) and status(503)(0, handler))
    with running(service) as url, judging(url, batch_size=1, max_concurrency=1, retries=2) as judge:
        with pytest.raises(WorkerError) as failed:
            judge.score([dialogue(n) for n in range(6)])
        assert failed.value.exit_status == 76
        for part in (url, "3 attempts", "status 503: not now", "http.retries", "failed=drop"):
            assert part in str(failed.value)
        down[0] = False
        assert judge.score([dialogue(n) for n in range(6)]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert counts(judge)["failures"] == 1
    # What came before the failure was not asked for again; 3 was asked for three times, and once more.
    assert service.asked[:7] == [0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0]


def test_with_drop_only_the_conversations_of_the_failed_request_have_no_score():
    service = Service(lambda _, handler: 3.0 in true_scores(service.bodies[-1]) and status(500)(0, handler))
    with running(service) as url, judging(url, "drop", batch_size=2, max_concurrency=1, retries=2) as judge:
        scores = judge.score([dialogue(n) for n in range(6)])
        assert scores.isnan().tolist() == [False, False, True, True, False, False]
        assert scores[[0, 1, 4, 5]].tolist() == [0.0, 1.0, 4.0, 5.0]
        assert counts(judge) == expected(requests=5, retries=2, failures=1, scored=4, unscored=2)


def test_no_score_is_no_number_and_is_asked_for_again():
    service = Service(lambda number, handler: number == 1 and answering(None, 1.0)(number, handler))
    with running(service) as url, judging(url) as judge:
        both = [dialogue(7), dialogue(1)]
        assert judge.score(both).isnan().tolist() == [True, False]
        assert counts(judge) == expected(requests=1, scored=1, unscored=1)
        assert judge.score(both).tolist() == [7.0, 1.0]
        assert counts(judge) == expected(requests=1, cache_hits=1, scored=1)


def test_nothing_is_asked_for_twice_while_it_is_remembered():
    service = Service()
    with running(service) as url, judging(url, cache_size=3, batch_size=1, max_concurrency=1) as judge:
        assert judge.score([dialogue(1), dialogue(2), dialogue(1)]).tolist() == [1.0, 2.0, 1.0]
        assert counts(judge) == expected(requests=2, cache_hits=1, scored=2)
        judge.score([dialogue(3), dialogue(1)])  # 1 is now the one used last
        judge.score([dialogue(4)])  # and 2 is forgotten
        judge.score([dialogue(1), dialogue(3), dialogue(4)])
        assert service.asked == [1.0, 2.0, 3.0, 4.0]
        judge.score([dialogue(2)])
        assert service.asked == [1.0, 2.0, 2.0, 3.0, 4.0]
        judge.score([dialogue(1, "another answer")])
        assert len(service.asked) == 6


def test_without_a_cache_everything_is_asked():
    service = Service()
    with running(service) as url, judging(url, cache_size=0) as judge:
        for _ in range(2):
            assert judge.score([dialogue(1), dialogue(1)]).tolist() == [1.0, 1.0]
        assert service.asked == [1.0] * 4
        assert counts(judge) == expected(requests=2, scored=4)


def test_conversations_that_differ_anywhere_differ_in_the_cache():
    user, end = Message("user", "a"), Message("user", "b")
    different = [
        Dialogue((user,), "b"),
        Dialogue((user,), "b "),
        Dialogue((Message("system", "a"),), "b"),
        Dialogue((user, Message("assistant", "b"), end), "b"),
        Dialogue((user, Message("assistant", '"],["user","b'), end), "b"),
        Dialogue((Message("user", "\ud800"),), "b"),
        Dialogue((Message("user", "\\ud800"),), "b"),
    ]
    assert len({http_protocol.canonical(one) for one in different}) == len(different)


def test_no_more_requests_are_under_way_than_allowed():
    service = Service()
    service.delay = 0.02
    with running(service) as url, judging(url, batch_size=1, max_concurrency=3) as judge:
        judge.score([dialogue(n) for n in range(30)])
    assert service.most_at_once == 3


@pytest.mark.parametrize(
    ("number", "headers", "message", "remedy"),
    [
        (400, {}, "status 400: input[0]: bad", None),
        (401, {}, "status 401", "environment variable REWARD_TOKEN"),
        (403, {}, "status 403", "environment variable REWARD_TOKEN"),
        (404, {}, "status 404", "without /v1/rewards"),
        (413, {}, "status 413", "http.batch_size"),
        (302, {"Location": "http://elsewhere.example/x"}, "redirects to http://elsewhere.example/x", "set http.url"),
    ],
)
def test_what_repeating_cannot_change_is_an_error_at_once(
    number: int, headers: dict[str, str], message: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REWARD_TOKEN", "canary-0123456789")
    said = {"error": {"message": "input[0]: bad canary-0123456789"}}
    service = Service(lambda _, handler: reply(handler, number, said, **headers))
    with running(service) as url, judging(url, "drop", token_env="REWARD_TOKEN") as judge:
        with pytest.raises(ConfigError) as failed:
            judge.score([dialogue(1)])
        assert failed.value.exit_status == 78
        assert message in str(failed.value) and (remedy or "") in str(failed.value) and url in str(failed.value)
        assert "canary" not in str(failed.value)
        assert len(service.bodies) == 1


def test_the_token_is_sent_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REWARD_TOKEN", "secret-0123456789")
    service = Service()
    with running(service) as url, judging(url, token_env="REWARD_TOKEN") as judge:
        judge.score([dialogue(1)])
    assert service.headers[0]["Authorization"] == "Bearer secret-0123456789"
    for value, message in (("two words", "contains characters"), ("", "is not set")):
        monkeypatch.setenv("REWARD_TOKEN", value)
        with pytest.raises(ConfigError, match=f"REWARD_TOKEN {message}") as failed:
            HttpScorer(RewardConfig(kind="http", http=HttpConfig(url=url, token_env="REWARD_TOKEN")))
        assert "words" not in str(failed.value)


def test_an_error_stops_the_requests_that_wait():
    """One request is refused for good while another one waits for a minute before its repeat."""

    def fault(number: int, handler: BaseHTTPRequestHandler) -> bool:
        if 1.0 in true_scores(service.bodies[number - 1]):
            return status(503, Retry_After="60")(number, handler)
        time.sleep(0.1)
        return status(400)(number, handler)

    service = Service(fault)
    with running(service) as url, judging(url, batch_size=1, max_concurrency=2, max_backoff_s=60.0) as judge:
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="status 400"):
            judge.score([dialogue(1), dialogue(2), dialogue(3)])
        assert time.monotonic() - begun < 30  # the other request waits for 60 s


def test_generators_of_training_stay_as_they_are():
    """Repeats draw their pauses elsewhere: a run that met faults goes on as one that met none."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    service = Service(lambda number, handler: number % 2 == 1 and FAULTS["503"](number, handler))
    with running(service) as url, judging(url, batch_size=1, max_concurrency=1) as judge:
        judge.score([dialogue(n) for n in range(5)])
        assert counts(judge)["retries"] == 5
    drawn = (float(torch.rand(())), float(np.random.rand()), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert drawn == (float(torch.rand(())), float(np.random.rand()), random.random())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with running(Service()) as url, judging(url, retries=0) as judge:
        assert judge.score([dialogue(4)]).tolist() == [4.0]


def test_connections_are_used_again_while_they_are_fresh(monkeypatch: pytest.MonkeyPatch):
    connects: list[Any] = []
    service = Service(lambda _, handler: connects.append(handler.client_address) or False)  # type: ignore[func-returns-value]
    with running(service) as url, judging(url, batch_size=1, max_concurrency=1) as judge:
        judge.score([dialogue(n) for n in range(4)])
        assert len(set(connects)) == 1
        monkeypatch.setattr(transport, "IDLE_S", 0.0)
        judge.score([dialogue(n) for n in range(4, 6)])
        assert len(set(connects)) == 3


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://h", "http://me:secret@h", "http://h?a=b", "http://h/#x", "http://", "http://h:x"]
)
def test_an_address_that_is_none_is_refused_with_the_recipe(url: str):
    with pytest.raises(ValueError, match=r"url must be http://HOST"):
        HttpConfig(url=url)
