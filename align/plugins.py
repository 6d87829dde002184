"""Python functions that a recipe names: ``module:function`` or ``path/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import ConfigError


def load(name: str) -> Callable[..., Any]:
    """The function.

    Raises `ConfigError` for a module that cannot be imported, for what is no function that could be called, and for an
    asynchronous one.
    """
    module, (place, _, function) = _module(name), name.rpartition(":")
    found = getattr(module, function, None)
    if not callable(found):
        known = [n for n, one in vars(module).items() if inspect.isfunction(one) and one.__module__ == module.__name__]
        raise ConfigError(
            f"function={name}: {place} has no function {function}", remedy=f"it has: {', '.join(known) or 'none'}"
        )
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"function={name} is asynchronous", remedy="give one that returns its answer itself")
    return found


def _module(name: str) -> Any:
    place = name.rpartition(":")[0]
    try:
        return _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the module's own code runs
        remedy = "give a file, path/to/file.py:function, or a module that is installed on every node"
        raise ConfigError(f"function={name}: {type(error).__name__}: {error}", remedy=remedy) from error


def _from_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"align_plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fingerprint(name: str) -> str:
    """sha256 of the file that a function is taken from; modules that it imports do not count."""
    return hashlib.sha256(Path(_module(name).__file__).read_bytes()).hexdigest()
