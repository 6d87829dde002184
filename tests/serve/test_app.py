"""The service's application and batches, asked as any client would, over a real connection."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config import CheckpointRewardConfig, FunctionRewardConfig, HttpRewardConfig, RewardServiceConfig
from align.data.chat import Dialogue, Message
from align.errors import ConversationError, DataError, ModelError, WorkerError
from align.rewards import http_protocol
from align.rewards.base import RewardScorer
from align.rewards.functions import FunctionScorer
from align.rewards.http import HttpScorer
from align.rewards.http_protocol import HTTPError
from align.serve import batcher as batching
from align.serve.batcher import Batcher, LoadingBackend

RewardApp = pytest.importorskip("align.serve.app", reason="needs the extra 'serve'").RewardApp
service = pytest.importorskip("align.serve.main", reason="needs the extra 'serve'")

SECTION = RewardServiceConfig(
    reward=CheckpointRewardConfig(path="m"), port=0, stop_timeout_s=2.0, max_conversations=8, max_queue=8
)
TOKEN = "canary-0123456789abcdef"


class Lengths(RewardScorer):
    """A judge whose score is the length of the response; it says which conversations came together, and fails where a
    response names an error."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def score(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
        responses = [one.response for one in dialogues]
        self.batches.append(responses)
        self.go.wait(60)
        if "refused" in responses:
            raise ConversationError(f"/srv/{TOKEN}", public="roles must alternate", where="chat template", remedy="x")
        if "template" in responses:
            raise DataError(f"the template fails: {TOKEN}", where=f"/srv/{TOKEN}") from ZeroDivisionError(TOKEN)
        if "exit" in responses:
            raise SystemExit(0)
        if "model" in responses:
            raise ModelError(f"of align {TOKEN}", remedy=TOKEN)
        if any(text.startswith("bug") for text in responses):
            raise KeyError(*responses)
        return torch.tensor([math.nan if text == "nan" else float(len(text)) for text in responses])


@contextmanager
def serving_with(judge: Any = None, token: str = "", **settings: Any) -> Iterator[str]:
    """HOST:PORT of a service."""
    section = replace(SECTION, **settings)
    scorer = judge if hasattr(judge, "replicas") else Batcher(judge or Lengths(), section)
    with service.HTTPServer(section, RewardApp(scorer, section, "m", token)) as front:
        yield front.url.removeprefix("http://")


def ask(
    address: str, body: Any = None, path: str = http_protocol.REWARDS, method: str = "", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    connection = HTTPConnection(address, timeout=10)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    kind = response.getheader("content-type") or ""
    return response.status, json.loads(content) if kind == "application/json" else content.decode()


def conversation(response: str = "abc", **message: Any) -> dict[str, Any]:
    last = {"role": "assistant", "content": response, **message}
    return {"messages": [{"role": "user", "content": "q"}, last]}


def test_an_answer_has_a_score_for_each_conversation_in_order():
    with serving_with() as address:
        asked = {"model": "m", "input": [conversation("abc"), conversation("nan"), conversation("")]}
        assert ask(address, asked) == (
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


BAD = {
    b"{": ("the body is not JSON", None),
    b"\xff": ("the body is not JSON", None),
    b"[" * 100_000: ("the body is not JSON", None),
    b'{"input": NaN}': ("NaN is not a JSON number", None),
    b"[]": ("the body must be an object, not []", None),
    b"{}": ("input must be a list of conversations, not nothing", "input"),
    b'{"input": []}': ("input must be a list of conversations, not []", "input"),
    b'{"inputs": []}': ('unknown key "inputs"', None),
    b'{"model": 3, "input": [1]}': ("model must be text, not 3", "model"),
    b'{"input": [], "input": []}': ('duplicate key "input" in an object', None),
    b'{"input": {"a": 1}}': ("input must be a list of conversations, not an object with 1 keys", "input"),
    b'{"input": ["x"]}': ('input[0] must be an object, not "x"', "input[0]"),
    b'{"input": [{"messages": []}]}': ("two or more, not []", "input[0].messages"),
    b'{"input": [{"messages": [{"role": "assistant", "content": "a"}]}]}': ("two or more", "input[0].messages"),
}
LAST = "input[0].messages[1]"
BAD_MESSAGE = [
    ({"role": "user"}, "the last message is the response, so its role must be assistant, not user", f"{LAST}.role"),
    ({"role": "tool"}, "role must be one of system, user, assistant", f"{LAST}.role"),
    ({"role": ["user"]}, "role must be one of system, user, assistant", f"{LAST}.role"),
    ({"content": None}, "content must be text, not nothing", f"{LAST}.content"),
    ({"content": [{"type": "text"}]}, "content must be text", f"{LAST}.content"),
    ({"content": "\ud800"}, "unpaired surrogate", f"{LAST}.content"),
    ({"name": "x"}, 'unknown key "name"; keys: content, role', LAST),
]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [*((body, *found) for body, found in BAD.items())]
    + [(json.dumps({"input": [conversation(**last)]}).encode(), text, param) for last, text, param in BAD_MESSAGE],
    ids=range(len(BAD) + len(BAD_MESSAGE)),
)
def test_what_is_wrong_with_a_request_and_where(body: bytes, message: str, param: str | None):
    with pytest.raises(HTTPError) as refused:
        http_protocol.read_request(body, 8)
    assert refused.value.status == 400
    assert message in refused.value.message and refused.value.param == param
    assert len(refused.value.message) < 200


def test_each_refusal_has_its_status():
    with serving_with(max_request_bytes=2000) as address:
        one = {"input": [conversation()]}
        for status, code, (found, reply) in [
            (400, "bad_request", ask(address, {"input": ["x"]})),
            (404, "not_found", ask(address, {"model": "other", **one})),
            (404, "not_found", ask(address, path="/v1/embeddings")),
            (405, "method_not_allowed", ask(address, path=http_protocol.REWARDS)),
            (405, "method_not_allowed", ask(address, one, path=http_protocol.HEALTH)),
            (413, "too_large", ask(address, {"input": [conversation()] * 9})),
            (413, "too_large", ask(address, {"input": [conversation("x" * 2000)]})),
        ]:
            assert (found, reply["error"]["code"]) == (status, code)
            assert reply["error"].keys() == {"message", "type", "param", "code"}
        assert ask(address, one)[0] == 200


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
    judge = Lengths()
    with serving_with(judge, TOKEN) as address:
        for path, body in (
            (http_protocol.REWARDS, {"input": [conversation()]}),
            (http_protocol.MODELS, None),
            (http_protocol.METRICS, None),
            ("/x", None),
        ):
            status, reply = ask(address, body, path, **headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_token")
        assert ask(address, path=http_protocol.HEALTH)[0] == 200
    assert judge.batches == []


def test_with_the_token_all_is_told():
    with serving_with(token=TOKEN) as address:
        for scheme in ("Bearer", "bearer"):
            header = {"Authorization": f"{scheme} {TOKEN}"}
            assert ask(address, {"input": [conversation()]}, **header)[0] == 200
            assert ask(address, path=http_protocol.MODELS, **header)[0] == 200
        connection = HTTPConnection(address)
        connection.request("GET", http_protocol.MODELS)
        assert connection.getresponse().getheader("WWW-Authenticate") == "Bearer"


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that are made at the same time."""
    results: list[Any] = [None] * len(calls)
    threads = [
        threading.Thread(target=lambda i=i, call=call: results.__setitem__(i, call())) for i, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def wait_until(found: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if found():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen within 5 s")


def test_requests_that_wait_are_scored_together_and_each_gets_its_own():
    judge = Lengths()
    with serving_with(judge, batch_wait_s=1.0, max_batch_size=5) as address:
        texts = [["a"], ["bb", "ccc"], ["dddd", "eeeee"]]
        asked = [{"input": [conversation(text) for text in each]} for each in texts]
        replies = in_threads(*(lambda one=one: ask(address, one) for one in asked))
    scores = [[item["score"] for item in reply["data"]] for _, reply in replies]
    assert scores == [[1.0], [2.0, 3.0], [4.0, 5.0]]
    assert [sorted(batch) for batch in judge.batches] == [["a", "bb", "ccc", "dddd", "eeeee"]]


def test_one_request_that_cannot_be_scored_does_not_spoil_the_others(capfd: pytest.CaptureFixture[str]):
    """Of a fault behind the service the client gets the type alone, the log that and the frames, once a minute."""
    batching.ERRORS._kinds.clear()
    texts = ["good", "refused", "template", "model", f"bug {TOKEN}", f"bug {TOKEN}", "exit"]
    with serving_with(batch_wait_s=1.0, max_batch_size=7) as address:
        replies = in_threads(*(lambda t=t: ask(address, {"input": [conversation(t)]}) for t in texts))
        assert ask(address, {"input": [conversation("good")]})[0] == 200
    assert [status for status, _ in replies] == [200, 400, 500, 500, 500, 500, 500]
    assert replies[0][1]["data"][0]["score"] == 4.0
    kinds = ["ZeroDivisionError", "ModelError", "KeyError", "KeyError", "SystemExit"]
    messages = [reply["error"]["message"] for _, reply in replies[1:]]
    assert messages == ["roles must alternate", *(f"scoring failed: {kind}" for kind in kinds)]
    said = capfd.readouterr()
    assert TOKEN not in said.err + said.out
    assert all(said.err.count(f"scoring failed: {kind}\n") == 1 for kind in kinds)
    assert said.err.count("raise KeyError(*responses)") == 1


def test_a_function_that_raises_is_asked_again_and_then_named_by_its_type(tmp_path: Path, capfd):
    batching.ERRORS._kinds.clear()
    file = tmp_path / "scores.py"
    file.write_text(
        "def score(completions):\n"
        f"    raise PermissionError('postgres://me:{TOKEN}@db: ' + completions[0][0]['content'])\n"
    )
    with serving_with(FunctionScorer(FunctionRewardConfig(function=f"{file}:score"))) as address:
        client = HttpScorer(HttpRewardConfig(url=f"http://{address}", retries=2, backoff_s=0.001, max_backoff_s=0.01))
        with pytest.raises(WorkerError, match="in 3 attempts; last error: status 500: scoring failed: Perm") as failed:
            client.score([Dialogue((Message("user", "q"),), "a private answer")])
        client.close()
    said = capfd.readouterr().err
    assert "in score\n    raise PermissionError('postgres://me:<password>@db: '" in said
    assert not [text for text in (TOKEN, "private") if text in said + str(failed.value)]


def test_each_request_of_a_failed_batch_has_the_time_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    """The batch and each request alone take 6 s of 10: 24 s together, and the judge hangs in none of them."""
    clock, stuck = [0.0], []

    class Slow(Lengths):
        def score(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
            clock[0] += 6
            stuck.append(batcher.stuck())
            if any(one.response == "long" for one in dialogues):
                clock[0] += 5
                stuck.append(batcher.stuck())
            return super().score(dialogues)

    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    batcher = Batcher(Slow(), replace(SECTION, request_timeout_s=10.0, batch_wait_s=5.0, max_batch_size=3))

    async def all_of(*texts: str) -> list[Any]:
        asked = [batcher.score([Dialogue((), text)]) for text in texts]
        return await asyncio.gather(*asked, return_exceptions=True)

    scores = asyncio.run(all_of("a", "bug", "ccc"))
    assert [scores[0].values, scores[2].values] == [[1.0], [3.0]] and scores[1].status == 500
    assert stuck == [None] * 4
    asyncio.run(all_of("x", "y", "long"))
    assert stuck[4] is None and "request_timeout_s (10)" in stuck[5]


def test_a_cancelled_request_takes_no_room_in_a_batch():
    judge = Lengths()
    batcher = Batcher(judge, replace(SECTION, batch_wait_s=0.0, max_batch_size=2))

    async def play() -> None:
        judge.go.clear()
        asked = [asyncio.ensure_future(batcher.score([Dialogue((), "first")]))]
        while not judge.batches:
            await asyncio.sleep(0.001)
        left = asyncio.ensure_future(batcher.score([Dialogue((), "left")]))
        asked += [asyncio.ensure_future(batcher.score([Dialogue((), text)])) for text in "ab"]
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.wait({left})
        judge.go.set()
        await asyncio.gather(*asked)

    asyncio.run(play())
    assert judge.batches == [["first"], ["a", "b"]]


def test_a_full_queue_and_a_client_that_left_and_one_that_waits_too_long():
    judge = Lengths()
    judge.go.clear()
    with serving_with(judge, request_timeout_s=0.5, max_batch_size=1) as address:
        full = {"input": [conversation("x")] * 8}
        replies: list[Any] = []
        waiting = threading.Thread(target=lambda: replies.append(ask(address, full)))
        waiting.start()
        wait_until(lambda: bool(judge.batches))
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
        judge.go.set()
        wait_until(lambda: ask(address, path=http_protocol.HEALTH)[0] == 200)
        assert ask(address, {"input": [conversation("last")]})[0] == 200
    assert judge.batches == [["x"] * 8, ["last"]]  # what nobody waits for costs nothing


def test_counts_of_the_service_are_those_of_its_client():
    with serving_with(max_queue=2000) as address:
        judge = HttpScorer(HttpRewardConfig(url=f"http://{address}", batch_size=4, max_concurrency=3, backoff_s=0.001))
        texts = ["x" * n for n in range(21)] + ["nan"]
        scores = judge.score([Dialogue((Message("user", "q"),), text) for text in texts])
        assert scores[:-1].tolist() == [float(n) for n in range(21)] and scores[-1].isnan()
        found = dict(line.rsplit(" ", 1) for line in ask(address, path=http_protocol.METRICS)[1].splitlines())
        client = judge.metrics()
        judge.close()
    assert found['align_reward_requests_total{status="200"}'] == "6" == f"{client['requests']:g}"
    assert found["align_reward_conversations_total"] == "22" == f"{client['scored'] + client['unscored']:g}"
    assert found["align_reward_unscored_total"] == "1" == f"{client['unscored']:g}"
    assert found["align_reward_pending_conversations"] == "0" and found["align_reward_replicas"] == "1"
    assert found["align_reward_seconds_count"] == found['align_reward_seconds_bucket{le="+Inf"}'] == "6"


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
    judge, section = Lengths(), replace(SECTION, stop_timeout_s=60.0)
    judge.go.clear()
    front = service.HTTPServer(section, RewardApp(Batcher(judge, section), section, "m"))
    with front, closing(HTTPConnection(front.url.removeprefix("http://"))) as connection:
        connection.request("POST", http_protocol.REWARDS, json.dumps({"input": [conversation()]}).encode())
        wait_until(lambda: bool(judge.batches))
        begun = time.monotonic()
        front.__exit__()
        assert time.monotonic() - begun < 30  # the judge waits for 60
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["message"]) == (
            503,
            "the service is shutting down",
        )
        judge.go.set()


def test_requests_under_way_are_answered_before_the_end():
    judge = Lengths()
    judge.go.clear()
    section = replace(SECTION, stop_timeout_s=10.0)
    with service.HTTPServer(section, RewardApp(Batcher(judge, section), section, "m")) as front:
        address, replies = front.url.removeprefix("http://"), []
        asking = threading.Thread(target=lambda: replies.append(ask(address, {"input": [conversation("last")]})))
        asking.start()
        wait_until(lambda: bool(judge.batches))
        ending = threading.Thread(target=front.drain)
        ending.start()
        judge.go.set()
        ending.join(10)
        asking.join(10)
    assert replies[0][0] == 200 and replies[0][1]["data"][0]["score"] == 4.0
    with pytest.raises(ConnectionRefusedError):
        ask(address, path=http_protocol.HEALTH)


def test_a_refusal_passes_between_processes():
    refused = pickle.loads(pickle.dumps(HTTPError(503, "m", "p", 5)))
    assert (refused.status, refused.message, refused.param, refused.retry_after_s) == (503, "m", "p", 5)
