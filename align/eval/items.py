"""Benchmark items: a conversation and its responses, the right responses first."""

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
    """Fields that metrics need, and the text. Items from a file of scores have no text."""

    id: str
    prompt: str
    """Items with the same prompt are not independent, so the bootstrap resamples them together."""
    num_right: int
    """Number of right responses. They come first and should score above the others."""
    num_responses: int
    tags: Mapping[str, str]
    """Categories of the item, by ``domain``, ``subset``, ``language``."""
    strength: int = 0
    """How much better the right response is, 1 to 3; 0 if unknown."""
    lengths: tuple[int, ...] = ()
    """Characters of each response; empty if unknown."""
    context: tuple[Message, ...] = ()
    responses: tuple[str, ...] = ()

    @property
    def dialogues(self) -> list[Dialogue]:
        """The conversations to score, one for each response."""
        return [Dialogue(self.context, response) for response in self.responses]

    def record(self) -> dict[str, Any]:
        """The item without its text."""
        return {name: value for name, value in asdict(self).items() if name not in ("context", "responses")}


def digest(value: Any) -> str:
    """16 hexadecimal digits of a hash of a JSON value."""
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
    """Rebuild an item from an `Item.record`. Raises `BadRow`."""
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
    """Build an item from its text."""
    fields: dict[str, Any] = {"prompt": digest(list(context)), "lengths": tuple(map(len, responses)), **more}
    text = {"context": tuple(context), "responses": tuple(responses)}
    return Item(id=id, num_right=num_right, num_responses=len(responses), tags=dict(tags), **text, **fields)


@dataclass(frozen=True)
class Benchmark:
    """All items of a benchmark."""

    name: str
    items: list[Item]
    source: str
    """Path or hub id of the items."""
    notes: list[str] = field(default_factory=list)
    """Caveats that the report prints beside the metrics."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the content and order of the items."""
        whole = hashlib.sha256()
        for item in self.items:
            whole.update(json.dumps([item.record(), item.context, item.responses], sort_keys=True).encode() + b"\n")
        return whole.hexdigest()
