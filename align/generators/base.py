"""The interface of everything that answers conversations with text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from align.config import SamplingConfig
from align.data.chat import Message, Renderer


class Request(NamedTuple):
    """A conversation to be answered."""

    messages: tuple[Message, ...]
    """Ends where the answer begins; roles are those that the template knows, also ``response_1``."""
    sample: int = 0
    """Number of the answer. A local model's answer is a function of its weights, the seed, the sampling and the fields
    of the request: sample 0 requested twice gives the same answer twice."""
    opening: str = ""
    """Text that the answer begins with; the completion does not repeat it."""

    @property
    def key(self) -> bytes:
        """sha256 of all fields, which identifies the request."""
        content = [[*map(list, self.messages)], self.sample, self.opening]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()


class Completion(NamedTuple):
    """An answer."""

    text: str
    """Generated text without special tokens. If an endpoint sends reasoning separately: ``<think>``, the reasoning,
    ``</think>``, the answer."""
    finished: bool
    """False if the answer was truncated at the token limit."""
    prompt_tokens: int
    tokens: int
    """Generated tokens; 0 if unknown."""
    margin: float | None = None
    """log p(Yes) - log p(No) at the answer's last Yes or No, if requested and available."""


class TextGenerator(Protocol):
    """Answers conversations: a local model, an endpoint, a function.

    To add a kind, write its configuration, a subclass of this protocol, and an entry in
    `align.generators.models.GENERATORS`. The class methods load no weights and contact no server.
    """

    def __init__(self, config: Any, device: torch.device, seed: int = 0):
        """``seed`` feeds a local model's sampling and the seeds that an endpoint is sent.

        Raises `ModelError`, `ConfigError` or `DataError` with a remedy.
        """
        ...

    @classmethod
    def check(cls, config: Any, name: str) -> Renderer | None:
        """Check everything that the generator needs; returns the renderer of a local model. ``name`` is the section's
        key for messages. Raises `AlignError` with a remedy."""
        return None

    @classmethod
    def fingerprint(cls, config: Any, seed: int) -> str:
        """Hash of what answers depend on beside the recipe: weights, source code."""
        return hashlib.sha256(config.kind.encode()).hexdigest()

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """An answer to each request, in order. ``sampling.num_samples`` is ignored. ``margins`` fills
        `Completion.margin`.

        Raises `DataError` for a conversation that is too long for the model, and `WorkerError` if an endpoint gives no
        answer within its retries.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: ``requests``, ``retries``, ``prompt_tokens``, ``completion_tokens``."""
        ...

    def close(self) -> None:
        """End threads and connections."""
