"""The kinds of rows, independent of the format of the data, and the checks that formats share."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from align.data.chat import Message
from align.types import NOT_RATED

Context = tuple[Message, ...]
"""A conversation that ends with the user's turn."""

MAX = sys.float_info.max
"""The largest finite number."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """Base of rows: keeps the place in the source."""

    where: str = field(default="", compare=False, repr=False)
    """Its place, as file:line."""


class DataRow(SourceRow):
    """Base of all kinds of rows."""

    KEY: ClassVar[tuple[str, ...]]
    """The fields that make two rows duplicates."""

    context: Context
    domain: str
    """general, stem, code or multilingual; empty where the format has none."""
    language: str
    """Natural or programming language."""
    spread: int
    """How far its annotators lie apart; 0 where the format does not say."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows duplicates."""
        return tuple(getattr(self, name) for name in self.KEY)

    @property
    def content(self) -> list[Any]:
        """What the fingerprint is of: all but the spread and the place."""
        return [value for name, value in vars(self).items() if name not in ("spread", "where")]


@dataclass(frozen=True)
class Preference(DataRow):
    """Two responses to one conversation and which of them people preferred."""

    KEY = ("context", "response1", "response2")

    context: Context
    response1: str
    response2: str
    preference: int
    """-3 to 3: negative where response 1 is better, 0 for a tie."""
    domain: str
    language: str
    spread: int = 0
    """Highest minus lowest strength among the annotators; 0 where the format does not say."""

    @property
    def chosen(self) -> str:
        """The preferred response; means nothing for a tie."""
        return self.response1 if self.preference < 0 else self.response2

    @property
    def rejected(self) -> str:
        """The other response; means nothing for a tie."""
        return self.response2 if self.preference < 0 else self.response1

    @property
    def strength(self) -> int:
        """How much better, 1 to 3; 0 for a tie."""
        return abs(self.preference)


@dataclass(frozen=True)
class Prompt(DataRow):
    """A conversation that is to be answered."""

    KEY = ("context",)

    context: Context
    domain: str
    language: str
    spread: int = 0


@dataclass(frozen=True)
class Demonstration(DataRow):
    """A response to a conversation that is to be imitated."""

    KEY = ("context", "response")

    context: Context
    response: str
    domain: str
    language: str
    spread: int = 0


@dataclass(frozen=True)
class Comparison(DataRow):
    """Two responses to one conversation, which of them people preferred, and what each person wrote: what a judge that
    writes verdicts learns from."""

    KEY = ("context", "response1", "response2")

    context: Context
    response1: str
    response2: str
    preference: int
    """-3 to 3: negative where response 1 is better, 0 for a tie."""
    reasons: tuple[tuple[int, str], ...]
    """Score, -3 to 3, and reasoning of each annotator."""
    helpfulness: tuple[float, float] | None
    """Of each response, 1 to 5; None unless people said so of both."""
    domain: str
    language: str
    spread: int = 0


@dataclass(frozen=True)
class Rating(DataRow):
    """A response to a conversation and how people rated it."""

    KEY = ("context", "response")

    context: Context
    response: str
    ratings: Mapping[str, float]
    """By attribute; unrated attributes are left out."""
    domain: str
    language: str
    spread: int = 0
    """Highest minus lowest helpfulness among the annotators; 0 where the format does not say."""


@dataclass(frozen=True)
class Feedback(DataRow):
    """A response to a conversation and what people wrote about it."""

    KEY = ("context", "response")

    context: Context
    response: str
    feedback: tuple[str, ...]
    """One text of each annotator."""
    domain: str
    language: str
    spread: int = 0


@dataclass(frozen=True)
class Edit(DataRow):
    """A response to a conversation and what a person made of it by the feedback."""

    KEY = ("context", "original", "edited")

    context: Context
    original: str
    edited: str
    feedback: tuple[str, ...]
    change_summary: str
    domain: str
    language: str
    spread: int = 0


@dataclass(frozen=True)
class Principle(DataRow):
    """Whether a response to a conversation fulfils a principle."""

    KEY = ("context", "response", "principle")

    context: Context
    response: str
    principle: str
    fulfilled: bool
    domain: str
    language: str
    spread: int = 0


class BadRow(Exception):
    """A row that breaks the schema: which field, what is wrong, and the value."""

    where: str | None = None
    """Its line, when a row is made of several."""

    def __init__(self, field: str, problem: str, value: object = None):
        self.reason = f"{field} {problem}"
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        super().__init__(self.reason if value is None else f"{self.reason}: {shown}")


@contextmanager
def at_line(where: str) -> Iterator[None]:
    """Name the line ``where`` in a `BadRow` that the block raises."""
    try:
        yield
    except BadRow as error:
        error.where = where
        raise


def parse_row(raw: Any) -> dict[str, Any]:
    """The JSON object of a line (bytes), or a row of the hub as it is. Raises `BadRow`."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
        except UnicodeDecodeError:
            raise BadRow("row", "is not UTF-8", raw) from None
        except (ValueError, RecursionError):
            raise BadRow("row", "is not JSON", raw.decode("utf-8")) from None
    if not isinstance(raw, dict):
        raise BadRow("row", "is not a JSON object", raw)
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two values under one name ``json`` would take the last without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise BadRow("row", "has a duplicate key", name)
    return value


def require_fields(row: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raise `BadRow` for the first of ``fields`` that ``row`` lacks."""
    for name in fields:
        if name not in row:
            raise BadRow(name, "is missing")


def integer(field: str, value: object, low: int, high: int) -> int:
    """``value``, when it is a whole number from ``low`` to ``high``. Raises `BadRow`."""
    if type(value) is not int:  # bool is an int to isinstance
        raise BadRow(field, "is not an integer", value)
    if not low <= value <= high:
        raise BadRow(field, f"is outside {low} to {high}", value)
    return value


def rating(field: str, value: object, low: float = -MAX, high: float = MAX) -> float | None:
    """``value``, when it is a finite number from ``low`` to ``high``; None for null and `NOT_RATED`. Raises
    `BadRow`."""
    if value is None or value == NOT_RATED:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX:
        raise BadRow(field, "is not a number", value)
    if not low <= value <= high:
        raise BadRow(field, f"is outside {low} to {high}", value)
    return float(value)


def text(field: str, value: object) -> str:
    """``value``, when it is text that UTF-8 can hold. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(field, f"is {type(value).__name__}, not text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(field, "has an unpaired surrogate", value) from None
    return value


def texts(field: str, value: object) -> tuple[str, ...]:
    """``value``, when it is a list of at least one text. Raises `BadRow`."""
    if not isinstance(value, list) or not value:
        raise BadRow(field, "is not a list of texts", value)
    return tuple(text(field, item) for item in value)


def turns(field: str, value: object) -> list[Message]:
    """A list of {role, content}, or text: the user's only turn. Raises `BadRow`."""
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise BadRow(field, "is neither text nor a list of turns", items)
    messages = []
    for turn in items:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRow(field, "has a turn without role and content", turn)
        messages.append(Message(text(field, turn["role"]), text(field, turn["content"])))
    return messages


def conversation(field: str, messages: list[Message]) -> Context:
    """An optional system turn, then user and assistant in turn, the last one a user with something to say.

    Raises `BadRow` for any other order of roles and for an empty last turn.
    """
    roles = [message.role for message in messages]
    dialogue_roles = roles[1:] if roles[0] == "system" else roles
    if dialogue_roles != ["user", "assistant"] * (len(dialogue_roles) // 2) + ["user"]:
        raise BadRow(field, "roles do not alternate between user and assistant, or the last is not user", roles)
    if not messages[-1].content.strip():
        raise BadRow(field, "ends with an empty user turn", messages[-1].content)
    return tuple(messages)


def require_response(field: str, preferred: str) -> None:
    """Raise `BadRow` when the preferred response is empty."""
    if not preferred.strip():
        raise BadRow(field, "is the preferred response but is empty", preferred)
