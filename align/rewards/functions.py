"""Python functions as judges, with the signature of TRL's reward functions.

A function is called by keyword with ``prompts`` (lists of messages), ``completions`` (lists of one message of the
assistant) and ``completion_ids`` (token ids, where the policy's are known), of which it gets those that it takes, and
returns a number for each, or None where it has none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Dialogue
from align.errors import ConfigError, DataError
from align.utils import plugins

GIVEN = ("prompts", "completions", "completion_ids")
"""What a function may ask for. TRL passes columns of the data set and its own state too, which nothing has here."""


def load(name: str) -> Callable[..., Any]:
    """The function ``module:function`` or ``path/file.py:function``. Raises `ConfigError`, as
    `align.utils.plugins.load_function` does, also for one that needs what nothing gives."""
    found = plugins.load_function(name)
    _check_signature(name, found)
    return found


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    parameters = plugins.function_signature(name, function).parameters.values()
    for one in parameters:
        if one.kind is one.POSITIONAL_ONLY or (one.kind is one.VAR_POSITIONAL):
            raise ConfigError(
                f"function={name}: {one} is positional", remedy="everything is passed by keyword: prompts, completions"
            )
        needed = one.default is one.empty and one.kind is not one.VAR_KEYWORD
        if needed and one.name not in GIVEN:
            raise ConfigError(
                f"function={name} needs an argument {one.name}, which nothing gives",
                remedy=f"take {', '.join(GIVEN)}, and **kwargs for what other trainers pass",
            )


class FunctionJudge:
    """A Python function that judges."""

    def __init__(self, name: str):
        self.name, self.function = name, load(name)
        parameters = inspect.signature(self.function).parameters.values()
        takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        self.taken = set(GIVEN) if takes_all else {one.name for one in parameters} & set(GIVEN)
        self.needed = {one.name for one in parameters if one.default is one.empty} & set(GIVEN)

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Sequence[Sequence[int]] | None = None) -> Tensor:
        """What the function returns, (B,); NaN for None. Raises `DataError` for what is no list of as many numbers."""
        given: dict[str, Any] = {
            "prompts": [[message._asdict() for message in one.context] for one in dialogues],
            "completions": [[{"role": "assistant", "content": one.response}] for one in dialogues],
        }
        if completion_ids is not None:
            given["completion_ids"] = [list(ids) for ids in completion_ids]
        elif "completion_ids" in self.needed:
            raise DataError(f"function={self.name} needs completion_ids, and here is only text")
        if not dialogues:
            return torch.zeros(0)
        try:
            returned = self.function(**{name: value for name, value in given.items() if name in self.taken})
        except (Exception, SystemExit) as error:  # sys.exit(0) would end a run with the status of success
            raise DataError(
                f"function={self.name} raised {type(error).__name__}: {error}",
                remedy="mend it; for a response that cannot be judged it may return None",
            ) from error
        return self._numbers(returned, len(dialogues))

    def metrics(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def _numbers(self, returned: Any, count: int) -> Tensor:
        values = returned.tolist() if hasattr(returned, "tolist") else returned  # an array or a tensor
        if not isinstance(values, (list, tuple)) or len(values) != count:
            found = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"{type(values).__name__}"
            raise DataError(
                f"function={self.name} returned {found} for {count} responses",
                remedy="return a list with one number, or None, for each response",
            )
        numbers = []
        for i, value in enumerate(values):
            item = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
            if item is not None and not isinstance(item, (int, float)):
                raise DataError(
                    f"function={self.name}: value {i} of {count} is {item!r}, no number",
                    remedy="return a list with one number, or None, for each response",
                )
            numbers.append(math.nan if item is None else float(item))
        return torch.tensor(numbers, dtype=torch.float32)
