"""The client of a reward service: order, cache, counts, and what is not retried."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from fake_service import FAULTS, Service, counts, dialogue, expected, judging, reply, running, true_scores

from align.config import HttpRewardConfig
from align.data.chat import Dialogue, Message
from align.errors import ConfigError
from align.generators import http as transport
from align.rewards import http_protocol
from align.rewards.http import HttpScorer


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
    judge = HttpScorer(HttpRewardConfig(url="http://127.0.0.1:1"))
    judge._client._seconds += [float(n) for n in range(100, 0, -1)]
    found = judge.metrics()
    assert [found[f"latency_{name}"] for name in ("mean", "p50", "p95")] == [50.5, 50.0, 95.0]
    judge._client._seconds += [3.0]
    found = judge.metrics()
    assert [found[f"latency_{name}"] for name in ("mean", "p50", "p95")] == [3.0, 3.0, 3.0]
    assert "latency_mean" not in judge.metrics()


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
        (413, {}, "status 413", "batch_size"),
        (302, {"Location": "http://elsewhere.example/x"}, "redirects to http://elsewhere.example/x", "set url"),
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
            HttpScorer(HttpRewardConfig(url=url, token_env="REWARD_TOKEN"))
        assert "words" not in str(failed.value)


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
        HttpRewardConfig(url=url)
