"""Client of servers with OpenAI's chat-completions protocol: OpenAI, vLLM, SGLang, TensorRT-LLM, NIM."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from align.config import EndpointGeneratorConfig, SamplingConfig
from align.data.rows import BadRow, parse_row
from align.errors import ConfigError, WorkerError
from align.generators.base import Completion, Request, TextGenerator
from align.generators.http import REDIRECT, BearerToken, HttpClient, RetryableError

PATH = "/chat/completions"
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1 << 12
"""Bytes of the longest answer that is read, and bytes that each token adds; log-probabilities are long."""
TOP_LOGPROBS = 20
"""Alternatives of each token that are requested for margins: the maximum of OpenAI."""


class EndpointGenerator(TextGenerator):
    """Client of a chat-completions server."""

    def __init__(self, config: EndpointGeneratorConfig, device: torch.device | None = None, seed: int = 0):
        """Raises `ConfigError` if the key is missing or cannot be sent."""
        self.config, self.seed = config, seed
        remedy = (
            f"export {config.key_env}=KEY before the start; workers on Ray inherit only ALIGN_..._KEY, OPENAI_API_KEY "
            "and NVIDIA_API_KEY"
        )
        key = BearerToken.from_env(config.key_env, "key_env", remedy)
        self._client = HttpClient(config, PATH, key, _remedies(config), _error_text)

    @classmethod
    def check(cls, config: EndpointGeneratorConfig, name: str) -> None:
        cls(config).close()

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """See `TextGenerator.complete`. Raises `ConfigError` for a failure that a retry does not change."""
        bodies = [json.dumps(self._body(request, sampling, margins)).encode() for request in requests]
        max_bytes = ANSWER_BYTES + sampling.max_tokens * TOKEN_BYTES
        return self._client.map(lambda body, stop: self._complete_one(body, max_bytes, stop), bodies)

    def metrics(self) -> dict[str, float]:
        counts, _ = self._client.pop_counts()
        return {name: float(value) for name, value in counts.items()}

    def close(self) -> None:
        self._client.close()

    def _body(self, request: Request, sampling: SamplingConfig, margins: bool) -> dict[str, Any]:
        if request.opening:
            raise ConfigError(
                f"an endpoint cannot continue an answer that begins with {request.opening[:40]!r}",
                where=self.config.url,
                remedy="use a local model (kind: model), or put these words into the question",
            )
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [message._asdict() for message in request.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:  # vLLM and SGLang have these two, OpenAI does not
            body["top_k"] = sampling.top_k
        if sampling.min_p:
            body["min_p"] = sampling.min_p
        if margins:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.config.seeded:
            body["seed"] = (self.seed + int.from_bytes(request.key[:4], "big")) % 2**31
        return {name: value for name, value in (body | self.config.extra).items() if value is not None}

    def _complete_one(self, body: bytes, max_bytes: int, stop: threading.Event) -> Completion:
        try:
            completion = self._client.post(body, max_bytes, _parse, stop)
        except RetryableError as error:
            raise WorkerError(
                f"the endpoint gave no answer in {error}",
                where=self.config.url,
                remedy="check that it runs and serves this model; raise retries and timeout_s, or "
                "lower max_concurrency",
            ) from None
        self._client.count(prompt_tokens=completion.prompt_tokens, completion_tokens=completion.tokens)
        return completion


def _remedies(config: EndpointGeneratorConfig) -> dict[int, str]:
    key = f"set the key: {f'environment variable {config.key_env}' if config.key_env else 'key_env=NAME'}"
    fields = "see the server's error text; extra adds and replaces fields of the request"
    return {
        REDIRECT: "set url to the address of the server",
        400: fields,
        401: key,
        403: key,
        404: f"url is the address without {PATH}, model a model that the server has",
        413: "shorten the conversation",
        422: fields,
    }


def _error_text(data: bytes) -> str:
    try:
        error = json.loads(data)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = data.decode("utf-8", "replace")
    return " ".join(str(text).split()) or "no error text"


def _parse(data: bytes) -> Completion:
    """Raises ValueError for an answer that does not follow the protocol."""
    try:
        answer = parse_row(data)
        choice = answer["choices"][0]
        message, usage = choice["message"], answer.get("usage") or {}
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError(f"content is {type(text).__name__}")
        text = f"<think>{reasoning}</think>{text}" if reasoning else text
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Completion(text, choice.get("finish_reason") != "length", *counts, _margin(choice.get("logprobs")))
    except (BadRow, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _margin(logprobs: Any) -> float | None:
    """log p(Yes) - log p(No) at the last token that is Yes or No; None where either is not among the alternatives."""
    for token in reversed((logprobs or {}).get("content") or []):
        if token["token"].strip() not in ("Yes", "No"):
            continue
        best: dict[str, float] = {}
        for other in [token, *token.get("top_logprobs", [])]:
            word = other["token"].strip()
            best[word] = max(best.get(word, -math.inf), float(other["logprob"]))
        if {"Yes", "No"} <= best.keys() and all(math.isfinite(best[word]) for word in ("Yes", "No")):
            return best["Yes"] - best["No"]
        return None
    return None
