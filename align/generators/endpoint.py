"""Servers with OpenAI's chat-completions protocol: OpenAI, vLLM, SGLang, TensorRT-LLM, NIM."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from align.config import EndpointConfig, SamplingConfig
from align.data.rows import BadRow, decoded
from align.errors import ConfigError, WorkerError
from align.generators import http
from align.generators.base import Completion, Request
from align.generators.http import Again, Transport

PATH = "/chat/completions"
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1 << 12
"""Length of the longest answer that is read, and what each token adds to it; log-probabilities are long."""
TOP = 20
"""Alternatives of each token that are asked for where a margin is wanted: the most that OpenAI gives."""


class EndpointGenerator:
    """A client: requests that are repeated, and counted."""

    def __init__(self, section: EndpointConfig, seed: int):
        """Raises `ConfigError` where the key is missing or cannot be sent."""
        self.section, self.seed = section, seed
        export = (
            f"export {section.key_env}=KEY before the start; workers on Ray get ALIGN_..._KEY, OPENAI_API_KEY and "
            "NVIDIA_API_KEY, and no key of another name"
        )
        self._transport = Transport(
            section,
            section.key_env,
            http.secret(section.key_env, "endpoint.key_env", export),
            _remedies(section),
        )
        self._pool = ThreadPoolExecutor(section.max_concurrency, "endpoint")
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """See `align.generators.base.Generator`. Raises `ConfigError` at once for an answer that repeating cannot
        change."""
        stop = threading.Event()
        bodies = [json.dumps(self._body(one, sampling, margins)).encode() for one in requests]
        limit = ANSWER_BYTES + sampling.max_tokens * TOKEN_BYTES
        futures = [self._pool.submit(self._ask, body, limit, stop) for body in bodies]
        try:
            for future in as_completed(futures):
                future.result()  # the first failure ends the call, whatever is still under way
            return [future.result() for future in futures]
        finally:
            stop.set()  # nothing is sent again once one has failed
            for future in futures:
                future.cancel()

    def metrics(self) -> dict[str, float]:
        """See `align.generators.base.Generator`."""
        with self._lock:
            found, self._counts = self._counts, {}
        return found

    def close(self) -> None:
        """End threads and connections."""
        self._pool.shutdown()
        self._transport.close()

    def _body(self, request: Request, sampling: SamplingConfig, margins: bool) -> dict[str, Any]:
        if request.opening:
            raise ConfigError(
                f"an answer that begins with {request.opening[:40]!r} cannot be asked of an endpoint",
                where=self.section.url,
                remedy="take a model in this process (kind model), or put the words into the question",
            )
        body: dict[str, Any] = {
            "model": self.section.model,
            "messages": [message._asdict() for message in request.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:  # of vLLM and SGLang; OpenAI knows neither
            body["top_k"] = sampling.top_k
        if sampling.min_p:
            body["min_p"] = sampling.min_p
        if margins:
            body |= {"logprobs": True, "top_logprobs": TOP}
        if self.section.seeded:
            body["seed"] = (self.seed + int.from_bytes(request.key[:4], "big")) % 2**31
        return {name: value for name, value in (body | self.section.extra).items() if value is not None}

    def _ask(self, body: bytes, limit: int, stop: threading.Event) -> Completion:
        self._count(requests=1)
        try:
            data = self._transport.repeated(
                lambda: _read(self._transport.post(PATH, body, limit, _message_of)),
                stop,
                lambda: self._count(requests=1, retries=1),
            )
        except Again as error:
            raise WorkerError(
                f"the endpoint gave no answer in {error}",
                where=self.section.url,
                remedy="see that it runs and serves this model; wait for longer with endpoint.retries and "
                "endpoint.timeout_s, or lower endpoint.max_concurrency",
            ) from None
        self._count(prompt_tokens=data.prompt_tokens, completion_tokens=data.tokens)
        return data

    def _count(self, **counts: float) -> None:
        with self._lock:
            for name, value in counts.items():
                self._counts[name] = self._counts.get(name, 0.0) + value


def _remedies(section: EndpointConfig) -> dict[int, str]:
    key = f"environment variable {section.key_env}" if section.key_env else "endpoint.key_env=NAME"
    return {
        http.MOVED: "set endpoint.url to where the server is",
        400: "the server's words say what it does not take; endpoint.extra adds fields and replaces them",
        401: f"set the key: {key}",
        403: f"set the key: {key}",
        404: f"endpoint.url is the address without {PATH}, endpoint.model one that the server has",
        413: "shorten the conversation",
        422: "the server's words say what it does not take; endpoint.extra adds fields and replaces them",
    }


def _message_of(data: bytes) -> str:
    """What a server says of a failure."""
    try:
        error = json.loads(data)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = data.decode("utf-8", "replace")
    return " ".join(str(text).split()) or "without a word"


def _read(data: bytes) -> Completion:
    """An answer. Raises `Again` for one that cannot be used."""
    try:
        found = decoded(data)
        choice = found["choices"][0]
        message, usage = choice["message"], found.get("usage") or {}
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError(f"content is {type(text).__name__}")
        text = f"<think>{reasoning}</think>{text}" if reasoning else text
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Completion(text, choice.get("finish_reason") != "length", *counts, _margin(choice.get("logprobs")))
    except (BadRow, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Again(f"an answer that cannot be used: {type(error).__name__}: {error}") from error


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
