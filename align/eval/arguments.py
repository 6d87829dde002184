"""Turn the command line of `align eval`, `align scale` and `align serve` into configs. Does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.config import PolicyEvaluationConfig, RewardEvaluationConfig, RewardServiceConfig, ScaleConfig
from align.config.generators import is_function
from align.config.load import LoadedConfig, build_config
from align.errors import ConfigError

REWARD_FLAGS = {"model": "reward.path", "benchmark": "benchmark", "data": "data.path"}
REWARD_FLAGS |= {name: name for name in ("scores", "out", "compare")}
"""Options of `align eval reward` and the config keys that they set."""
POLICY_FLAGS = {"data": "data.path", "answers": "answers", "out": "out"}
"""Options of `align eval policy` and the config keys that they set."""
SPEAKERS = {"model": "policy", "baseline": "baseline", "judge": "judge"}
"""Options that name a model, an endpoint or a function, and the section they fill."""
OWN = ("kind", "path", "revision", "init", "trust_remote_code", "function", "chat_template", "date")
OWN += ("url", "model", "key_env", "extra")
"""Generator keys that are specific to a model or endpoint; an option that names another one discards the recipe's."""
INSTEAD = {"model": "answers", "answers": "policy", "baseline": "baseline_answers"}
"""Options, and the recipe keys that they replace."""
FALLBACK = "default"
"""Entry of ``baseline_answers`` for all other categories."""


def reward(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of `align eval reward`."""
    words: list[str] = arguments.recipe
    recipe = Path(words.pop(0)) if words and "=" not in words[0] else None
    given = {key: getattr(arguments, flag) for flag, key in REWARD_FLAGS.items()}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    return build_config(RewardEvaluationConfig, recipe, [*words, *flags])


def policy(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of `align eval policy`: recipe, options, then ``key=value`` overrides. Raises `ConfigError`."""
    named = list(arguments.benchmark or [])
    words = [*arguments.recipe, *(word for word in named[1:] if "=" in word)]
    files = [word for word in named[1:] if "=" not in word]
    if len(files) > 1:
        problem = f"--benchmark {' '.join(named)}: more than one file"
        raise ConfigError(problem, where="command line", remedy="give one; a recipe stands before options")
    recipe = Path(words.pop(0)) if words and "=" not in words[0] else None
    given = {key: getattr(arguments, flag) for flag, key in POLICY_FLAGS.items()}
    given |= {"benchmark": next(iter(named), None)}
    given |= {"data.path": files[0]} if files else {}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    named_here = {flag: text for flag in SPEAKERS if (text := getattr(arguments, flag)) is not None}
    speakers = [pair for flag, text in named_here.items() for pair in speaker(SPEAKERS[flag], text)]
    without = [f"{SPEAKERS[flag]}.{key}" for flag in named_here for key in OWN]
    without += ["baseline"] if any(pair.startswith("baseline_answers.") for pair in speakers) else []
    answered = any(word.startswith("answers=") for word in [*words, *flags])
    without += [key for flag, key in INSTEAD.items() if flag in named_here or (flag == "answers" and answered)]
    return build_config(PolicyEvaluationConfig, recipe, [*speakers, *words, *flags], without)


def speaker(section: str, text: str) -> list[str]:
    """The config keys of a generator named by ``http://HOST/v1#MODEL``, ``module:function``, a folder or a hub id;
    a baseline may also be a file of answers."""
    if section == "baseline" and Path(text).expanduser().is_file():
        return [f"baseline_answers.{FALLBACK}={text}"]
    address, _, model = text.partition("#")
    if text.startswith(("http://", "https://")):
        keys = {"kind": "endpoint", "url": address, "model": model}
    elif is_function(text):
        keys = {"kind": "function", "function": text}
    else:
        keys = {"kind": "model", "path": text}
    return [f"{section}.{key}={value}" for key, value in keys.items()]


def scale(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of `align scale`."""
    return build_config(ScaleConfig, arguments.recipe, arguments.overrides)


def service(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of `align serve reward`."""
    return build_config(RewardServiceConfig, arguments.recipe, arguments.overrides)
