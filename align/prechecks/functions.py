"""Whether a Python function is there that a recipe names, read from its source: nothing is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from align.config import GeneratorConfig, RewardConfig
from align.errors import ConfigError
from align.prechecks.sources import near

LATE = {"__getattr__", "*", "globals"}
"""Names in a source that may define more than is written there."""


def functions(config: Any, absent: set[str] = frozenset()) -> Iterator[tuple[str, str]]:  # type: ignore[assignment]
    """Key and name of each function that a configuration calls."""
    for name, value in vars(config).items():
        if name in absent:
            continue
        if isinstance(value, (RewardConfig, GeneratorConfig)) and value.function:
            yield f"{name}.function", value.function
        if isinstance(value, RewardConfig) and value.generative.judge.function:
            yield f"{name}.generative.judge.function", value.generative.judge.function


def problem(key: str, name: str, where: str | None) -> ConfigError | None:
    """What is wrong with ``module:function`` or ``path/file.py:function``; None where nothing is, or where only an
    import can tell."""
    place, _, function = name.rpartition(":")
    source = Path(place).expanduser() if place.endswith(".py") else _source_of(place)
    if source is None:
        remedy = "give a file, path/to/file.py:function, or a module that is installed on every node"
        return ConfigError(f"{key}={name}: there is no module {place}", where=where, remedy=remedy)
    if source.suffix != ".py":
        return None
    if not source.is_file():
        close = near(place)
        remedy = f"did you mean {close}:{function}?" if close else "give a file, as path/to/file.py:function"
        return ConfigError(f"{key}={name}: there is no file {place} (from {Path.cwd()})", where=where, remedy=remedy)
    try:
        defined = _defined(ast.parse(source.read_bytes()))
    except (OSError, SyntaxError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        return ConfigError(f"{key}={name}: {source} cannot be read: {what}", where=where, remedy="mend the file")
    if function in defined or defined.keys() & LATE:
        return None
    known = [other for other, node in defined.items() if isinstance(node, ast.FunctionDef)]
    remedy = f"it has: {', '.join(known) or 'none'}"
    return ConfigError(f"{key}={name}: {place} has no function {function}", where=where, remedy=remedy)


def _source_of(module: str) -> Path | None:
    """The file of a module, something without the suffix ``.py`` for one that is compiled; None for no module."""
    first, *rest = module.split(".")
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    name = first
    for part in rest:  # `importlib.util.find_spec` of the whole name would import what it lies in
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return None if spec is None else Path(spec.origin or "compiled")


def _defined(tree: ast.AST) -> dict[str, ast.AST]:
    """Names that a module binds outside its functions and classes, and what binds each."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
            continue
        if isinstance(node, ast.alias):
            found[node.asname or node.name.partition(".")[0]] = node
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in LATE):
            found[node.id] = node
        found |= _defined(node)
    return found
