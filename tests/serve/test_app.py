"""The service's application and batches, asked as any client would, over a real connection."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from align.config import HttpRewardConfig
from align.data.chat import Dialogue, Message
from align.rewards import http_protocol
from align.rewards.http import HttpScorer
from align.rewards.http_protocol import HTTPError
from align.serve.batcher import Batcher, LoadingBackend

pytest.importorskip("align.serve.main", reason="needs the extra 'serve'")
from service_client import SECTION, TOKEN, Lengths, ask, conversation, serving_with, wait_until

from align.serve import main as service
from align.serve.app import RewardApp


def test_an_answer_has_a_score_for_each_conversation_in_order():
    with serving_with() as address:
        body = {"model": "m", "input": [conversation("abc"), conversation("nan"), conversation("")]}
        assert ask(address, body) == (
            200,
            {
                "object": "list",
                "model": "m",
                "data": [
                    {"object": "reward", "index": 0, "score": 3.0},
                    {"object": "reward", "index": 1, "score": None},
                    {"object": "reward", "index": 2, "score": 0.0},
                ],
            },
        )
        assert ask(address, path=http_protocol.HEALTH) == (200, {"status": "ok", "replicas": 1})
        model = {"id": "m", "object": "model", "owned_by": "align"}
        assert ask(address, path=http_protocol.MODELS) == (200, {"object": "list", "data": [model]})


def test_attributes_come_with_the_score():
    class Attributes(Lengths):
        attribute_names = ("helpfulness", "verbosity")

        def score_attributes(self, dialogues: Sequence[Dialogue]) -> tuple[torch.Tensor, torch.Tensor]:
            attribute_BA = torch.tensor([[4.0, math.inf] for _ in dialogues])
            return attribute_BA[:, 0] / 8, attribute_BA

    with serving_with(Attributes()) as address:
        item = ask(address, {"input": [conversation()]})[1]["data"][0]
    attributes = {"helpfulness": 4.0, "verbosity": None}
    assert item == {"object": "reward", "index": 0, "score": 0.5, "attributes": attributes}


def test_each_refusal_has_its_status():
    with serving_with(max_request_bytes=2000) as address:
        body = {"input": [conversation()]}
        for status, code, (answered, reply) in [
            (400, "bad_request", ask(address, {"input": ["x"]})),
            (404, "not_found", ask(address, {"model": "other", **body})),
            (404, "not_found", ask(address, path="/v1/embeddings")),
            (405, "method_not_allowed", ask(address, path=http_protocol.REWARDS)),
            (405, "method_not_allowed", ask(address, body, path=http_protocol.HEALTH)),
            (413, "too_large", ask(address, {"input": [conversation()] * 9})),
            (413, "too_large", ask(address, {"input": [conversation("x" * 2000)]})),
        ]:
            assert (answered, reply["error"]["code"]) == (status, code)
            assert reply["error"].keys() == {"message", "type", "param", "code"}
        assert ask(address, body)[0] == 200


def test_a_body_far_beyond_the_limit_is_not_read_to_its_end():
    with serving_with(max_request_bytes=1000) as address:
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
            connection.sendall(b" " * 6000)
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_not_waited_for():
    with serving_with(request_timeout_s=0.2) as address:
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN],
)
def test_without_the_token_nothing_is_told_but_health(header: str | None):
    headers = {} if header is None else {"Authorization": header}
    scorer = Lengths()
    with serving_with(scorer, TOKEN) as address:
        for path, body in (
            (http_protocol.REWARDS, {"input": [conversation()]}),
            (http_protocol.MODELS, None),
            (http_protocol.METRICS, None),
            ("/x", None),
        ):
            status, reply = ask(address, body, path, **headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_token")
        assert ask(address, path=http_protocol.HEALTH)[0] == 200
    assert scorer.batches == []


def test_with_the_token_all_is_told():
    with serving_with(token=TOKEN) as address:
        for scheme in ("Bearer", "bearer"):
            header = {"Authorization": f"{scheme} {TOKEN}"}
            assert ask(address, {"input": [conversation()]}, **header)[0] == 200
            assert ask(address, path=http_protocol.MODELS, **header)[0] == 200
        connection = HTTPConnection(address)
        connection.request("GET", http_protocol.MODELS)
        assert connection.getresponse().getheader("WWW-Authenticate") == "Bearer"


def test_a_full_queue_and_a_client_that_left_and_one_that_waits_too_long():
    scorer = Lengths()
    scorer.go.clear()
    with serving_with(scorer, request_timeout_s=0.5, max_batch_size=1) as address:
        full = {"input": [conversation("x")] * 8}
        replies: list[Any] = []
        waiting = threading.Thread(target=lambda: replies.append(ask(address, full)))
        waiting.start()
        wait_until(lambda: bool(scorer.batches))
        connection = HTTPConnection(address)
        connection.request("POST", http_protocol.REWARDS, json.dumps({"input": [conversation()]}).encode())
        response = connection.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (429, "1")
        waiting.join(10)
        assert replies[0][0] == 504
        leaving = HTTPConnection(address)
        leaving.request("POST", http_protocol.REWARDS, json.dumps({"input": [conversation("left")]}).encode())
        wait_until(lambda: "pending_conversations 1\n" in ask(address, path=http_protocol.METRICS)[1])
        leaving.close()
        wait_until(lambda: 'status="499"} 1' in ask(address, path=http_protocol.METRICS)[1])
        wait_until(
            lambda: ask(address, path=http_protocol.HEALTH)[0] == 503
        )  # by now the batch takes longer than 0.5 s
        scorer.go.set()
        wait_until(lambda: ask(address, path=http_protocol.HEALTH)[0] == 200)
        assert ask(address, {"input": [conversation("last")]})[0] == 200
    assert scorer.batches == [["x"] * 8, ["last"]]  # what nobody waits for costs nothing


def test_counts_of_the_service_are_those_of_its_client():
    with serving_with(max_queue=2000) as address:
        scorer = HttpScorer(HttpRewardConfig(url=f"http://{address}", batch_size=4, max_concurrency=3, backoff_s=0.001))
        texts = ["x" * n for n in range(21)] + ["nan"]
        scores = scorer.score([Dialogue((Message("user", "q"),), text) for text in texts])
        assert scores[:-1].tolist() == [float(n) for n in range(21)] and scores[-1].isnan()
        metrics = dict(line.rsplit(" ", 1) for line in ask(address, path=http_protocol.METRICS)[1].splitlines())
        client = scorer.metrics()
        scorer.close()
    assert metrics['align_reward_requests_total{status="200"}'] == "6" == f"{client['requests']:g}"
    assert metrics["align_reward_conversations_total"] == "22" == f"{client['scored'] + client['unscored']:g}"
    assert metrics["align_reward_unscored_total"] == "1" == f"{client['unscored']:g}"
    assert metrics["align_reward_pending_conversations"] == "0" and metrics["align_reward_replicas"] == "1"
    assert metrics["align_reward_seconds_count"] == metrics['align_reward_seconds_bucket{le="+Inf"}'] == "6"


def test_a_replica_that_ends_is_told_as_an_error_that_passes():
    class Dying:
        async def score(self, dialogues: list[Dialogue]) -> Any:
            raise HTTPError(503, "a replica ended while it scored", retry_after_s=5)

        async def replicas(self) -> int:
            return 0

    with serving_with(Dying()) as address:
        assert ask(address, {"input": [conversation()]})[0] == 503
        status, reply = ask(address, path=http_protocol.HEALTH)
        assert (status, reply["error"]["message"]) == (503, "no replica answers")


def test_while_the_model_is_loaded_a_client_is_told_to_ask_again():
    application = RewardApp(LoadingBackend(), SECTION, "m", TOKEN)
    with service.HTTPServer(SECTION, application) as front:
        address, header = front.url.removeprefix("http://"), {"Authorization": f"Bearer {TOKEN}"}
        status, reply = ask(address, {"input": [conversation()]}, **header)
        assert (status, reply["error"]["message"]) == (503, "the model is being loaded")
        assert ask(address, {"input": [conversation()]})[0] == 401
        assert ask(address, path=http_protocol.HEALTH)[0] == 503
        application.backend = Batcher(Lengths(), SECTION)
        assert ask(address, {"input": [conversation()]}, **header)[0] == 200
        assert ask(address, path=http_protocol.HEALTH)[0] == 200


def test_a_front_that_ends_otherwise_waits_for_no_request():
    scorer, section = Lengths(), replace(SECTION, stop_timeout_s=60.0)
    scorer.go.clear()
    front = service.HTTPServer(section, RewardApp(Batcher(scorer, section), section, "m"))
    with front, closing(HTTPConnection(front.url.removeprefix("http://"))) as connection:
        connection.request("POST", http_protocol.REWARDS, json.dumps({"input": [conversation()]}).encode())
        wait_until(lambda: bool(scorer.batches))
        start = time.monotonic()
        front.__exit__()
        assert time.monotonic() - start < 30  # the scorer waits for 60
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["message"]) == (
            503,
            "the service is shutting down",
        )
        scorer.go.set()


def test_requests_under_way_are_answered_before_the_end():
    scorer = Lengths()
    scorer.go.clear()
    section = replace(SECTION, stop_timeout_s=10.0)
    with service.HTTPServer(section, RewardApp(Batcher(scorer, section), section, "m")) as front:
        address, replies = front.url.removeprefix("http://"), []
        asking = threading.Thread(target=lambda: replies.append(ask(address, {"input": [conversation("last")]})))
        asking.start()
        wait_until(lambda: bool(scorer.batches))
        ending = threading.Thread(target=front.drain)
        ending.start()
        scorer.go.set()
        ending.join(10)
        asking.join(10)
    assert replies[0][0] == 200 and replies[0][1]["data"][0]["score"] == 4.0
    with pytest.raises(ConnectionRefusedError):
        ask(address, path=http_protocol.HEALTH)
