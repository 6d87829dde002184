"""One answer to one conversation, and who gives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from align.config import SamplingConfig
from align.data.chat import Message


class Request(NamedTuple):
    """A conversation to be answered."""

    messages: tuple[Message, ...]
    """Ends where the answer begins; roles may be any that the template knows (``response_1``)."""
    sample: int = 0
    """Number of the answer. What a model answers is a function of its weights, the seed, the sampling and the fields of
    the request alone: whoever asks for sample 0 twice gets one answer twice, and so for sample 1."""
    opening: str = ""
    """Text that the answer begins with; what is generated follows it, and the completion does not repeat it."""

    @property
    def key(self) -> bytes:
        """sha256 of all fields: what tells requests apart."""
        content = [[*map(list, self.messages)], self.sample, self.opening]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()


class Completion(NamedTuple):
    """An answer."""

    text: str
    """What was generated, without special tokens. Of an endpoint that sends its reasoning apart: ``<think>``, the
    reasoning, ``</think>``, the answer."""
    finished: bool
    """It ended by itself; false where it was cut off at the limit."""
    prompt_tokens: int
    tokens: int
    """Tokens generated; 0 where nobody counts."""
    margin: float | None = None
    """log p(Yes) - log p(No) where the answer's last Yes or No stands, where it was asked for and could be had."""


class Generator(Protocol):
    """Whatever answers."""

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """An answer to each request, in their order. ``sampling.num_samples`` is not read. With ``margins`` completions
        carry `Completion.margin`.

        Raises `DataError` for a conversation that is too long for the model, and `WorkerError` for an endpoint that
        gives no answer within its retries.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call: ``requests``, ``retries``, ``prompt_tokens``, ``completion_tokens``."""
        ...

    def close(self) -> None:
        """End threads and connections."""
        ...
