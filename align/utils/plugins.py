"""Python functions that a recipe names: ``module:function`` or ``path/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import ConfigError


def load_function(name: str) -> Callable[..., Any]:
    """Import the function.

    Raises `ConfigError` if the module cannot be imported, or has no synchronous callable of that name.
    """
    module, (place, _, function) = _module(name), name.rpartition(":")
    loaded = getattr(module, function, None)
    if not callable(loaded):
        values = vars(module).items()
        names = [n for n, value in values if inspect.isfunction(value) and value.__module__ == module.__name__]
        names = names or getattr(module, "__all__", [])  # for a module with lazy attributes
        raise ConfigError(
            f"function={name}: {place} has no function {function}", remedy=f"it has: {', '.join(names) or 'none'}"
        )
    if inspect.iscoroutinefunction(loaded):
        raise ConfigError(f"function={name} is asynchronous", remedy="give a synchronous function")
    return loaded


def function_signature(name: str, function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function. Raises `ConfigError` if it has none, such as ``builtins:max``."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        remedy = "wrap it in a function in a file: path/to/file.py:function"
        raise ConfigError(f"function={name} does not have a signature", remedy=remedy) from None


def _module(name: str) -> Any:
    place = name.rpartition(":")[0]
    try:
        return _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the module's own code runs
        remedy = "give a file, path/to/file.py:function, or a module that is installed on every node"
        raise ConfigError(f"function={name}: {type(error).__name__}: {error}", remedy=remedy) from error


def _from_file(file: Path) -> Any:
    name = f"align_plugin_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def function_fingerprint(name: str) -> str:
    """sha256 of the file that a function is taken from and, if it differs, of the file that defines it; other imported
    modules do not count. Raises `ConfigError` for a module without a file."""
    module = _module(name)
    defining = sys.modules.get(getattr(getattr(module, name.rpartition(":")[2], None), "__module__", ""), module)
    file, definition = (getattr(item, "__file__", None) for item in (module, defining))
    if file is None:
        remedy = "wrap it in a function in a file: path/to/file.py:function"
        raise ConfigError(f"function={name}: {name.rpartition(':')[0]} has no file to fingerprint", remedy=remedy)
    files = dict.fromkeys([file, definition or file])
    return hashlib.sha256(b"".join(Path(item).read_bytes() for item in files)).hexdigest()
