"""Client of a reward service: batched requests with retries, and a cache of scores."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from align.config import HttpRewardConfig
from align.data.chat import Dialogue, Renderer
from align.errors import WorkerError
from align.generators.http import REDIRECT, BearerToken, HttpClient, RetryableError
from align.rewards import http_protocol
from align.rewards.base import Groups, Ids, RewardScorer

ANSWER_BYTES, SCORE_BYTES = 1 << 16, 1 << 12
"""Bytes of the longest answer that is read, and bytes that each conversation adds."""
COUNTS = ("requests", "retries", "failures", "cache_hits", "scored", "unscored")


class HttpScorer(RewardScorer):
    """Scores of a reward service.

    Scores of requests that succeeded are cached even if another request of the same call fails.
    """

    def __init__(self, config: HttpRewardConfig, device: torch.device | None = None, seed: int = 0):
        """Raises `ConfigError` if the token is missing or cannot be sent.

        When the retries are used up, ``failed: fail`` raises `WorkerError`; ``drop`` gives those conversations NaN.
        """
        self.config = config
        name = self.config.token_env
        remedy = f"export {name}=TOKEN before the start; workers on Ray inherit names that begin ALIGN_REWARD_TOKEN"
        token = BearerToken.from_env(name, "token_env", remedy)
        self._client = HttpClient(
            self.config, http_protocol.REWARDS, token, _remedies(self.config), http_protocol.error_text
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, float] = OrderedDict()

    @classmethod
    def check(cls, config: HttpRewardConfig, name: str, renderer: Renderer | None) -> None:
        cls(config).close()

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        """See `RewardScorer.score`. Raises `WorkerError` when the retries are used up, and `ConfigError` for a failure
        that a retry does not change."""
        keys = [self._key(index, dialogue) for index, dialogue in enumerate(dialogues)]
        scores = self._cached(keys)
        missing = [item for item in dict(zip(keys, dialogues, strict=True)).items() if item[0] not in scores]
        self._client.count(cache_hits=len(keys) - len(missing))
        size = self.config.batch_size
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        # Requests in flight are waited for because their scores are cached.
        for batch_scores in self._client.map(self._score_batch, batches, finish_started=True):
            scores |= batch_scores
        return torch.tensor([scores[key] for key in keys], dtype=torch.float32)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call.

        ``requests`` sent, ``retries`` among them, ``failures`` after all retries; conversations: ``cache_hits`` not
        sent, ``scored`` with a number, ``unscored`` without. ``latency_*``: seconds of successful attempts, if any.
        """
        counts, seconds = self._client.pop_counts()
        metrics = {name: float(counts[name]) for name in COUNTS}
        if seconds:
            seconds.sort()
            metrics["latency_mean"] = sum(seconds) / len(seconds)
            for percent in (50, 95):
                metrics[f"latency_p{percent}"] = seconds[math.ceil(percent / 100 * len(seconds)) - 1]
        return metrics

    def close(self) -> None:
        self._client.close()

    def _key(self, index: int, dialogue: Dialogue) -> bytes:
        """Hash of the conversation, or its position if nothing is cached."""
        return hashlib.sha256(http_protocol.canonical(dialogue)).digest() if self.config.cache_size else b"%d" % index

    def _cached(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        with self._lock:
            scores = {key: self._cache[key] for key in keys if key in self._cache}
            for key in scores:
                self._cache.move_to_end(key)
        return scores

    def _score_batch(self, batch: Sequence[tuple[bytes, Dialogue]], stop: threading.Event) -> dict[bytes, float]:
        """Scores by key of the conversations of one request."""
        keys = [key for key, _ in batch]
        body = http_protocol.request_body([dialogue for _, dialogue in batch])
        max_bytes = ANSWER_BYTES + len(batch) * SCORE_BYTES
        try:
            values = self._client.post(body, max_bytes, lambda data: http_protocol.read_answer(data, len(keys)), stop)
        except RetryableError as error:
            self._client.count(failures=1, unscored=len(keys))
            if self.config.failed == "drop":
                return dict.fromkeys(keys, math.nan)
            raise WorkerError(
                f"the reward service gave no scores in {error}",
                where=self.config.url,
                remedy=f"check that it runs (GET {http_protocol.HEALTH}) and its log; raise retries and "
                "timeout_s; failed=drop leaves out such prompts",
            ) from None
        scores = dict(zip(keys, values, strict=True))
        finite = {key: score for key, score in scores.items() if math.isfinite(score)}
        self._client.count(scored=len(finite), unscored=len(scores) - len(finite))
        with self._lock:
            self._cache |= finite
            while len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)
        return scores


def _remedies(config: HttpRewardConfig) -> dict[int, str]:
    variable = f"environment variable {config.token_env}" if config.token_env else "token_env=NAME"
    token = f"set the token of the service: {variable}"
    return {
        REDIRECT: "set url to the address of the service",
        401: token,
        403: token,
        404: f"url is the address without {http_protocol.REWARDS}",
        413: "lower batch_size, or raise the limits of the service",
    }
