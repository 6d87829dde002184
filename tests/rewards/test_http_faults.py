"""The client of a reward service against a service that fails: no score is lost, and all are counted."""

from __future__ import annotations

import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from fake_service import FAULTS, Service, answering, counts, dialogue, expected, judging, running, status, true_scores

from align.config import HttpRewardConfig
from align.errors import ConfigError, WorkerError
from align.generators import http as transport
from align.rewards.http import HttpScorer


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
    judge = HttpScorer(HttpRewardConfig(url="http://127.0.0.1:1", backoff_s=0.5, max_backoff_s=8.0))
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
        for part in (url, "3 attempts", "status 503: not now", "raise retries", "failed=drop"):
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
