"""Batches for a reward model: requests that wait at the same time are scored together."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import NamedTuple, Protocol

from align.config import RewardServiceConfig
from align.data.chat import Dialogue
from align.errors import AlignError, ConversationError, WorkerError
from align.rewards.base import RewardScorer
from align.rewards.http_protocol import HTTPError
from align.serve.log_limit import LogLimit

LOADING_S = 5
"""Retry-After of a request that comes while no replica answers, in seconds."""
ERRORS = LogLimit()
"""Log of scores that failed."""


class ResponseScores(NamedTuple):
    """Scores of responses, in the order of the request."""

    values: list[float]
    attribute_names: tuple[str, ...]
    """Empty for a scorer with one number."""
    attributes: list[list[float]]

    def slice(self, start: int, end: int) -> ResponseScores:
        """Scores of some of the responses."""
        return ResponseScores(self.values[start:end], self.attribute_names, self.attributes[start:end])


class ScoringBackend(Protocol):
    """Scores the requests of a `RewardApp`: a `Batcher` in this process, or replicas in others."""

    async def score(self, dialogues: list[Dialogue]) -> ResponseScores:
        """Raises `HTTPError`."""
        ...

    async def replicas(self) -> int:
        """Number of replicas that answer."""
        ...


class LoadingBackend:
    """The backend while the model is being loaded."""

    async def score(self, dialogues: list[Dialogue]) -> ResponseScores:
        """Raises `HTTPError`."""
        raise HTTPError(503, "the model is being loaded", retry_after_s=LOADING_S)

    async def replicas(self) -> int:
        """None yet."""
        return 0


class Batcher:
    """A backend that scores the conversations of several requests in one batch, in a thread."""

    def __init__(self, scorer: RewardScorer, config: RewardServiceConfig):
        self._scorer, self._config = scorer, config
        self._queue: queue.SimpleQueue[tuple[list[Dialogue], Future[ResponseScores]]] = queue.SimpleQueue()
        self._batch_start: float | None = None
        """Start time of the batch in flight; None between batches."""
        self._thread = threading.Thread(target=self._run, name="reward-batches", daemon=True)
        self._thread.start()

    async def score(self, dialogues: list[Dialogue]) -> ResponseScores:
        """See `ScoringBackend`. A request that is cancelled before its batch begins costs nothing."""
        future: Future[ResponseScores] = Future()
        self._queue.put((dialogues, future))
        return await asyncio.wrap_future(future)

    async def replicas(self) -> int:
        return int(self.stuck() is None)

    def stuck(self) -> str | None:
        """Why this batcher will answer no more; None if it works."""
        start, limit_s = self._batch_start, self._config.request_timeout_s
        if start is not None and time.monotonic() - start > limit_s:
            return f"a batch takes longer than request_timeout_s ({limit_s:g})"
        return None if self._thread.is_alive() else "the thread that scores has ended"

    def check(self) -> None:
        """Raise `WorkerError` if this batcher will answer no more."""
        if reason := self.stuck():
            raise WorkerError(reason, remedy="start the service again; lower max_batch_size or raise request_timeout_s")

    def _run(self) -> None:
        while True:
            batch = [request for request in self._gather() if request[1].set_running_or_notify_cancel()]
            if batch:
                self._score(batch)
                self._batch_start = None

    def _gather(self) -> list[tuple[list[Dialogue], Future[ResponseScores]]]:
        """Wait for a request, then collect more until the batch is full or ``batch_wait_s`` has passed."""
        batch = [self._queue.get()]
        end = time.monotonic() + self._config.batch_wait_s
        # Cancelled requests will not be scored, so they do not fill the batch.
        while sum(len(dialogues) for dialogues, f in batch if not f.cancelled()) < self._config.max_batch_size:
            try:
                batch.append(self._queue.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _score(self, batch: Sequence[tuple[list[Dialogue], Future[ResponseScores]]]) -> None:
        """Answer all requests of a batch. If it fails, score each request alone, so that one cannot fail the others."""
        self._batch_start = time.monotonic()
        try:
            scores = self._scores([dialogue for dialogues, _ in batch for dialogue in dialogues])
        except BaseException as error:  # SystemExit too: without this thread nothing more would be scored
            if len(batch) == 1:
                batch[0][1].set_exception(error_answer(error))
                return
            for request in batch:
                self._score([request])
            return
        ends = list(accumulate(len(dialogues) for dialogues, _ in batch))
        for (dialogues, future), end in zip(batch, ends, strict=True):
            future.set_result(scores.slice(end - len(dialogues), end))

    def _scores(self, dialogues: Sequence[Dialogue]) -> ResponseScores:
        names = self._scorer.attribute_names
        if not names:
            return ResponseScores(self._scorer.score(dialogues).tolist(), (), [])
        score_B, attribute_BA = self._scorer.score_attributes(dialogues)
        return ResponseScores(score_B.tolist(), names, attribute_BA.tolist())


def error_answer(error: BaseException) -> HTTPError:
    """The answer to a request that failed: the reason for a conversation that cannot be read, otherwise only the type.

    The log gets the stack frames without the error's text, which may quote a conversation.
    """
    if isinstance(error, ConversationError) and error.public:
        return HTTPError(400, error.public, "input")
    while isinstance(error, AlignError) and error.__cause__ is not None:
        error = error.__cause__  # the exception that a function or a template raised
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    ERRORS.print(f"{kind} at {place}", f"scoring failed: {kind}\n{''.join(traceback.format_list(frames))}".rstrip())
    return HTTPError(500, f"scoring failed: {kind}")
