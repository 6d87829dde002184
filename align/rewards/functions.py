"""Python functions as rewards, called as TRL calls its reward functions.

A function is called by keyword with those of these arguments that it accepts: ``prompts`` (lists of messages),
``completions`` (lists with one assistant message) and ``completion_ids`` (token ids, if the policy sampled the
responses). It returns one number for each response, or None for no score. TRL's trainers also pass the columns of the
data set and their own state; a function that requires these is refused before the run starts.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.config import FunctionRewardConfig
from align.data.chat import Dialogue, Renderer
from align.errors import ConfigError, DataError
from align.rewards.base import Groups, Ids, RewardScorer
from align.utils import plugins

ARGUMENTS = ("prompts", "completions", "completion_ids")
ONE_NUMBER_EACH = "return a list with one number, or None, for each response"


def load(name: str) -> Callable[..., Any]:
    """The function ``module:function`` or ``path/file.py:function``.

    Raises `ConfigError`, as `align.utils.plugins.load_function` does, also for a function that cannot be called with
    `ARGUMENTS` alone.
    """
    function = plugins.load_function(name)
    signature = plugins.function_signature(name, function)
    parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ConfigError(
                f"function={name}: {parameter} is positional",
                remedy="accept keyword arguments: prompts, completions",
            )
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not accepts_any and not {parameter.name for parameter in parameters} & set(ARGUMENTS):
        short = name.rpartition(":")[2]
        raise ConfigError(
            f"function={name} accepts none of {', '.join(ARGUMENTS)}: {signature}",
            remedy=f"if it makes reward functions, name its result: write `reward = {short}(...)` into a file and set "
            "function=path/file.py:reward",
        )
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and parameter.name not in ARGUMENTS:
            raise ConfigError(
                f"function={name} requires the argument {parameter.name}; columns of the data set are not passed"
                f"{_missing_package(function)}",
                remedy=f"accept {', '.join(ARGUMENTS)}, and **kwargs for what other trainers pass; or call it in a "
                f"function of your own that looks {parameter.name} up by the prompt",
            )
    return function


def _missing_package(function: Callable[..., Any]) -> str:
    """TRL's accuracy rewards need a package that TRL does not install."""
    missing = function.__module__ == "trl.rewards.accuracy_rewards" and not importlib.util.find_spec("math_verify")
    return "; it also needs the package math-verify, which is not installed" if missing else ""


class FunctionScorer(RewardScorer):
    """Calls a Python function."""

    def __init__(self, config: FunctionRewardConfig, device: torch.device | None = None, seed: int = 0):
        self.name, self.function = config.function, load(config.function)
        parameters = inspect.signature(self.function).parameters.values()
        accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        accepted = {parameter.name for parameter in parameters} & set(ARGUMENTS)
        self._accepted = set(ARGUMENTS) if accepts_any else accepted
        self._requires_ids = any(
            parameter.name == "completion_ids" and parameter.default is parameter.empty for parameter in parameters
        )

    @classmethod
    def check(cls, config: FunctionRewardConfig, name: str, renderer: Renderer | None) -> None:
        load(config.function)

    @classmethod
    def fingerprint(cls, config: FunctionRewardConfig, seed: int) -> str:
        return plugins.function_fingerprint(config.function)

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        """See `RewardScorer.score`. Raises `DataError` unless the function returns one number or None each."""
        arguments: dict[str, Any] = {
            "prompts": [[message._asdict() for message in dialogue.context] for dialogue in dialogues],
            "completions": [[{"role": "assistant", "content": dialogue.response}] for dialogue in dialogues],
        }
        if completion_ids is not None:
            arguments["completion_ids"] = [list(ids) for ids in completion_ids]
        elif self._requires_ids:
            raise DataError(f"function={self.name} requires completion_ids, but only text is available here")
        if not dialogues:
            return torch.zeros(0)
        try:
            values = self.function(**{name: value for name, value in arguments.items() if name in self._accepted})
        except (Exception, SystemExit) as error:  # sys.exit(0) would end the run with the status of success
            raise DataError(
                f"function={self.name} raised {type(error).__name__}: {error}",
                remedy="fix the function; it may return None for a response that cannot be scored",
            ) from error
        return self._to_tensor(values, len(dialogues))

    def _to_tensor(self, values: Any, count: int) -> Tensor:
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        if not isinstance(values, (list, tuple)) or len(values) != count:
            size = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"{type(values).__name__}"
            raise DataError(f"function={self.name} returned {size} for {count} responses", remedy=ONE_NUMBER_EACH)
        scores = []
        for i, value in enumerate(values):
            score = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
            if score is not None and not isinstance(score, (int, float)):
                raise DataError(
                    f"function={self.name}: value {i} of {count} is {score!r}, not a number", remedy=ONE_NUMBER_EACH
                )
            scores.append(math.nan if score is None else float(score))
        return torch.tensor(scores, dtype=torch.float32)
