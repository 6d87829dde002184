"""Python functions that answer: rules, and substitutes for models in tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align.config import FunctionGeneratorConfig, SamplingConfig
from align.errors import ConfigError, DataError
from align.generators.base import Completion, Request, TextGenerator
from align.utils import plugins


class FunctionGenerator(TextGenerator):
    """Calls ``function(messages, sample)`` or ``function(messages, sample, opening)``, which returns the answer.

    ``messages`` is a list of ``{role, content}``, ``sample`` the number of the answer.
    """

    def __init__(self, config: FunctionGeneratorConfig, device: torch.device | None = None, seed: int = 0):
        """Raises `ConfigError` if the function cannot be imported or called like this."""
        name = config.function
        self.name, self.function = name, plugins.load_function(name)
        signature = plugins.function_signature(name, self.function)
        positional, keyword_only = 0, False
        for parameter in signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                positional += 1
            elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                keyword_only = True
        if keyword_only or not 2 <= positional <= 3:
            raise ConfigError(
                f"function={name} does not take two or three arguments: {signature}",
                remedy="define it as f(messages, sample) or f(messages, sample, opening)",
            )
        self._num_arguments = positional
        self._requests = 0

    @classmethod
    def check(cls, config: FunctionGeneratorConfig, name: str) -> None:
        cls(config)

    @classmethod
    def fingerprint(cls, config: FunctionGeneratorConfig, seed: int) -> str:
        return plugins.function_fingerprint(config.function)

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """See `TextGenerator.complete`. There are no margins. Raises `DataError` if the result is not text."""
        self._requests += len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        arguments = [[message._asdict() for message in request.messages], request.sample, request.opening]
        try:
            text = self.function(*arguments[: self._num_arguments])
        except Exception as error:
            raise DataError(f"function={self.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise DataError(f"function={self.name} returned {text!r}, not text")
        words = sum(len(message.content.split()) for message in request.messages)
        return Completion(text, finished=True, prompt_tokens=words, tokens=len(text.split()))

    def metrics(self) -> dict[str, float]:
        requests, self._requests = self._requests, 0
        return {"requests": float(requests)}
