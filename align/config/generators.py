"""Sections of what answers conversations with text: models in this process, endpoints, functions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from align.config.models import ModelConfig


def is_address(url: str) -> bool:
    """Whether ``url`` is an address of HTTP without user, query and fragment; hosts may be IPv6 in brackets."""
    return bool(re.fullmatch(r"https?://[^\s/?#@:]+(:\d+)?(/[^\s?#]*)?", re.sub(r"\[[\d:a-fA-F]+\]", "v6", url)))


def is_function(name: str) -> bool:
    """Whether ``name`` has the form ``module:function`` or ``path/file.py:function``."""
    return bool(re.fullmatch(r"[^:]+:[A-Za-z_]\w*", name))


@dataclass(frozen=True)
class HttpClientConfig:
    """How an HTTP server is called: what rewards over HTTP and endpoints share."""

    url: str = ""
    """Address of the server."""
    timeout_s: float = 60.0
    """Seconds that one attempt may take, from connecting to the last byte."""
    retries: int = 10
    """Attempts after the first, if the answer is unusable or has status 408, 425, 429 or 5xx. 10: with the next two, a
    minute and a quarter on average, so that a service may restart."""
    backoff_s: float = 0.5
    """Before retry n, from 0, the client waits a random time up to this times 2^n seconds, at least the server's
    ``Retry-After``."""
    max_backoff_s: float = 30.0
    """Upper bound on that time, seconds."""
    max_concurrency: int = 16
    """Requests of one rank in flight at the same time."""

    def __post_init__(self) -> None:
        if self.url and not is_address(self.url):
            raise ValueError(f"url must be http://HOST:PORT or https://HOST:PORT, without user or query: {self.url!r}")
        for name in ("timeout_s", "backoff_s", "max_backoff_s", "max_concurrency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive: {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"retries must not be negative: {self.retries}")


@dataclass(frozen=True)
class EndpointConfig(HttpClientConfig):
    """A server with OpenAI's chat-completions protocol: OpenAI itself, vLLM, SGLang, TensorRT-LLM, NIM."""

    url: str = ""
    """Address up to the version, as ``https://api.openai.com/v1`` or ``http://127.0.0.1:8000/v1``; requests go to
    ``/chat/completions`` below it."""
    timeout_s: float = 600.0
    """Seconds that one attempt may take, from connecting to the last byte."""
    model: str = ""
    """Name of the model as the server knows it."""
    key_env: str = ""
    """Name of the environment variable that holds the key, sent as a bearer token; empty sends none. The key itself is
    never written anywhere."""
    seeded: bool = True
    """Send a ``seed`` made of the run's seed and the request. Servers promise little of it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, as ``{reasoning_effort: low}``. They replace the fields that align sends, and
    null removes a field: ``{max_tokens: null, max_completion_tokens: 4096}``."""


@dataclass(frozen=True)
class GeneratorConfig(ModelConfig):
    """Answers conversations with text."""

    path: str = ""
    """Folder in Hugging Face layout, or a hub id. Given but with kind ``endpoint`` or ``function``."""
    kind: Literal["model", "endpoint", "function"] = "model"
    """``model``: a checkpoint in the role's own processes. ``endpoint``: a server with OpenAI's protocol.
    ``function``: Python, for tests and for rules."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The server (kind ``endpoint``)."""
    function: str = ""
    """``module:function`` or ``path/file.py:function`` (kind ``function``): it is called with the messages, a list of
    ``{role, content}``, and the number of the sample, and returns the answer."""
    max_num_seqs: int = 64
    """Rows of the key-value cache on one rank (kind ``model``)."""
    chat_template: str | None = None
    """File with a Jinja chat template in place of the checkpoint's own (kind ``model``)."""
    date: str | None = None
    """Text passed to that template as ``date_string``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "endpoint" and not (self.endpoint.url and self.endpoint.model):
            raise ValueError(
                f"kind endpoint needs endpoint.url and endpoint.model: {self.endpoint.url!r}, {self.endpoint.model!r}"
            )
        if self.kind == "function" and not is_function(self.function):
            raise ValueError(f"kind function needs function=module:name or file.py:name: {self.function!r}")
        if self.kind != "function" and self.function:
            raise ValueError(f"kind {self.kind} calls no function: {self.function!r}")
        if self.kind != "endpoint" and self.endpoint.url:
            raise ValueError(f"kind {self.kind} asks no server: endpoint.url {self.endpoint.url!r}")
        if self.kind != "model" and (self.path or self.init or self.chat_template or self.date):
            raise ValueError(
                f"kind {self.kind} reads no checkpoint: path {self.path!r}, init {self.init}, chat_template "
                f"{self.chat_template}, date {self.date}"
            )
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be positive: {self.max_num_seqs}")

    @property
    def present(self) -> bool:
        """Whether the recipe names anything that answers."""
        return bool(self.path) or self.kind != "model"
