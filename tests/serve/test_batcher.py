"""Batches of the reward service: what is scored together, and what a failure does to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config import FunctionRewardConfig, HttpRewardConfig
from align.data.chat import Dialogue, Message
from align.errors import WorkerError
from align.rewards.functions import FunctionScorer
from align.rewards.http import HttpScorer
from align.serve import batcher as batching
from align.serve.batcher import Batcher

pytest.importorskip("align.serve.main", reason="needs the extra 'serve'")
from service_client import SECTION, TOKEN, Lengths, ask, conversation, in_threads, serving_with


def test_requests_that_wait_are_scored_together_and_each_gets_its_own():
    scorer = Lengths()
    with serving_with(scorer, batch_wait_s=1.0, max_batch_size=5) as address:
        texts = [["a"], ["bb", "ccc"], ["dddd", "eeeee"]]
        requests = [{"input": [conversation(text) for text in each]} for each in texts]
        replies = in_threads(*(lambda body=body: ask(address, body) for body in requests))
    scores = [[item["score"] for item in reply["data"]] for _, reply in replies]
    assert scores == [[1.0], [2.0, 3.0], [4.0, 5.0]]
    assert [sorted(batch) for batch in scorer.batches] == [["a", "bb", "ccc", "dddd", "eeeee"]]


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
    output = capfd.readouterr()
    assert TOKEN not in output.err + output.out
    assert all(output.err.count(f"scoring failed: {kind}\n") == 1 for kind in kinds)
    assert output.err.count("raise KeyError(*responses)") == 1


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
    output = capfd.readouterr().err
    assert "in score\n    raise PermissionError('postgres://me:<password>@db: '" in output
    assert not [text for text in (TOKEN, "private") if text in output + str(failed.value)]


def test_each_request_of_a_failed_batch_has_the_time_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    """The batch and each request alone take 6 s of 10: 24 s together, and the scorer hangs in none of them."""
    clock, stuck = [0.0], []

    class Slow(Lengths):
        def score(self, dialogues: Sequence[Dialogue]) -> torch.Tensor:
            clock[0] += 6
            stuck.append(batcher.stuck())
            if any(dialogue.response == "long" for dialogue in dialogues):
                clock[0] += 5
                stuck.append(batcher.stuck())
            return super().score(dialogues)

    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    batcher = Batcher(Slow(), replace(SECTION, request_timeout_s=10.0, batch_wait_s=5.0, max_batch_size=3))

    async def all_of(*texts: str) -> list[Any]:
        futures = [batcher.score([Dialogue((), text)]) for text in texts]
        return await asyncio.gather(*futures, return_exceptions=True)

    scores = asyncio.run(all_of("a", "bug", "ccc"))
    assert [scores[0].values, scores[2].values] == [[1.0], [3.0]] and scores[1].status == 500
    assert stuck == [None] * 4
    asyncio.run(all_of("x", "y", "long"))
    assert stuck[4] is None and "request_timeout_s (10)" in stuck[5]


def test_a_cancelled_request_takes_no_room_in_a_batch():
    scorer = Lengths()
    batcher = Batcher(scorer, replace(SECTION, batch_wait_s=0.0, max_batch_size=2))

    async def play() -> None:
        scorer.go.clear()
        futures = [asyncio.ensure_future(batcher.score([Dialogue((), "first")]))]
        while not scorer.batches:
            await asyncio.sleep(0.001)
        cancelled = asyncio.ensure_future(batcher.score([Dialogue((), "left")]))
        futures += [asyncio.ensure_future(batcher.score([Dialogue((), text)])) for text in "ab"]
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        scorer.go.set()
        await asyncio.gather(*futures)

    asyncio.run(play())
    assert scorer.batches == [["first"], ["a", "b"]]
