"""Sections of what answers conversations with text: models in this process, endpoints, functions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from align.config.models import ModelConfig, RoleConfig


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
class GeneratorConfig(RoleConfig):
    """A role that answers conversations with text."""

    kind: str = MISSING
    """Selects the kind."""

    @property
    def source(self) -> str:
        """Folder, hub id, model and address, or function."""
        return self.path


@dataclass(frozen=True)
class ModelGeneratorConfig(GeneratorConfig, ModelConfig):
    """``kind: model``: a checkpoint in the role's own processes."""

    kind: Literal["model"] = "model"
    """The default kind."""
    max_num_seqs: int = 64
    """Rows of the key-value cache on one rank."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the checkpoint's own."""
    date: str | None = None
    """Text passed to that template as ``date_string``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError(f"path must be a folder or a hub id: {self.path!r}")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be positive: {self.max_num_seqs}")


@dataclass(frozen=True)
class EndpointGeneratorConfig(GeneratorConfig, HttpClientConfig):
    """``kind: endpoint``: a server with OpenAI's chat-completions protocol (OpenAI itself, vLLM, SGLang, TensorRT-LLM,
    NIM)."""

    kind: Literal["endpoint"] = "endpoint"
    """Selects this kind."""
    url: str = MISSING
    """Address up to the version, as ``https://api.openai.com/v1`` or ``http://127.0.0.1:8000/v1``; requests go to
    ``/chat/completions`` below it."""
    model: str = MISSING
    """Name of the model on the server."""
    timeout_s: float = 600.0
    """Seconds that one attempt may take, from connecting to the last byte."""
    key_env: str = ""
    """Name of the environment variable that holds the key, sent as a bearer token; empty sends none. The key itself is
    never written anywhere."""
    seeded: bool = True
    """Send a ``seed`` made of the run's seed and the request. Servers promise little of it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, as ``{reasoning_effort: low}``. They replace the fields that align sends, and
    null removes a field: ``{max_tokens: null, max_completion_tokens: 4096}``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url or not self.model:
            raise ValueError(f"kind endpoint needs url and model: {self.url!r}, {self.model!r}")

    @property
    def source(self) -> str:
        return f"{self.model} at {self.url}"


@dataclass(frozen=True)
class FunctionGeneratorConfig(GeneratorConfig):
    """``kind: function``: a Python function, for rules and tests."""

    kind: Literal["function"] = "function"
    """Selects this kind."""
    function: str = MISSING
    """``module:function`` or ``path/file.py:function``. It is called with the messages, a list of ``{role, content}``,
    and the number of the sample, and, if it takes three arguments, the fixed first words of the answer. It returns the
    answer."""

    def __post_init__(self) -> None:
        if not is_function(self.function):
            raise ValueError(f"kind function needs function=module:name or file.py:name: {self.function!r}")

    @property
    def source(self) -> str:
        return self.function


AnyGeneratorConfig = ModelGeneratorConfig | EndpointGeneratorConfig | FunctionGeneratorConfig
"""One of the kinds of generator; the key ``kind`` selects it."""
