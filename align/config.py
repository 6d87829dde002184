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
import math
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from align.errors import ConfigError

ALGORITHMS = "align.algorithms"
DEFAULT, COMMAND_LINE = "default", "command line"

_TAG = "tag:yaml.org,2002:"
_NULL = f"{_TAG}null"
_KEY = re.compile(r"[\w-]+", re.ASCII)
_OVERRIDE = re.compile(r"(\w[\w-]*(?:\.[\w-]+)*)=(.*)", re.ASCII | re.DOTALL)
_REFERENCE = re.compile(r"\$\{\.*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}", re.ASCII)
# Text in which `${` begins a plain reference, and no backslash that OmegaConf would take away.
_TEXT = re.compile(rf"(?!\\+\?\?\?$)(?:(?<!\\){_REFERENCE.pattern}|(?!\$\{{).)*", re.ASCII | re.DOTALL)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(rf"(?:{_INT.pattern}(?:\.[0-9]*)?|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {  # type: what a message calls it, and the remedy
    int: ("a whole number", "write decimal digits such as 1000: no exponent, no fraction, no leading zero"),
    float: ("a number", "write a finite decimal number such as 0.001 or 1e-3, without a leading zero"),
    bool: ("true or false", "write true or false"),
    str: ("text", 'write text, in quotes if it looks like null, as in "null"'),
    list: ("a list", "write a list such as [a, b]"),
    tuple: ("a list", "write a list such as [a, b]"),
    dict: ("a mapping", "write a mapping such as {a: 1, b: 2}"),
    Any: ("an unambiguous value", "quote text; write true or false, or a decimal number without a leading zero"),
    NoneType: ("null", "write null"),
}


@dataclass(frozen=True)
class Loaded:
    """A recipe that has passed every check."""

    config: Any
    """The algorithm's ``Config``, frozen."""
    origin: dict[str, str]
    """For every dotted leaf key: ``default``, ``recipes/x.yaml:12`` or ``command line``."""
    recipe: Path
    """The file, as it was named."""


def load(recipe: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe for the algorithm it names. Raises `ConfigError` with everything that is wrong."""
    root, pairs = _compose_file(recipe), _compose_overrides(overrides)
    return _build(_find_schema(recipe, root, pairs), recipe, root, pairs)


def build(schema: type, recipe: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe against a given dataclass. Raises `ConfigError` with everything that is wrong."""
    return _build(schema, recipe, _compose_file(recipe), _compose_overrides(overrides))


def dump(config: Any, path: Path) -> None:
    """Write every value, references followed, in the order of the fields. Loading it gives an equal config."""
    path.write_text(_to_yaml(dataclasses.asdict(config)), encoding="utf-8")


def flatten(config: Any, prefix: str = "") -> dict[str, object]:
    """Leaves by dotted key. Entries of a mapping are leaves of their own; a list is one leaf."""
    leaves = {}
    for name, child in _children(config).items():
        leaves |= flatten(child, f"{prefix}{name}.") if _children(child) else {f"{prefix}{name}": child}
    return leaves


def show(loaded: Loaded) -> list[tuple[str, object, str]]:
    """Rows of (key, value, origin), in the order of the fields."""
    return [(key, value, loaded.origin[key]) for key, value in flatten(loaded.config).items()]


def describe(schema: type) -> dict[str, str]:
    """The string that follows each field in the source, by dotted key; sections and inherited fields included."""
    own: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    own[name] = " ".join(doc.split())
    docs = {}
    for name, hint in _hints(schema).items():
        docs[name] = own.get(name, "")
        if _is_section(hint):
            docs |= {f"{name}.{key}": doc for key, doc in describe(hint).items()}
    return docs


def _find_schema(recipe: Path, root: yaml.MappingNode, pairs: list[tuple[str, yaml.Node]]) -> type:
    """The ``Config`` of the algorithm that the command line or else the recipe names."""
    modules = pkgutil.iter_modules(importlib.import_module(ALGORITHMS).__path__)
    known = sorted(module.name for module in modules if module.name.isidentifier() and module.name[0] != "_")
    available = f"available: {', '.join(known)}"
    given = [(key.value, node, f"{recipe}:{key.start_mark.line + 1}") for key, node in root.value]
    given += [(key, node, COMMAND_LINE) for key, node in pairs]
    named = [(node, where) for key, node, where in given if key == "algorithm"]
    if not named:
        raise ConfigError("algorithm: has no value", where=f"{recipe}", remedy=f"name one; {available}")
    node, where = named[-1]
    if not isinstance(node, yaml.ScalarNode) or node.value not in known:
        near = difflib.get_close_matches(str(node.value), known, n=1)
        remedy = "; ".join([f"did you mean `{name}`?" for name in near] + [available])
        raise ConfigError(f"algorithm: {_found(node)} is not an algorithm", where=where, remedy=remedy)
    return importlib.import_module(f"{ALGORITHMS}.{node.value}").Config


def _build(schema: type, recipe: Path, root: yaml.Node, pairs: list[tuple[str, yaml.Node]]) -> Loaded:
    reader = _Reader(recipe, lambda node, key: DEFAULT)
    tree: Any = OmegaConf.create(reader.section(_to_node(_defaults(schema)), schema))
    reader.where = lambda node, key: f"{recipe}:{node.start_mark.line + 1}"
    layers = [("", reader.section(root, schema))]
    reader.where = lambda node, key: COMMAND_LINE
    for key, node in pairs:
        for name in reversed(key.split(".")):
            node = yaml.MappingNode(f"{_TAG}map", [(yaml.ScalarNode(f"{_TAG}str", name), node)])
        layers.append((key, reader.section(node, schema)))
    reader.stop()
    for key, layer in layers:
        try:
            tree = OmegaConf.merge(tree, layer)
        except (TypeError, OmegaConfBaseException) as error:
            problem = f"not merged: {str(error).splitlines()[0]}"
            reader.fault(key, problem, "give the whole value in one place", COMMAND_LINE if key else f"{recipe}")
    reader.stop()
    resolved = _to_node(_resolve(tree, reader))
    reader.where = lambda node, key: reader.origin(key)
    values = reader.section(resolved, schema)
    reader.stop()
    config = _construct(schema, values, reader)
    reader.stop()
    return Loaded(config, {key: reader.origin(key) for key in flatten(config)}, recipe)


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing: `_Reader` knows the type that a scalar must have."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = f"alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else event.tag and f"tag {event.tag}"
        if problem or self.depth > 40:
            raise yaml.MarkedYAMLError(problem=problem or "nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` composes: no aliases, and quotes around text that looks like something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
    _class.add_implicit_resolver(_NULL, re.compile("None$"), ["N"])


def _to_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _to_node(value: Any) -> yaml.Node:
    return yaml.compose(_to_yaml(value), Loader=_Loader)


def _compose(text: str, where: Callable[[int], str]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem, line = error.problem, error.problem_mark.line  # type: ignore[union-attr]
    except yaml.reader.ReaderError as error:
        problem, line = f"character U+{error.character:04X}", text.count("\n", 0, error.position)
    remedy = "write plain YAML without tags and aliases, odd text in quotes, references as ${key}"
    raise ConfigError(f"not readable: {problem}", where=where(line + 1), remedy=remedy)


def _compose_file(recipe: Path) -> yaml.MappingNode:
    try:
        text = recipe.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{error.strerror}", where=f"{recipe}", remedy="name a recipe that can be read") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", where=f"{recipe}:{line}", remedy="save the file as UTF-8") from error
    root = _compose(text, lambda line: f"{recipe}:{line}")
    if not isinstance(root, yaml.MappingNode):
        problem = f"expected lines of `key: value`, found {_found(root)}" if root else "the file is empty"
        where = f"{recipe}:{root.start_mark.line + 1}" if root else f"{recipe}"
        raise ConfigError(problem, where=where, remedy="begin with `algorithm: NAME`")
    return root


def _compose_overrides(overrides: Sequence[str]) -> list[tuple[str, yaml.Node]]:
    pairs = []
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            remedy = "write key=value without spaces around `=`, as in run.steps=100"
            raise ConfigError(f"{text!r} is not key=value", where=COMMAND_LINE, remedy=remedy)
        key, value = match.groups()
        node = _compose(value, lambda line, text=text: f"{COMMAND_LINE}: {text!r}")
        if value[node.end_mark.index if node else 0 :].strip():
            remedy = f"quote the value for YAML as well: '{key}=\"...\"'"
            raise ConfigError(f"{text!r} holds a comment, which would be lost", where=COMMAND_LINE, remedy=remedy)
        pairs.append((key, node or yaml.ScalarNode(_NULL, "")))
    return pairs


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag == _NULL else repr(node.value)
    return f"a list of {len(node.value)}" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {item.name: hints[item.name] for item in dataclasses.fields(schema)}


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def _children(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return value if isinstance(value, dict) else {}


def _defaults(schema: type) -> dict[str, Any]:
    """Defaults as nested dicts. A section is taken from its class, so that no ``__post_init__`` runs."""
    values = {}
    for item in dataclasses.fields(schema):
        value: Any = MISSING if item.default is dataclasses.MISSING else item.default
        if _is_section(item.default_factory):
            value = _defaults(item.default_factory)
        elif item.default_factory is not dataclasses.MISSING:
            value = item.default_factory()
        if is_dataclass(value) and not isinstance(value, type):  # made by a function
            value = dataclasses.asdict(value)
        values[item.name] = value
    return values


def _expected(hint: Any) -> tuple[str, str]:
    """What a message says of a type: its name, and the remedy."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        choices = ", ".join(map(str, args))
        return f"one of {choices}", f"choose one of {choices}"
    wanted, remedy = _KINDS[kind]
    return f"{wanted} of {len(args)}" if kind is tuple and ... not in args else wanted, remedy


@dataclass
class _Reader:
    """Reads nodes as the schema wants them; keeps the place of each key, and every fault."""

    recipe: Path
    where: Callable[[yaml.Node, str], str]
    places: dict[str, str] = field(default_factory=dict)
    faults: list[ConfigError] = field(default_factory=list)

    def fault(self, key: str, problem: str, remedy: str, where: str) -> None:
        self.faults.append(ConfigError(f"{key}: {problem}" if key else problem, where=where, remedy=remedy))

    def stop(self) -> None:
        if len(self.faults) == 1:
            raise self.faults[0]
        if self.faults:
            raise ConfigError("\n".join([f"{len(self.faults)} faults", *map(str, self.faults)]), where=f"{self.recipe}")

    def origin(self, key: str) -> str:
        """Place of a key; of the key it lies below, for an element of a list or what a reference brought."""
        key = key.partition("[")[0]
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, DEFAULT)

    def section(self, node: yaml.Node, schema: type, key: str = "") -> dict[str, Any]:
        hints, values = _hints(schema), {}
        if not isinstance(node, yaml.MappingNode):
            problem = f"expected a section, found {_found(node)}"
            self.fault(key, problem, f"give it keys: {', '.join(hints)}", self.places[key])
            return {}
        for name, dotted, child in self.entries(node, key):
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                likely = [f"`{key}.{match}`" if key else f"`{match}`" for match in near]
                likely += [f"`{place}`" for place in self.places if place.endswith(f".{name}") and place != dotted]
                remedy = f"did you mean {' or '.join(likely[:3])}?" if likely else f"keys here: {', '.join(hints)}"
                self.fault(dotted, f"unknown key (set to {_found(child)})", remedy, self.places[dotted])
            else:
                read = self.section if _is_section(hints[name]) else self.value
                values[name] = read(child, hints[name], dotted)
        return values

    def entries(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, str, yaml.Node]]:
        """Name, dotted key and value of each entry, its place noted. `???` takes no value away."""
        first: dict[str, str] = {}
        for name_node, child in node.value:
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else ""
            dotted = f"{key}.{name}" if key else name
            where = self.where(name_node, dotted)
            if not _KEY.fullmatch(name):
                remedy = "write letters, digits, _ and - alone; nest a section instead of writing a dot"
                self.fault(key, f"{_found(name_node)} is not a key", remedy, where)
            elif name in first:
                self.fault(dotted, f"given twice, first at {first[name]}", "keep one of the two", where)
            else:
                first[name] = where
                if child.value != MISSING or dotted not in self.places:
                    self.places[dotted] = where
                    yield name, dotted, child

    def value(self, node: yaml.Node, hint: Any, key: str) -> Any:
        where = self.places.get(key) or self.where(node, key)  # an element of a list has no place of its own
        if isinstance(node, yaml.ScalarNode) and not _TEXT.fullmatch(node.value):
            problem = f"{node.value!r} holds more than references to keys"
            remedy = "write references as ${policy.path}; a recipe reads no environment variables and escapes nothing"
            return self.fault(key, problem, remedy, where)
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            for place in [place for place in self.places if place.startswith(f"{key}.")]:
                del self.places[place]  # entries that the reference replaces
            return node.value  # followed when all layers are merged, then read as the type of this field
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for member in members:
            with suppress(ValueError):
                return self.convert(node, member, key)
        wanted, remedies = zip(*map(_expected, members), strict=True)
        return self.fault(key, f"expected {' or '.join(wanted)}, found {_found(node)}", remedies[0], where)

    def convert(self, node: yaml.Node, hint: Any, key: str) -> Any:
        kind, args = get_origin(hint) or hint, get_args(hint)
        if kind is not Literal and kind not in _KINDS:
            raise TypeError(f"{key}: a recipe cannot hold fields of type {hint}")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, hint)
        if isinstance(node, yaml.MappingNode) and kind in (dict, Any):
            item = args[1] if args else Any
            return {name: self.value(child, item, dotted) for name, dotted, child in self.entries(node, key)}
        if isinstance(node, yaml.SequenceNode) and kind in (list, tuple, Any):
            hints = args if kind is tuple and ... not in args else (args or (Any,))[:1] * len(node.value)
            pairs = zip(node.value, hints, strict=True)  # ValueError for a tuple of another length
            values = [self.value(child, item, f"{key}[{index}]") for index, (child, item) in enumerate(pairs)]
            return tuple(values) if kind is tuple else values
        raise ValueError


def _scalar(node: yaml.ScalarNode, hint: Any) -> Any:
    """A scalar as the type asked for; ValueError where it is not of that type."""
    text, is_null = node.value, node.tag == _NULL
    if hint is Any:
        hint = {"null": NoneType, "bool": bool, "int": int, "float": float}.get(node.tag.removeprefix(_TAG), str)
        if hint is bool and text.lower() not in ("true", "false"):
            raise ValueError
    if is_null and hint is NoneType:
        return None
    if is_null or hint is NoneType:
        raise ValueError
    if hint is str or text == MISSING:
        return text
    if hint is bool and text.lower() in _BOOL:
        return _BOOL[text.lower()]
    if hint is int and _INT.fullmatch(text):
        return int(text)
    if hint is float and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    for choice in get_args(hint) if get_origin(hint) is Literal else ():
        if str(choice) == text:
            return choice
    raise ValueError


def _resolve(tree: DictConfig, reader: _Reader) -> Any:
    """Plain values with every reference followed. A key without a value is a fault."""
    leaves = flatten(OmegaConf.to_container(tree))
    missing = [key for key, written in leaves.items() if written == MISSING]
    for key in missing:
        places = (reader.origin(key), reader.origin(key.rpartition(".")[0]))  # its own or its section's
        where = next((place for place in places if place not in (DEFAULT, COMMAND_LINE)), f"{reader.recipe}")
        reader.fault(key, "has no value", f"give it in the recipe, or as {key}=VALUE on the command line", where)
    for key, written in leaves.items():
        try:
            value = OmegaConf.select(tree, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if "${" in str(value):
                problem = f"{written!r} becomes {str(value)!r}"
                reader.fault(key, problem, "write in one place what is not plain text", reader.origin(key))
        except OmegaConfBaseException as error:
            if missing and isinstance(error, InterpolationToMissingValueError):
                continue  # that fault is reported at the missing key
            unknown = [name for name in _REFERENCE.findall(str(written)) if name not in reader.places]
            near = [best for name in unknown for best in difflib.get_close_matches(name, reader.places, n=1)]
            remedy = f"did you mean ${{{near[0]}}}?" if near else "refer to a key of the recipe, as ${policy.path}"
            reader.fault(key, f"{written!r}: {str(error).splitlines()[0]}", remedy, reader.origin(key))
    reader.stop()
    return OmegaConf.to_container(tree, resolve=True)


def _construct(schema: type, values: dict[str, Any], reader: _Reader, prefix: str = "") -> Any:
    """Instantiate sections from the inside out. A ValueError from ``__post_init__`` is a fault."""
    before, ready = len(reader.faults), dict(values)
    for name, hint in _hints(schema).items():
        if _is_section(hint):
            ready[name] = _construct(hint, values[name], reader, f"{prefix}{name}.")
    if len(reader.faults) > before:
        return None
    try:
        return schema(**ready)
    except ValueError as error:
        words = re.findall(r"\w+(?:\.\w+)*", str(error))
        named = {key: value for key, value in flatten(ready, prefix).items() if key.removeprefix(prefix) in words}
        places = {key: reader.origin(key) for key in named}
        where = next((place for place in places.values() if place != DEFAULT), f"{reader.recipe}")
        changes = [f"{key} = {value!r} ({places[key]})" for key, value in named.items()]
        section = prefix.removesuffix(".")
        reader.fault(section, f"{error}", f"change {' or '.join(changes) or section or 'a value'}", where)
