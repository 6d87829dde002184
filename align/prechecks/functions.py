"""Whether the Python functions that a recipe names exist, read from their source: nothing is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from align.config import (
    FunctionGeneratorConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    PolicyConfig,
    SamplerConfig,
)
from align.errors import ConfigError
from align.prechecks.sources import near

DYNAMIC = {"__getattr__", "*", "globals"}
"""Names in a source that may define more than is written there."""


def missing(config: Any, absent: set[str], places: Mapping[str, str]) -> list[ConfigError]:
    """An error for each function that the config calls and that does not exist, its place taken from ``places``."""
    errors = (problem(key, name, places.get(key)) for key, name in _functions(config, absent))
    return [error for error in errors if error is not None]


def _functions(config: Any, absent: set[str]) -> Iterator[tuple[str, str]]:
    """Key and name of each function, or class of a rollout engine, that a config names."""
    for name, value in vars(config).items():
        if name in absent:
            continue
        if isinstance(value, GenerativeRewardConfig):
            name, value = f"{name}.judge", value.judge
        if isinstance(value, (FunctionRewardConfig, FunctionGeneratorConfig)):
            yield f"{name}.function", value.function
        if isinstance(value, (PolicyConfig, SamplerConfig)) and ":" in value.engine:
            yield f"{name}.engine", value.engine


def problem(key: str, name: str, where: str | None) -> ConfigError | None:
    """What is wrong with ``module:function`` or ``path/file.py:function``. None if nothing is wrong, or if only an
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
        names = _top_level_names(ast.parse(source.read_bytes()))
    except (OSError, SyntaxError, ValueError) as error:
        problem = f"{key}={name}: {source} cannot be read: {type(error).__name__}: {error}"
        return ConfigError(problem, where=where, remedy="fix the file")
    if function in names or names.keys() & DYNAMIC:
        return None
    functions = [other for other, node in names.items() if isinstance(node, ast.FunctionDef)]
    remedy = f"it has: {', '.join(functions) or 'none'}"
    return ConfigError(f"{key}={name}: {place} has no function {function}", where=where, remedy=remedy)


def _source_of(module: str) -> Path | None:
    """The file of a module, without the suffix ``.py`` for a compiled module. None if there is no such module."""
    first, *rest = module.split(".")
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    name = first
    for part in rest:  # `importlib.util.find_spec` of the whole name would import the packages around it
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return None if spec is None else Path(spec.origin or "compiled")


def _top_level_names(tree: ast.AST) -> dict[str, ast.AST]:
    """Names that a module binds outside its functions and classes, with the node that binds each."""
    names: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = node
            continue
        if isinstance(node, ast.alias):
            names[node.asname or node.name.partition(".")[0]] = node
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in DYNAMIC):
            names[node.id] = node
        names |= _top_level_names(node)
    return names
