"""Conversations as OpenAI and TRL write them, one JSON object a line: ``train`` and ``validation``.

Preferences:

- ``prompt``              list of {role, content} ending with the user's turn, or a string: that turn alone
- ``chosen``, ``rejected``  a string, or a list of one {role, content} of the assistant
- ``strength``            1 to 3, 0 for a tie; 1 where it is left out

Ratings:

- ``messages``  list of {role, content} ending with the assistant's turn
- ``ratings``   object of numbers by attribute; null and -100 mean that nobody rated it; may be left out

Both may have ``domain`` and ``language``. Rows are written so too, pairs with ``margin`` beside, which is what TRL's
reward trainer calls the strength. Which of the two responses came first in the source is not kept.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from align.config import DataConfig
from align.data.chat import Message
from align.data.rows import (
    BadRow,
    Preference,
    Rating,
    conversation,
    integer,
    parse_row,
    rating,
    require_fields,
    require_response,
    text,
    turns,
)
from align.data.sources import RawRows, open_tables

SPLITS = {"train": "train", "validation": "validation"}
"""The file of each split."""


def read_splits(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, row by row."""
    return {split: islice(rows(), data.max_rows) for split, rows in open_tables(data, SPLITS).items()}


def parse_preference(raw: Any) -> list[Preference]:
    """A pair; the chosen response is the first. Raises `BadRow`."""
    row = parse_row(raw)
    require_fields(row, ("prompt", "chosen", "rejected"))
    strength = row.get("strength")
    strength = 1 if strength is None else integer("strength", strength, 0, 3)
    chosen, rejected = [response_text(field, row[field]) for field in ("chosen", "rejected")]
    if strength:
        require_response("chosen", chosen)
    context = conversation("prompt", turns("prompt", row["prompt"]))
    return [Preference(context, chosen, rejected, -strength, *domain_and_language(row))]


def parse_rating(raw: Any) -> list[Rating]:
    """A rated response. Raises `BadRow`."""
    row = parse_row(raw)
    require_fields(row, ("messages",))
    *before, last = turns("messages", row["messages"])
    if last.role != "assistant" or not before:
        raise BadRow("messages", "does not end with an answer of the assistant", last.role)
    values = row.get("ratings")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise BadRow("ratings", "is not an object of numbers", values)
    numbers = {text("ratings", name): rating(f"ratings.{name}", value) for name, value in values.items()}
    ratings = {name: value for name, value in numbers.items() if value is not None}
    return [Rating(conversation("messages", before), last.content, ratings, *domain_and_language(row))]


def response_text(field: str, value: object) -> str:
    """Text, or the content of a list of one turn of the assistant. Raises `BadRow`."""
    if not isinstance(value, list):
        return text(field, value)
    messages = turns(field, value)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise BadRow(field, "is neither text nor one turn of the assistant", [turn.role for turn in messages])
    return messages[0].content


def domain_and_language(row: dict[str, Any]) -> tuple[str, str]:
    """Domain and language, empty where there is none."""
    domain, language = [row.get(field) for field in ("domain", "language")]
    return text("domain", "" if domain is None else domain), text("language", "" if language is None else language)


def preference_to_json(row: Preference) -> list[dict[str, Any]]:
    """A pair as one object."""
    return [
        {
            "prompt": _messages(row.context),
            "chosen": _messages([Message("assistant", row.chosen)]),
            "rejected": _messages([Message("assistant", row.rejected)]),
            "strength": row.strength,
            "margin": float(row.strength),
            "domain": row.domain,
            "language": row.language,
        }
    ]


def rating_to_json(row: Rating) -> list[dict[str, Any]]:
    """A rated response as one object."""
    messages = _messages([*row.context, Message("assistant", row.response)])
    return [{"messages": messages, "ratings": dict(row.ratings), "domain": row.domain, "language": row.language}]


def _messages(messages: Any) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]
