"""One item of a benchmark: a conversation, and responses to it of which the first are the right ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from align.data.chat import Dialogue, Message
from align.data.rows import BadRow, require_fields


@dataclass(frozen=True)
class Item:
    """What measures need, and the text, which an item that comes from a file of scores does not have."""

    id: str
    prompt: str
    """Items of one prompt are not independent: resamples take all of them or none."""
    num_right: int
    """The first responses, which should score above the others."""
    num_responses: int
    tags: Mapping[str, str]
    """By what the item is sorted: ``domain``, ``subset``, ``language``."""
    strength: int = 0
    """How much better the right response is, 1 to 3; 0 where nobody said."""
    lengths: tuple[int, ...] = ()
    """Characters of each response; empty where they are not known."""
    context: tuple[Message, ...] = ()
    responses: tuple[str, ...] = ()

    @property
    def dialogues(self) -> list[Dialogue]:
        """What a judge is asked."""
        return [Dialogue(self.context, response) for response in self.responses]

    def record(self) -> dict[str, Any]:
        """The item without its text."""
        return {name: value for name, value in asdict(self).items() if name not in ("context", "responses")}


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


_FIELDS = {
    "id": str,
    "prompt": str,
    "num_right": int,
    "num_responses": int,
    "tags": dict,
    "strength": int,
    "lengths": list,
}


def from_record(record: Mapping[str, Any]) -> Item:
    """The item of an `Item.record`. Raises `BadRow`."""
    require_fields(record, _FIELDS)
    for name, kind in _FIELDS.items():
        if type(record[name]) is not kind:
            raise BadRow(name, f"is not {kind.__name__}", record[name])
    fields: dict[str, Any] = {name: record[name] for name in _FIELDS}
    fields["lengths"] = tuple(fields["lengths"])
    return Item(**fields)


def from_text(
    id: str, context: Sequence[Message], responses: Sequence[str], num_right: int, tags: Mapping[str, str], **more: Any
) -> Item:
    """An item whose text is known."""
    fields: dict[str, Any] = {"prompt": digest(list(context)), "lengths": tuple(map(len, responses)), **more}
    text = {"context": tuple(context), "responses": tuple(responses)}
    return Item(id=id, num_right=num_right, num_responses=len(responses), tags=dict(tags), **text, **fields)


@dataclass(frozen=True)
class Benchmark:
    """All items of a benchmark."""

    name: str
    items: list[Item]
    source: str
    """Where they were read."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers should know of them."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the content and order of the items."""
        whole = hashlib.sha256()
        for item in self.items:
            whole.update(json.dumps([item.record(), item.context, item.responses], sort_keys=True).encode() + b"\n")
        return whole.hexdigest()
