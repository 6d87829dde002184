"""YAML nodes: composing them safely, and reading them as the types of a schema.

Scalars are read by the type of their field, not by YAML 1.1. `Reader` walks a schema key by key, keeps the place of
each key and collects every fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import MISSING

from align.config import foreign_keys
from align.config.schema_types import field_types, is_section, tag, variants
from align.errors import ConfigError

DEFAULT, COMMAND_LINE = "default", "command line"

MAX_BYTES = 262_144
"""Length of a recipe, and of one ``key=value``."""
MAX_NODES = 5_000
"""Keys and values of a recipe, and of one ``key=value``."""
MAX_DEPTH = 40
"""How deep sections, mappings and lists may be nested."""

TAG = "tag:yaml.org,2002:"
_NULL = f"{TAG}null"
_KEY = re.compile(r"[\w-]+", re.ASCII)
_OVERRIDE = re.compile(r"(\w[\w-]*(?:\.[\w-]+)*)=(.*)", re.ASCII | re.DOTALL)
REFERENCE = re.compile(r"\$\{\.*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}", re.ASCII)
# Text in which `${` begins a plain reference, and no backslash that OmegaConf would take away.
_TEXT = re.compile(rf"(?!\\+\?\?\?$)(?:(?<!\\){REFERENCE.pattern}|(?!\$\{{).)*", re.ASCII | re.DOTALL)
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


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing: `Reader` knows the type that a scalar must have."""

    depth = nodes = 0
    max_nodes = math.inf

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = f"alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else event.tag and f"tag {event.tag}"
        if self.depth > MAX_DEPTH:
            problem = "nested too deeply"
        self.nodes += 1
        if self.nodes > self.max_nodes:
            problem = f"more than {self.max_nodes} keys and values"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` composes: no aliases, and quotes around text that looks like something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{TAG}float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
    _class.add_implicit_resolver(_NULL, re.compile("None$"), ["N"])


class _RecipeLoader(_Loader):
    """For what a user writes."""

    max_nodes = MAX_NODES


def to_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_node(value: Any) -> yaml.Node:
    return yaml.compose(to_yaml(value), Loader=_Loader)


def _compose(text: str, where: Callable[[int], str]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        problem, line = error.problem, error.problem_mark.line  # type: ignore[union-attr]
    except yaml.reader.ReaderError as error:
        problem, line = f"character U+{error.character:04X}", text.count("\n", 0, error.position)
    remedy = "write plain YAML without tags and aliases, odd text in quotes, references as ${key}"
    raise ConfigError(f"not readable: {problem}", where=where(line + 1), remedy=remedy)


def compose_file(recipe: Path) -> yaml.MappingNode:
    try:
        with recipe.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            remedy = "name a recipe, and give long lists in files of their own"
            raise ConfigError(f"the file is longer than {MAX_BYTES} bytes", where=f"{recipe}", remedy=remedy)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{error.strerror}", where=f"{recipe}", remedy="name a recipe that can be read") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", where=f"{recipe}:{line}", remedy="save the file as UTF-8") from error
    root = _compose(text, lambda line: f"{recipe}:{line}")
    if not isinstance(root, yaml.MappingNode):
        problem = f"expected lines of `key: value`, found {describe_node(root)}" if root else "the file is empty"
        where = f"{recipe}:{root.start_mark.line + 1}" if root else f"{recipe}"
        raise ConfigError(problem, where=where, remedy="begin with `algorithm: NAME`")
    return root


def compose_overrides(overrides: Sequence[str]) -> list[tuple[str, yaml.Node]]:
    pairs = []
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            remedy = "write key=value without spaces around `=`, as in run.steps=100"
            raise ConfigError(f"{shorten(repr(text))} is not key=value", where=COMMAND_LINE, remedy=remedy)
        key, value = match.groups()
        if len(text) > MAX_BYTES or key.count(".") >= MAX_DEPTH:
            problem = f"longer than {MAX_BYTES} characters" if len(text) > MAX_BYTES else "nested too deeply"
            remedy = "write it in the recipe, in fewer levels"
            raise ConfigError(f"{shorten(key)}: {problem}", where=COMMAND_LINE, remedy=remedy)
        node = _compose(value, lambda line, text=text: f"{COMMAND_LINE}: {shorten(repr(text))}")
        if value[node.end_mark.index if node else 0 :].strip():
            remedy = f"quote the value for YAML as well: '{key}=\"...\"'"
            raise ConfigError(
                f"{shorten(repr(text))} holds a comment, which would be lost", where=COMMAND_LINE, remedy=remedy
            )
        pairs.append((key, node or yaml.ScalarNode(_NULL, "")))
    return pairs


def shorten(text: str) -> str:
    """Text as a message can hold it."""
    return text if len(text) <= 6000 else f"{text[:300]}... ({len(text)} characters)"


def describe_node(node: yaml.Node) -> str:
    """What a message says of a value."""
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag == _NULL else shorten(repr(node.value))
    return f"a list of {len(node.value)}" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _expected(hint: Any) -> tuple[str, str]:
    """The name of a type in messages, and the remedy."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        choices = ", ".join(map(str, args))
        return f"one of {choices}", f"choose one of {choices}"
    name, remedy = _KINDS[kind]
    return f"{name} of {len(args)}" if kind is tuple and ... not in args else name, remedy


def _children_of(node: yaml.Node, name: str) -> list[yaml.Node]:
    """Values of an entry of a mapping; several where it is given twice."""
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    return [child for key, child in entries if key.value == name]


def _drop_unknown(nodes: Sequence[yaml.Node], hints: Container[str]) -> None:
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, child) for key, child in node.value if key.value in hints and key.value != "kind"]


@dataclass
class SchemaReader:
    """Reads nodes as the schema wants them; keeps the place of each key, and every fault."""

    recipe: Path
    where: Callable[[yaml.Node, str], str]
    places: dict[str, str] = field(default_factory=dict)
    faults: list[ConfigError] = field(default_factory=list)
    chosen: dict[str, type | None] = field(default_factory=dict)
    """The member of each union, by dotted key; None where the section is absent."""
    members: dict[str, list[type]] = field(default_factory=dict)
    """All members of each union."""
    remedies: dict[str, str] = field(default_factory=dict)
    """What to do about a key whose default refers to a key that this recipe does not have."""
    optional: set[str] = field(default_factory=set)
    """Unions that null is a member of."""

    def choose(self, schema: type, layers: Sequence[yaml.Node], prefix: str = "") -> None:
        """Fix the member of every union by what the layers give, the later one first. A later ``kind`` replaces the
        section: keys of earlier layers that the new member lacks are dropped."""
        defaults = {item.name: item for item in dataclasses.fields(schema)}
        for name, hint in field_types(schema).items():
            nodes = [child for layer in layers for child in _children_of(layer, name)]
            if members := variants(hint):
                factory = defaults[name].default_factory
                member = None if defaults[name].default is None else factory if is_section(factory) else members[0]
                for index, node in enumerate(nodes):
                    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL and NoneType in get_args(hint):
                        member = None
                    elif isinstance(node, yaml.MappingNode):
                        kinds = [kind.value for kind in _children_of(node, "kind")]
                        tagged = (other for other in members if kinds and tag(other) == kinds[-1])
                        selected = next(tagged, member or members[0])
                        if member is not None and selected is not member:
                            _drop_unknown(nodes[:index], field_types(selected))
                        member = selected
                self.chosen[f"{prefix}{name}"], self.members[f"{prefix}{name}"] = member, members
                if NoneType in get_args(hint):
                    self.optional.add(f"{prefix}{name}")
                hint = member
            if is_section(hint):
                self.choose(hint, nodes, f"{prefix}{name}.")

    def types(self, schema: type, key: str) -> dict[str, Any]:
        """Type of each field of a section at ``key``, with the chosen member of each union."""
        prefix, hints = f"{key}." if key else "", field_types(schema)
        for name in hints:
            if f"{prefix}{name}" in self.chosen:
                hints[name] = self.chosen[f"{prefix}{name}"] or NoneType
        if len(members := self.members.get(key, [])) > 1:
            hints["kind"] = Literal[tuple(map(tag, members))]  # a message on a wrong kind lists all of them
        return hints

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
        hints, values = self.types(schema, key), {}
        if key in self.optional and isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
            return {}  # a later layer gives the section
        if not isinstance(node, yaml.MappingNode):
            problem = f"expected a section, found {describe_node(node)}"
            self.fault(key, problem, f"give it keys: {', '.join(hints)}", self.places[key])
            return {}
        for name, dotted, child in self.entries(node, key):
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                likely = [f"`{key}.{match}`" if key else f"`{match}`" for match in near]
                keys = [*self.places, *self._absent_keys()]
                likely += [f"`{place}`" for place in keys if place.endswith(f".{name}") and place != dotted]
                remedy = f"did you mean {' or '.join(likely[:3])}?" if likely else f"keys here: {', '.join(hints)}"
                remedy = self._other_kind(schema, key, name) or foreign_keys.meant(dotted, keys) or remedy
                self.fault(dotted, f"unknown key (set to {describe_node(child)})", remedy, self.places[dotted])
            elif hints[name] is NoneType and dotted in self.chosen and child.tag != _NULL:
                if not isinstance(child, yaml.MappingNode):  # else a later layer removes the section
                    self.section(child, self.members[dotted][0], dotted)
                values[name] = None
            else:
                read = self.section if is_section(hints[name]) else self.value
                values[name] = read(child, hints[name], dotted)
        return values

    def _absent_keys(self) -> list[str]:
        """Keys that sections would have which are null."""
        absent = [key for key, member in self.chosen.items() if member is None]
        return [f"{key}.{name}" for key in absent for name in field_types(self.members[key][0])]

    def _other_kind(self, schema: type, key: str, name: str) -> str:
        """The remedy for a key that belongs to another member of the union at ``key``."""
        owners = [tag(member) for member in self.members.get(key, ()) if name in field_types(member)]
        return f"{name} belongs to {key}.kind={' or '.join(owners)}; this is kind={tag(schema)}" if owners else ""

    def entries(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, str, yaml.Node]]:
        """Name, dotted key and value of each entry, its place noted. `???` takes no value away."""
        first: dict[str, str] = {}
        for name_node, child in node.value:
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else ""
            dotted = f"{key}.{name}" if key else name
            where = self.where(name_node, dotted)
            if not _KEY.fullmatch(name):
                remedy = "write letters, digits, _ and - alone; nest a section instead of writing a dot"
                self.fault(key, f"{describe_node(name_node)} is not a key", remedy, where)
            elif name in first:
                self.fault(dotted, f"given twice, first at {first[name]}", "keep one of the two", where)
            else:
                first[name] = where
                if child.value != MISSING or dotted not in self.places:
                    self.places[dotted] = where
                    yield name, dotted, child

    def value(self, node: yaml.Node, hint: Any, key: str) -> Any:
        if is_section(hint):
            return self.section(node, hint, key)
        where = self.places.get(key) or self.where(node, key)  # an element of a list has the place of the list
        if isinstance(node, yaml.ScalarNode) and not _TEXT.fullmatch(node.value):
            problem = f"{shorten(repr(node.value))} holds more than references to keys"
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
        names, remedies = zip(*map(_expected, members), strict=True)
        return self.fault(key, f"expected {' or '.join(names)}, found {describe_node(node)}", remedies[0], where)

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
    """A scalar converted to the type; ValueError if it does not fit."""
    text, is_null = node.value, node.tag == _NULL
    if hint is Any:
        hint = {"null": NoneType, "bool": bool, "int": int, "float": float}.get(node.tag.removeprefix(TAG), str)
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
