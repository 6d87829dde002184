"""A reward service in a thread, and the requests of its tests. Needs the extra ``serve``."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import torch

from align.config import CheckpointRewardConfig, RewardServiceConfig
from align.data.chat import Dialogue
from align.errors import ConversationError, DataError, ModelError
from align.rewards import http_protocol
from align.rewards.base import RewardScorer
from align.serve import main as service
from align.serve.app import RewardApp
from align.serve.batcher import Batcher

SECTION = RewardServiceConfig(
    reward=CheckpointRewardConfig(path="m"), port=0, stop_timeout_s=2.0, max_conversations=8, max_queue=8
)
TOKEN = "canary-0123456789abcdef"


class Lengths(RewardScorer):
    """A scorer whose score is the length of the response. It records which conversations came together, and fails if a
    response names an error."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def score(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
        responses = [dialogue.response for dialogue in dialogues]
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
def serving_with(scorer: Any = None, token: str = "", **settings: Any) -> Iterator[str]:
    """HOST:PORT of a service."""
    section = replace(SECTION, **settings)
    backend = scorer if hasattr(scorer, "replicas") else Batcher(scorer or Lengths(), section)
    with service.HTTPServer(section, RewardApp(backend, section, "m", token)) as front:
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


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen within 5 s")
