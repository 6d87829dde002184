"""From a section to what it names, ready to answer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from align.config import GeneratorConfig
from align.data import chat
from align.data.chat import Renderer
from align.generators.base import Generator
from align.generators.endpoint import EndpointGenerator
from align.generators.functions import FunctionGenerator
from align.generators.models import ModelGenerator
from align.models import identity, load
from align.utils import plugins

SAYS = ("kind", "path", "revision", "init", "dtype", "function", "date")
"""Fields of a generator that change what it says, beside its weights, its template and its endpoint."""


def open_generator(section: GeneratorConfig, device: torch.device, seed: int = 0) -> Generator:
    """What a section names. ``seed`` is part of the noise of a model, and of what an endpoint is sent.

    Raises `ModelError`, `ConfigError` or `DataError`, each with a remedy.
    """
    match section.kind:
        case "endpoint":
            return EndpointGenerator(section.endpoint, seed)
        case "function":
            return FunctionGenerator(section.function)
        case _:
            return ModelGenerator(section, device, seed)


def check(section: GeneratorConfig, name: str = "generator") -> Renderer | None:
    """Look at all that a generator needs to come up, without reading weights or asking a server; returns what a model
    renders conversations by. ``name`` is that of the section, for messages.

    Raises `ModelError`, `ConfigError` or `DataError`, each with a remedy.
    """
    match section.kind:
        case "endpoint":
            EndpointGenerator(section.endpoint, seed=0).close()
        case "function":
            FunctionGenerator(section.function)
        case _:
            tokenizer = chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
            load.check(section, chat.vocab_size(tokenizer), name, sampled=1)  # the lengths are those of each call
            return Renderer(tokenizer, section.chat_template, section.date, section=name)
    return None


def depends_on(name: str, section: GeneratorConfig, seed: int) -> dict[str, Any]:
    """Whatever its answers depend on, by key below ``name``. Raises as `check` does."""
    renderer = check(section, name)
    known = {f"{name}.{field}": getattr(section, field) for field in SAYS}
    known |= {f"{name}.endpoint.{field}": getattr(section.endpoint, field) for field in ("url", "model", "extra")}
    content = f"{fingerprint(section, seed)} {renderer.fingerprint if renderer else ''}"
    return known | {f"{name}, its content": hashlib.sha256(content.encode()).hexdigest()}


def fingerprint(section: GeneratorConfig, seed: int) -> str:
    """As `align.models.identity.fingerprint`; of a function its source. Of an endpoint it says nothing: address and
    model stand in the recipe."""
    match section.kind:
        case "endpoint":
            return hashlib.sha256(b"endpoint").hexdigest()
        case "function":
            return plugins.function_fingerprint(section.function)
        case _:
            return identity.fingerprint(section, seed)
