"""Python functions that answer: rules, and stand-ins for models in tests."""

from __future__ import annotations

from collections.abc import Sequence

from align.config import SamplingConfig
from align.errors import ConfigError, DataError
from align.generators.base import Completion, Request
from align.utils import plugins


class FunctionGenerator:
    """A function of the messages, a list of ``{role, content}``, and the number of the sample; it returns the answer.

    The opening of a request is its last argument where it takes three.
    """

    def __init__(self, name: str):
        """Raises `ConfigError` for what cannot be imported or called so."""
        self.name, self.function = name, plugins.load_function(name)
        signature = plugins.function_signature(name, self.function)
        parameters = signature.parameters.values()
        positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        needed = [one for one in parameters if one.default is one.empty and one not in positional]
        needed = [one for one in needed if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        if needed or not 2 <= len(positional) <= 3:
            raise ConfigError(
                f"function={name} does not take two or three arguments: {signature}",
                remedy="take (messages, sample), or (messages, sample, opening)",
            )
        self._arguments = len(positional)
        self._requests = 0

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """See `align.generators.base.Generator`; margins it has none. Raises `DataError` for what is no text."""
        self._requests += len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        arguments = [[message._asdict() for message in request.messages], request.sample, request.opening]
        try:
            text = self.function(*arguments[: self._arguments])
        except Exception as error:
            raise DataError(f"function={self.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise DataError(f"function={self.name} returned {text!r}, not text")
        words = sum(len(message.content.split()) for message in request.messages)
        return Completion(text, finished=True, prompt_tokens=words, tokens=len(text.split()))

    def metrics(self) -> dict[str, float]:
        """See `align.generators.base.Generator`."""
        found, self._requests = self._requests, 0
        return {"requests": float(found)}

    def close(self) -> None:
        """Nothing is open."""
