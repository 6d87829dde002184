"""Types of the fields of schemas: sections, unions of sections, and what tells their members apart."""

from __future__ import annotations

import dataclasses
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints


def field_types(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {item.name: hints[item.name] for item in dataclasses.fields(schema)}


def is_section(hint: Any) -> TypeGuard[type]:
    """The type of a field is a dataclass."""
    return isinstance(hint, type) and is_dataclass(hint)


def variants(hint: Any) -> list[type]:
    """Dataclasses of a union: ``A | B``, told apart by their key ``kind``, or ``A | None``. Empty for other types."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return [member for member in members if is_section(member)]


def sections_in(hint: Any) -> list[type]:
    """The dataclass that is the type of a field, or those of its union."""
    return [hint] if is_section(hint) else variants(hint)


def tag(schema: type) -> str:
    """The ``kind`` of a member of a union."""
    return next((str(item.default) for item in dataclasses.fields(schema) if item.name == "kind"), schema.__name__)
