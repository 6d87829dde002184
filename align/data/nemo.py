"""The files of NeMo-Aligner: ``train`` and ``val``, in either of its two formats.

Conversations, which its scripts convert to the text format:

- ``system``         text; the default `SYSTEM` counts as no system turn
- ``mask``           the value of ``from`` that marks the user; default User
- ``conversations``  list of {``from``, ``value``, ``label``}; label as ``helpfulness:3,correctness:4``, or null

Text, which its reward trainers read:

- ``text``   ``<extra_id_0>System`` ..., ``<extra_id_1>User`` ..., ``<extra_id_1>Assistant`` ..., ``<extra_id_2>``
- ``label``  nine numbers in the order of `NEMO_ATTRIBUTES`, -100 where nobody rated

Both formats accept both kinds of label. As ratings, every labelled assistant turn is a row with values 0 to 4. As
preferences, two adjacent rows are a pair: ``quality`` of both holds the strength, -3 to 3, negative where the first is
better. One value may hold a conversation of several turns, with the turn markers of HelpSteer2. A text that contains a
marker cannot be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from align.config import DataConfig
from align.data.attributes import NEMO_ATTRIBUTES
from align.data.chat import Message
from align.data.helpsteer2 import LANGUAGE, NO_DOMAIN, STRAY, group_in_twos, marked_turns
from align.data.rows import (
    BadRow,
    Context,
    Preference,
    Rating,
    at_line,
    integer,
    parse_row,
    rating,
    require_fields,
    require_response,
    text,
)
from align.data.sources import RawRows, open_tables
from align.types import NOT_RATED

SPLITS = {"train": "train", "validation": "val"}
"""The file of each split."""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system text that NeMo-Aligner writes for a conversation without a system turn."""

_SYSTEM, _USER, _ASSISTANT, _END = (
    "<extra_id_0>System\n",
    "\n<extra_id_1>User\n",
    "\n<extra_id_1>Assistant\n",
    "\n<extra_id_2>",
)

_Answer = tuple[Context, str, dict[str, float]]
"""Context, response, and its labels as in the file, without those that are -100."""


def read_splits(data: DataConfig) -> dict[str, RawRows]:
    """The rows of both splits."""
    return {split: islice(rows(), data.max_rows) for split, rows in open_tables(data, SPLITS).items()}


def read_row_pairs(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, with every two adjacent rows as one item."""
    return {split: group_in_twos(rows) for split, rows in read_splits(data).items()}


def parse_ratings(raw: Any) -> list[Rating]:
    """A row for each labelled assistant turn. Raises `BadRow`."""
    rows = []
    for context, response, labels in _answers_of(raw):
        for name, value in labels.items():
            rating(f"label {name}", value, 0, 4)
        rows.append(Rating(context, response, labels, NO_DOMAIN, LANGUAGE))
    return rows


def parse_row_pair(pair: list[tuple[str, Any]]) -> list[Preference]:
    """The preference of two rows. Raises `BadRow`."""
    responses = []
    for where, raw in pair:
        with at_line(where):
            answers = _answers_of(raw)
            if len(answers) > 1:
                raise BadRow("conversations", "has more than one label", len(answers))
            context, response, labels = answers[0]
            quality = labels.get("quality")
            strength = int(quality) if quality is not None and quality == int(quality) else quality
            responses.append((context, response, integer("label quality", strength, -3, 3)))
            if context != responses[0][0]:
                raise BadRow("prompt", "differs from the previous row", context[-1].content)
            if strength != responses[0][2]:
                raise BadRow("label quality", "differs from the previous row", strength)
    if len(responses) < 2:
        raise BadRow("row", "is the last row and has no second response")
    (context, response1, preference), (_, response2, _) = responses
    row = Preference(context, response1, response2, preference, NO_DOMAIN, LANGUAGE)
    if preference:
        with at_line(pair[preference > 0][0]):
            require_response("response", row.chosen)
    return [row]


def _answers_of(raw: Any) -> list[_Answer]:
    """Every labelled answer of a row; at least one."""
    row = parse_row(raw)
    return [_from_text(row)] if "text" in row else _from_conversation(row)


def _from_text(row: dict[str, Any]) -> _Answer:
    require_fields(row, ("label",))
    content = text("text", row["text"])
    system, user, rest = content.removeprefix(_SYSTEM).partition(_USER)
    if not content.startswith(_SYSTEM) or not user or not rest.endswith(_END):
        raise BadRow("text", "has no NeMo turn markers", content)
    prompt, assistant, response = rest.removesuffix(_END).rpartition(_ASSISTANT)
    if not assistant:
        raise BadRow("text", "has no turn of the assistant", content)
    return marked_turns("text", prompt, _system(system)), _unmarked("text", response), _labels(row["label"])


def _from_conversation(row: dict[str, Any]) -> list[_Answer]:
    require_fields(row, ("conversations",))
    turns, mask = row["conversations"], row.get("mask", "User")
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations", "is not a list of turns", turns)
    system = _system(text("system", row.get("system", SYSTEM)))
    answers: list[_Answer] = []
    before = ""
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise BadRow("conversations", "has a turn without from and value", turn)
        value, user = text("conversations", turn["value"]), turn["from"] == mask
        if not user and turn.get("label"):
            context = marked_turns("conversations", before.removeprefix(_USER), system)
            answers.append((context, _unmarked("conversations", value), _labels(turn["label"])))
        before += (_USER if user else _ASSISTANT) + value
    if not answers:
        raise BadRow("conversations", "has no answer with a label")
    return answers


def _system(system: str) -> list[Message]:
    return [] if system in ("", SYSTEM) else [Message("system", system)]


def _unmarked(field: str, response: str) -> str:
    if stray := STRAY.search(response):
        raise BadRow(field, "has a turn marker in the response", stray[0])
    return response


def _labels(value: object) -> dict[str, float]:
    """Numbers by attribute, without those that nobody rated."""
    if isinstance(value, str):
        pairs = [part.partition(":")[::2] for part in value.split(",")]
        values: dict[str, object] = {name.strip(): _number(number) for name, number in pairs}
        if len(values) < len(pairs):
            raise BadRow("label", "has two values for one attribute", value)
    elif isinstance(value, list) and len(value) == len(NEMO_ATTRIBUTES):
        values = dict(zip(NEMO_ATTRIBUTES, value, strict=True))
    else:
        raise BadRow("label", f"is neither text nor {len(NEMO_ATTRIBUTES)} numbers", value)
    numbers = {name: rating(f"label {name}", number) for name, number in values.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: str) -> object:
    try:
        return float(value)
    except ValueError:
        return value


def to_conversations(row: Preference | Rating) -> list[dict[str, Any]]:
    """A rated response as one conversation, a pair as two. Raises `BadRow` for a text with a turn marker."""
    conversations = []
    for response, labels in _answers(row):
        system, turns = _parts(row.context, response)
        if not labels or set(",:") & set("".join(labels)):
            raise BadRow("ratings", "cannot be written as a label", [*labels])
        label = ",".join(f"{name}:{int(n) if n.is_integer() else n}" for name, n in labels.items())
        messages = [{"from": turn.role.capitalize(), "value": turn.content, "label": None} for turn in turns]
        messages[-1]["label"] = label
        conversations.append({"system": system, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": messages})
    return conversations


def to_texts(row: Preference | Rating) -> list[dict[str, Any]]:
    """A rated response as one text with nine numbers, a pair as two. Raises `BadRow` for a text that contains a turn
    marker and for an attribute outside the nine."""
    rows = []
    for response, labels in _answers(row):
        if others := labels.keys() - set(NEMO_ATTRIBUTES):
            raise BadRow("ratings", "has an attribute that is not one of NeMo's nine", min(others))
        system, turns = _parts(row.context, response)
        dialogue = "".join((_ASSISTANT if turn.role == "assistant" else _USER) + turn.content for turn in turns)
        label = [labels.get(name, NOT_RATED) for name in NEMO_ATTRIBUTES]
        rows.append({"text": f"{_SYSTEM}{system}{dialogue}{_END}", "label": label})
    return rows


def _answers(row: Preference | Rating) -> list[tuple[str, dict[str, float]]]:
    if isinstance(row, Rating):
        return [(row.response, dict(row.ratings))]
    return [(response, {"quality": float(row.preference)}) for response in (row.response1, row.response2)]


def _parts(context: Context, response: str) -> tuple[str, Sequence[Message]]:
    """System text and turns."""
    for message in (*context, Message("assistant", response)):
        if stray := STRAY.search(message.content):
            raise BadRow(message.role, "contains a turn marker of NeMo's format", stray[0])
    messages = [*context, Message("assistant", response)]
    return (messages[0].content, messages[1:]) if messages[0].role == "system" else (SYSTEM, messages)
