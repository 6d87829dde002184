"""Recipes: from a YAML file and ``key=value`` arguments to the frozen ``Config`` of an algorithm.

Defaults, the recipe and the command line are merged in this order; the later one wins. Sections and
mappings merge key by key, lists are replaced. OmegaConf merges and follows ``${policy.path}``. Three
things are done here instead:

* Scalars are read by the type of their field, not by YAML 1.1, which takes ``010`` for 8, ``12:30:00`` for
  45000 and ``no`` for False. A text field takes what is written (``revision: 010`` is ``"010"``), a numeric one
  takes finite decimal numbers (``1e-6``) and refuses the rest, and a value without a type (below ``Model.init``)
  is refused where YAML 1.1 and 1.2 disagree. ``null``, ``~``, ``None`` or nothing is null; quotes make it text.
* A reference names a key and nothing else. OmegaConf's resolvers read the environment, so whatever is not
  ``${dotted.key}`` stops before OmegaConf sees it. YAML tags and aliases are refused as well.
* The schema is walked key by key, so that one message holds all faults, each with its file and line. No
  section is instantiated before every value is there: a ``__post_init__`` that checks a range meets no ``???``.
  (``default_factory=lambda: Model(path="${policy.path}")`` is the exception: it instantiates a section early.)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from align.config.eval import RewardEvaluationConfig
from align.config.eval_policy import PolicyBenchmarkName, PolicyEvaluationConfig
from align.config.scale import ScaleConfig
from align.config.schema_types import field_types, is_section, sections_in
from align.config.serve import RewardServiceConfig
from align.config.yaml_reader import (
    COMMAND_LINE,
    DEFAULT,
    REFERENCE,
    TAG,
    SchemaReader,
    compose_file,
    compose_overrides,
    describe_node,
    shorten,
    to_node,
    to_yaml,
)
from align.errors import ConfigError
from align.utils.atomic_write import write_atomic

ALGORITHMS = "align.algorithms"
MAX_CHAIN = 20
"""How many references may lead from one to the next."""
MAX_LENGTH, MAX_VALUES = 100_000, 300
"""Characters that references may bring to a key, and values."""
MAX_TOTAL_LENGTH, MAX_TOTAL_VALUES = 1_000_000, 3_000
"""The same for all keys together."""
INSTEAD: dict[str, tuple[str, object]] = {"run.steps": ("run.epochs", 0), "data.path": ("data.sources", "")}
"""Keys that need no value where another one has a value, and what they hold then."""


@dataclass(frozen=True)
class LoadedConfig:
    """A recipe that has passed every check."""

    config: Any
    """The algorithm's ``Config``, frozen."""
    origin: dict[str, str]
    """For every dotted leaf key: ``default``, ``recipes/x.yaml:12`` or ``command line``."""
    recipe: Path
    """The file, as it was named."""
    automatic: tuple[str, ...] = ()
    """Dotted keys whose ``auto`` a section replaced by a value for this machine."""
    changed: frozenset[str] = frozenset()
    """Dotted keys whose value was given and differs from the default."""


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a recipe for the algorithm it names. Raises `ConfigError` with everything that is wrong."""
    root, pairs = compose_file(recipe), compose_overrides(overrides)
    return _build(_find_schema(recipe, root, pairs), recipe, root, pairs)


def build_config(
    schema: type, recipe: Path | None, overrides: Sequence[str] = (), without: Sequence[str] = ()
) -> LoadedConfig:
    """Read a recipe against a given dataclass, or the overrides alone. Keys and sections ``without`` are left out of
    the recipe, for an override cannot empty a mapping. Raises `ConfigError` with everything that is wrong."""
    root = compose_file(recipe) if recipe else yaml.MappingNode(f"{TAG}map", [])
    for key in without:
        _leave_out(root, key.split("."))
    return _build(schema, recipe or Path(COMMAND_LINE), root, compose_overrides(overrides))


def _leave_out(node: yaml.Node, names: Sequence[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == names[0] and names[1:]:
                _leave_out(value, names[1:])
        node.value = [(key, value) for key, value in node.value if key.value != names[0] or names[1:]]


def write_config(config: Any, path: Path) -> None:
    """Write every value, references followed, in the order of the fields. Loading it gives an equal config."""
    write_atomic(path, format_config(config))


def format_config(config: Any) -> str:
    """What `dump` writes."""
    return to_yaml(dataclasses.asdict(config))


def flatten_config(config: Any, prefix: str = "") -> dict[str, object]:
    """Leaves by dotted key. Each entry of a mapping is a leaf; a list is one leaf."""
    leaves = {}
    for name, child in _children(config).items():
        leaves |= flatten_config(child, f"{prefix}{name}.") if _children(child) else {f"{prefix}{name}": child}
    return leaves


def list_values(loaded: LoadedConfig, all_keys: bool = True) -> list[tuple[str, object, str]]:
    """Rows of (key, value, origin), in the order of the fields; without ``all_keys`` those that differ from their
    defaults."""
    leaves = flatten_config(loaded.config)
    return [(key, value, loaded.origin[key]) for key, value in leaves.items() if all_keys or key in loaded.changed]


def load_any(file: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the file of any command: a recipe of `align train`, or the file of `align eval`, `align scale` or `align
    serve`. Its top-level keys tell which: ``algorithm``, ``benchmark``, ``out`` (scale), ``dir`` (a service)."""
    root = compose_file(file)
    given = {key.value: node.value for key, node in root.value}
    given |= {key: node.value for key, node in compose_overrides(overrides)}
    if "benchmark" in given:
        policy = given["benchmark"] in get_args(PolicyBenchmarkName)
        return build_config(PolicyEvaluationConfig if policy else RewardEvaluationConfig, file, overrides)
    if "algorithm" not in given and given.keys() & {"out", "dir"}:
        return build_config(ScaleConfig if "out" in given else RewardServiceConfig, file, overrides)
    return load_recipe(file, overrides)


def describe_schema(schema: type) -> dict[str, str]:
    """The string that follows each field in the source, by dotted key; sections and inherited fields included."""
    own: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    own[name] = " ".join(doc.split())
    docs = {}
    for name, hint in field_types(schema).items():
        docs[name] = own.get(name, "")
        for section in sections_in(hint):
            docs |= {f"{name}.{key}": doc for key, doc in describe_schema(section).items()}
    return docs


def _find_schema(recipe: Path, root: yaml.MappingNode, pairs: list[tuple[str, yaml.Node]]) -> type:
    """The ``Config`` of the algorithm that the command line or else the recipe names."""
    modules = pkgutil.iter_modules(importlib.import_module(ALGORITHMS).__path__)
    names = sorted(module.name for module in modules if module.name.isidentifier() and module.name[0] != "_")
    available = f"available: {', '.join(names)}"
    given = [(key.value, node, f"{recipe}:{key.start_mark.line + 1}") for key, node in root.value]
    given += [(key, node, COMMAND_LINE) for key, node in pairs]
    named = [(node, where) for key, node, where in given if key == "algorithm"]
    if not named:
        raise ConfigError("algorithm: has no value", where=f"{recipe}", remedy=f"name one; {available}")
    node, where = named[-1]
    if not isinstance(node, yaml.ScalarNode) or node.value not in names:
        near = difflib.get_close_matches(str(node.value), names, n=1)
        remedy = "; ".join([f"did you mean `{name}`?" for name in near] + [available])
        raise ConfigError(f"algorithm: {describe_node(node)} is not an algorithm", where=where, remedy=remedy)
    return importlib.import_module(f"{ALGORITHMS}.{node.value}").Config


def _build(schema: type, recipe: Path, root: yaml.Node, pairs: list[tuple[str, yaml.Node]]) -> LoadedConfig:
    reader = SchemaReader(recipe, lambda node, key: DEFAULT)
    overrides = [(key, _nested(key, node)) for key, node in pairs]
    reader.choose(schema, [root, *(node for _, node in overrides)])
    tree: Any = OmegaConf.create(reader.section(to_node(_defaults(schema, reader)), schema))
    defaults = flatten_config(OmegaConf.to_container(tree))
    reader.where = lambda node, key: f"{recipe}:{node.start_mark.line + 1}"
    layers = [("", reader.section(root, schema))]
    reader.where = lambda node, key: COMMAND_LINE
    layers += [(key, reader.section(node, schema)) for key, node in overrides]
    reader.stop()
    for key, layer in layers:
        try:
            tree = OmegaConf.merge(tree, layer)
        except (TypeError, OmegaConfBaseException) as error:
            problem = f"not merged: {str(error).splitlines()[0]}"
            reader.fault(key, problem, "give the whole value in one place", COMMAND_LINE if key else f"{recipe}")
    reader.stop()
    resolved = to_node(_resolve(tree, reader))
    reader.where = lambda node, key: reader.origin(key)
    values = reader.section(resolved, schema)
    reader.stop()
    config = _construct(schema, values, reader)
    reader.stop()
    leaves, written = flatten_config(config), flatten_config(values)
    automatic = tuple(key for key, value in leaves.items() if written.get(key) == "auto" != value)
    changed = frozenset(
        key for key, value in leaves.items() if reader.origin(key) != DEFAULT and value != defaults.get(key)
    )
    return LoadedConfig(config, {key: reader.origin(key) for key in leaves}, recipe, automatic, changed)


def _nested(key: str, node: yaml.Node) -> yaml.Node:
    for name in reversed(key.split(".")):
        node = yaml.MappingNode(f"{TAG}map", [(yaml.ScalarNode(f"{TAG}str", name), node)])
    return node


def _children(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return value if isinstance(value, dict) else {}


def _defaults(schema: type, reader: SchemaReader, prefix: str = "") -> dict[str, Any]:
    """Defaults as nested dicts. A section is taken from its class, so that no ``__post_init__`` runs."""
    values = {}
    for item in dataclasses.fields(schema):
        key = f"{prefix}{item.name}"
        section = reader.chosen.get(key, item.default_factory)
        if is_section(section):
            values[item.name] = _defaults(section, reader, f"{key}.")
            continue
        value: Any = item.default
        if section is not dataclasses.MISSING:
            value = None if section is None else item.default_factory()  # type: ignore[misc] - it is a function
        if is_dataclass(value) and not isinstance(value, type):  # made by a function
            made = dataclasses.asdict(value)
            value = {name: _reachable(type(value), name, child, reader, f"{key}.") for name, child in made.items()}
        else:
            value = _reachable(schema, item.name, value, reader)
        values[item.name] = MISSING if value is dataclasses.MISSING else value
    return values


def _reachable(schema: type, name: str, value: Any, reader: SchemaReader, prefix: str = "") -> Any:
    """A default that refers to a key of another section; that of the base class where this recipe's section has no such
    key, as ``${reward.path}`` of a critic beside a reward service."""
    reference = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    section, _, key = reference[1].rpartition(".") if reference else ("", "", "")
    member = reader.chosen.get(section)
    if section not in reader.chosen or (member is not None and key in field_types(member)):
        return value
    item = next(item for base in schema.__mro__[1:] for item in dataclasses.fields(base) if item.name == name)
    if hasattr(schema, "remedy"):
        reader.remedies[f"{prefix}{name}"] = schema.remedy
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _resolve(tree: DictConfig, reader: SchemaReader) -> Any:
    """Plain values with every reference followed. A key without a value is a fault."""
    leaves = flatten_config(OmegaConf.to_container(tree))
    for key, (other, value) in INSTEAD.items():
        if leaves.get(key) == MISSING and OmegaConf.select(tree, other):
            OmegaConf.update(tree, key, value)
            leaves[key] = value
    missing = [key for key, written in leaves.items() if written == MISSING]
    for key in missing:
        places = (reader.origin(key), reader.origin(key.rpartition(".")[0]))  # its own or its section's
        where = next((place for place in places if place not in (DEFAULT, COMMAND_LINE)), f"{reader.recipe}")
        remedy = reader.remedies.get(key, f"give it in the recipe, or as {key}=VALUE on the command line")
        reader.fault(key, "has no value", remedy, where)
    _bound(leaves, OmegaConf.to_container(tree), reader)
    for key, written in leaves.items():
        try:
            value = OmegaConf.select(tree, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if "${" in str(value):
                problem = f"{shorten(repr(written))} becomes {shorten(repr(str(value)))}"
                reader.fault(key, problem, "write in one place what is not plain text", reader.origin(key))
        except OmegaConfBaseException as error:
            if missing and isinstance(error, InterpolationToMissingValueError):
                continue  # that fault is reported at the missing key
            unknown = [name for name in REFERENCE.findall(str(written)) if name not in reader.places]
            near = [best for name in unknown for best in difflib.get_close_matches(name, reader.places, n=1)]
            remedy = f"did you mean ${{{near[0]}}}?" if near else "refer to a key of the recipe, as ${policy.path}"
            reader.fault(
                key, f"{shorten(repr(written))}: {shorten(str(error).splitlines()[0])}", remedy, reader.origin(key)
            )
    reader.stop()
    return OmegaConf.to_container(tree, resolve=True)


class _References:
    """How long values become when their references are followed, without following them: a reference to a value with
    two references, and so on, doubles it each time."""

    def __init__(self, tree: Any):
        self._tree = tree
        self._sizes: dict[tuple[str, ...], tuple[int, int]] = {}

    def size(self, key: tuple[str, ...], chain: tuple[tuple[str, ...], ...] = ()) -> tuple[int, int]:
        """Characters of the value at ``key``, and of how many values they are. Raises RecursionError where
        one leads back to where it came from, ValueError where it leads too far."""
        if key in chain:
            raise RecursionError("Recursive interpolation detected")
        if len(chain) > MAX_CHAIN:
            raise ValueError(f"leads through more than {MAX_CHAIN} references")
        if key not in self._sizes:
            value, at = self._at(key)
            self._sizes[key] = self._of(value, at, (*chain, key))
        return self._sizes[key]

    def _at(self, key: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
        """The value at ``key`` and its key; for a value behind a reference, that reference."""
        value = self._tree
        for depth, name in enumerate(key):
            if not isinstance(value, (dict, list)):
                return value, key[:depth]
            entries = value if isinstance(value, dict) else dict(zip(map(str, range(len(value))), value, strict=True))
            value = entries.get(name)
        return value, key

    def _of(self, value: Any, key: tuple[str, ...], chain: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            sizes = [self._of(item, (*key, str(name)), chain) for name, item in items]
            return sum(length for length, _ in sizes), max(1, sum(number for _, number in sizes))
        length, number = len(str(value)), 1
        for reference in REFERENCE.finditer(value) if isinstance(value, str) else ():
            dots = len(reference[0]) - len(reference[0].lstrip("${").lstrip(".")) - 2
            above = key[: max(0, len(key) - dots)] if dots else ()
            more, values = self.size((*above, *reference[1].split(".")), chain)
            length, number = length + more, number + values
        return length, number


def _bound(written: dict[str, Any], tree: Any, reader: SchemaReader) -> None:
    """Refuse references that would take too much time or memory to follow."""
    references, total_length, total_values = _References(tree), 0, 0
    for key, value in written.items():
        if "${" not in str(value):
            continue
        try:
            length, values = references.size(tuple(key.split(".")))
            total_length, total_values = total_length + length, total_values + values
            if length > MAX_LENGTH or values > MAX_VALUES:
                limits = f"{MAX_LENGTH} and {MAX_VALUES}"
                raise ValueError(f"becomes {length} characters of {values} values, at most {limits} are followed")
            if total_length > MAX_TOTAL_LENGTH or total_values > MAX_TOTAL_VALUES:
                limits = f"{MAX_TOTAL_LENGTH} characters of {MAX_TOTAL_VALUES} values"
                raise ValueError(f"with it the references of the recipe bring more than {limits}")
        except (ValueError, RecursionError) as error:
            problem = f"{shorten(repr(value))}: {error}"
            reader.fault(key, problem, "write the value itself, or refer to fewer keys", reader.origin(key))
            if isinstance(error, ValueError):
                break  # what follows would be over the limits as well
    reader.stop()


def _is_given(key: str, prefix: str, words: Container[str], reader: SchemaReader) -> bool:
    """Whether a message names the section of a key that the recipe gives; the section may be absent."""
    section = key.removeprefix(prefix).partition(".")[0]
    return section in words and f"{prefix}{section}" in reader.optional and reader.origin(key) != DEFAULT


def _construct(schema: type, values: dict[str, Any], reader: SchemaReader, prefix: str = "") -> Any:
    """Instantiate sections from the inside out. A ValueError from ``__post_init__`` is a fault."""
    before, ready = len(reader.faults), dict(values)
    for name, hint in reader.types(schema, prefix.removesuffix(".")).items():
        if is_section(hint):
            ready[name] = _construct(hint, values[name], reader, f"{prefix}{name}.")
        elif isinstance(values.get(name), dict) and is_section(get_args(hint)[-1] if get_args(hint) else None):
            item = get_args(hint)[-1]
            ready[name] = {
                key: _construct(item, value, reader, f"{prefix}{name}.{key}.") for key, value in values[name].items()
            }
    if len(reader.faults) > before:
        return None
    try:
        return schema(**ready)
    except ValueError as error:
        words = re.findall(r"\w+(?:\.\w+)*", str(error))
        named = {
            key: value
            for key, value in flatten_config(ready, prefix).items()
            if key.removeprefix(prefix) in words or _is_given(key, prefix, words, reader)
        }
        places = {key: reader.origin(key) for key in named}
        where = next((place for place in places.values() if place != DEFAULT), f"{reader.recipe}")
        changes = [f"{key} = {value!r} ({places[key]})" for key, value in named.items()]
        section = prefix.removesuffix(".")
        reader.fault(section, f"{error}", f"change {' or '.join(changes) or section or 'a value'}", where)
