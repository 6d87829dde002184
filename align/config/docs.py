"""Generate ``docs/recipes.md`` from the schemas: types, defaults, and the docstrings of the fields.

    python -m align.config.docs [FILE]

Without ``FILE`` the page is printed. A schema is a frozen dataclass of `align.config`, or the ``Config`` of an
algorithm. Each gets one table with the fields that it declares, and links to the schemas that it extends. A key whose
type is a union of schemas links to their common base, and each variant has its own table.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING

from align import config as schemas
from align.config.schema_types import field_types
from align.utils.atomic_write import write_atomic

INTRODUCTION = """\
# Recipe keys

Which keys can a recipe have, with which type, default and meaning? `make docs` generates this page from the schemas in
`align/config/` and `align/algorithms/`: edit the docstrings there, not this page. [Recipe files](recipe_files.md) says
how a recipe is read, merged and checked.

On the command line, dots separate a section from its keys: `policy.optimizer.lr=1e-6`. A default such as
`${policy.path}` takes the value of that key. A key marked **required** has no default.
"""
COMMANDS = {
    "align eval reward": ("RewardEvaluationConfig", "evaluation.md"),
    "align eval policy": ("PolicyEvaluationConfig", "evaluation_policy.md"),
    "align scale": ("ScaleConfig", "scale.md"),
    "align serve reward": ("RewardServiceConfig", "reward_service.md"),
}
"""Other commands that read a file of keys: the schema in `align.config`, and the page of the command."""
SCALARS = {str: "text", int: "whole number", float: "number", bool: "true, false", NoneType: "null", Any: "any value"}


def list_algorithms() -> dict[str, type]:
    """The schema of each algorithm, by name."""
    package = importlib.import_module("align.algorithms")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")
    return {name: importlib.import_module(f"align.algorithms.{name}").Config for name in names}


def field_docs(schema: type) -> dict[str, str]:
    """The docstrings below the fields that a schema itself declares, by field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def own_fields(schema: type) -> list[dataclasses.Field[Any]]:
    """The fields that a schema declares or declares again."""
    own = vars(schema).get("__annotations__", {})
    return [field for field in dataclasses.fields(schema) if field.name in own]


def bases(schema: type) -> list[type]:
    """The schemas that a schema extends, but for those without a key."""
    parents = []
    for base in schema.__bases__:
        if is_dataclass(base):
            parents += [base] if own_fields(base) else bases(base)
    return parents


def sections_of(hint: Any) -> list[type]:
    """The schemas in a type, such as those of a union or of a mapping's values."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [schema for argument in get_args(hint) for schema in sections_of(argument)]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def common_base(variants: list[type]) -> type | None:
    """The nearest schema with keys that all variants of a union extend."""
    for base in variants[0].__mro__[1:]:
        if is_dataclass(base) and own_fields(base) and all(base in variant.__mro__ for variant in variants):
            return base
    return None


def list_kinds(roots: Iterable[type]) -> dict[type, list[type]]:
    """The variants of each union of schemas, by their common base."""
    kinds: dict[type, list[type]] = {}
    for schema in [*roots, *collect(roots)]:
        for hint in field_types(schema).values():
            variants = sections_of(hint)
            base = common_base(variants) if len(variants) > 1 else None
            if base:
                kinds[base] = [*kinds.get(base, []), *(item for item in variants if item not in kinds.get(base, []))]
    return kinds


def link(schema: type) -> str:
    return f"[{schema.__name__}](#{schema.__name__.lower()})"


def format_type(hint: Any) -> str:
    """A type in the words of the page."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return link(hint)
    if kind is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if kind in (Union, UnionType):
        base = common_base(sections_of(hint)) if len(sections_of(hint)) > 1 else None
        names = [link(base)] if base else []
        names += [format_type(argument) for argument in arguments if not (base and sections_of(argument))]
        return " or ".join(names)
    if kind is tuple and ... not in arguments:
        return f"list of {len(arguments)}, each a {format_type(arguments[0])}"
    if kind in (list, tuple):
        return f"list of {format_type(arguments[0])}"
    if kind is dict:
        return f"mapping to {format_type(arguments[1])}" if arguments else "mapping"
    return SCALARS[kind]


def format_value(value: Any) -> str:
    """A default as a recipe writes it."""
    if value == MISSING:
        return "**required**"
    if value is None or isinstance(value, bool):
        return "`null`" if value is None else f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return '`""`' if value == "" else f"`{value}`".replace("\n", "\\n")


def format_default(field: dataclasses.Field[Any], hint: Any) -> str:
    """The default of a key; of a section, the values that differ from the defaults of its schema."""
    value = default_of(field)
    if not is_dataclass(value) or isinstance(value, type):
        return format_value(value)
    usual = {item.name: default_of(item) for item in dataclasses.fields(value)}
    changed = [f"{name}: {format_value(v).strip('`')}" for name, v in vars(value).items() if usual.get(name, v) != v]
    name = "" if type(value) is hint else link(type(value))
    return ", ".join(([name] if name else []) + [f"`{text}`" for text in changed if "${" not in text])


def to_markdown(docstring: str) -> str:
    """A docstring of reStructuredText as Markdown, with links to the pages that it names."""
    text = docstring.replace("``", "`").replace("`docs/", "docs/").replace(".md`", ".md")
    return re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", text)


def format_row(schema: type, field: dataclasses.Field[Any], docs: dict[str, str]) -> str:
    hint = field_types(schema)[field.name]
    if field.name not in docs:
        raise TypeError(f"{schema.__module__}.{schema.__name__}.{field.name} has no docstring")
    cells = (f"`{field.name}`", format_type(hint), format_default(field, hint), to_markdown(docs[field.name]))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_schema(
    schema: type, title: str, page: str = "", keys: Sequence[str] = (), kinds: Sequence[type] = ()
) -> Iterator[str]:
    """The heading, docstring and table of a schema, with links to the ``kinds`` that extend it."""
    fields, docs, parents = own_fields(schema), field_docs(schema), bases(schema)
    yield f"### {title}\n"
    about = [] if schema.__name__ == "Config" else [to_markdown(inspect.cleandoc(schema.__doc__ or ""))]
    if page:
        about.append(f"[{page}]({page}) explains it.")
    if keys:
        about.append(f"Keys below {', '.join(f'`{key}`' for key in keys)}.")
    if kinds:
        about.append(f"Kinds: {', '.join(map(link, kinds))}.")
    if parents:
        beside = "Has these keys and" if fields else "Has"
        about.append(f"{beside} those of {' and '.join(link_parent(parent) for parent in parents)}.")
    yield "\n".join(about) + "\n"
    if fields:
        rows = [format_row(schema, field, docs) for field in fields]
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def link_parent(schema: type) -> str:
    """A link to a schema that another one extends; algorithms have headings of another form."""
    if schema.__name__ != "Config":
        return link(schema)
    name = schema.__module__.rpartition(".")[2]
    return f"[`algorithm: {name}`](#algorithm-{name})"


def collect(roots: Iterable[type]) -> list[type]:
    """Every section that schemas reach, each behind the schemas that it extends and the union that it belongs to."""
    order: list[type] = []

    def visit(schema: type, is_root: bool) -> None:
        if schema in order:
            return
        for base in bases(schema):
            visit(base, is_root=base.__name__ == "Config")
        if not is_root and schema not in order:
            order.append(schema)
        hints = field_types(schema)
        for field in own_fields(schema):
            value = default_of(field)
            variants = sections_of(hints[field.name])
            for section in [*variants, *([type(value)] if is_dataclass(value) else [])]:
                visit(section, is_root=False)

    for root in roots:
        visit(root, is_root=True)
    return order


def list_keys(roots: Iterable[type]) -> dict[type, list[str]]:
    """The dotted keys below which each section stands."""
    keys: dict[type, list[str]] = {}

    def visit(schema: type, prefix: str) -> None:
        for name, hint in field_types(schema).items():
            for section in sections_of(hint):
                key = f"{prefix}{name}.NAME" if get_origin(hint) is dict else f"{prefix}{name}"
                if key not in keys.setdefault(section, []):
                    keys[section].append(key)
                visit(section, f"{key}.")

    for schema in roots:
        visit(schema, "")
    return keys


def format_index(keys: dict[type, list[str]]) -> Iterator[str]:
    """Which sections a key of a recipe may hold."""
    sections: dict[str, list[str]] = {}
    for schema, names in keys.items():
        for name in names:
            sections.setdefault(name, []).append(link(schema))
    yield "## Sections by key\n"
    rows = [f"| `{key}` | {', '.join(sections[key])} |" for key in sorted(sections) if "." not in key]
    yield "\n".join(["| keys below | are those of |", "|---|---|", *rows]) + "\n"


def generate() -> str:
    """The whole page."""
    algorithms = list_algorithms()
    commands = {name: getattr(schemas, schema) for name, (schema, _) in COMMANDS.items()}
    roots = [*algorithms.values(), *commands.values()]
    keys, kinds = list_keys(roots), list_kinds(roots)
    parts = [INTRODUCTION, *format_index(keys)]
    parts.append("## Algorithms\n")
    for name, schema in algorithms.items():
        parts += format_schema(schema, f"`algorithm: {name}`", page=f"algorithms/{name}.md")
    parts.append("## Files of other commands\n")
    for name, schema in commands.items():
        parts += format_schema(schema, f"`{name}`", page=COMMANDS[name][1])
    parts.append("## Sections\n")
    for schema in collect(roots):
        parts += format_schema(schema, schema.__name__, keys=keys.get(schema, []), kinds=kinds.get(schema, []))
    return "\n".join(parts).rstrip("\n") + "\n"


def main(arguments: list[str]) -> None:
    """Write the page into the file that is named, or print it."""
    text = generate()
    if arguments:
        write_atomic(Path(arguments[0]), text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
