"""Data as TRL's trainers take it: pairs, conversations, prompts with completions, and prompts alone.

==========================================  ==========================================================================
``chosen``, ``rejected``                    whole conversations (lists of {role, content}) that differ in their last
                                            turn: the prompt is implicit, as in ``trl.data_utils.extract_prompt``
``prompt``, ``chosen``, ``rejected``        text or list of {role, content}; the answers text, one turn of the
                                            assistant, or whole conversations that begin with the prompt
``messages``                                list of {role, content} that ends with the assistant's turn
``prompt``, ``completion``                  text or lists of {role, content}
``prompt``                                  text or list of {role, content}, or ``messages`` that end with the user's
==========================================  ==========================================================================

Text is a turn of its own: a prompt the user's, an answer the assistant's. ``domain`` and ``language`` may stand beside.
"""

from __future__ import annotations

from typing import Any

from align.data.chat import Message
from align.data.openai import parse_preference, place, response, sources
from align.data.rows import (
    BadRow,
    Context,
    Demonstration,
    Preference,
    Prompt,
    Row,
    conversation,
    decoded,
    require,
    require_spoken,
    text,
    turns,
)

__all__ = ["demonstration", "preference", "prompt", "sources"]


def preference(raw: Any) -> list[Preference]:
    """A pair; the chosen response is the first. Raises `BadRow`."""
    row = decoded(raw)
    require(row, ("chosen", "rejected"))
    if not _is_conversation(row["chosen"]) and not _is_conversation(row["rejected"]):
        if "prompt" not in row:
            raise BadRow("prompt", "is missing, and chosen is no list of turns that holds it", row["chosen"])
        return parse_preference(row)
    context, (chosen, rejected) = _implicit(row)
    require_spoken("chosen", chosen)
    return [Preference(context, chosen, rejected, -1, *place(row))]


def demonstration(raw: Any) -> list[Row]:
    """An answer to imitate: the pair where the row is one, for its chosen answer. Raises `BadRow`."""
    row = decoded(raw)
    if "chosen" in row:
        return list(preference(row))
    if "messages" in row:
        *before, last = turns("messages", row["messages"])
        if last.role != "assistant" or not before:
            raise BadRow("messages", "does not end with an answer of the assistant", last.role)
        return [Demonstration(conversation("messages", before), last.content, *place(row))]
    require(row, ("prompt", "completion"))
    context = conversation("prompt", turns("prompt", row["prompt"]))
    return [Demonstration(context, response("completion", row["completion"]), *place(row))]


def prompt(raw: Any) -> list[Prompt]:
    """The conversation of any row, without its answers. Raises `BadRow`."""
    row = decoded(raw)
    if _is_conversation(row.get("chosen")):
        return [Prompt(_implicit(row)[0], *place(row))]
    if "prompt" in row:
        return [Prompt(conversation("prompt", turns("prompt", row["prompt"])), *place(row))]
    require(row, ("messages",))
    said = turns("messages", row["messages"])
    return [Prompt(conversation("messages", said[:-1] if said[-1].role == "assistant" else said), *place(row))]


def _is_conversation(value: object) -> bool:
    """A list of turns that begins before the answer."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") != "assistant"
    )


def _implicit(row: dict[str, Any]) -> tuple[Context, list[str]]:
    """The turns that both conversations begin with, and the last turn of each."""
    require(row, ("chosen", "rejected"))
    both = [turns(field, row[field]) for field in ("chosen", "rejected")]
    before, other = (said[:-1] for said in both)
    if before != other:
        raise BadRow("rejected", "differs from chosen before the last turn", [turn.role for turn in both[1]])
    for field, said in zip(("chosen", "rejected"), both, strict=True):
        if said[-1].role != "assistant" or not before:
            raise BadRow(field, "does not end with an answer of the assistant", said[-1].role)
    if row.get("prompt") is not None:
        _require_agreement(row["prompt"], before)
    return conversation("chosen", before), [said[-1].content for said in both]


def _require_agreement(given: object, before: list[Message]) -> None:
    """Raise `BadRow` for a prompt that is not the one of the conversations: text as any of the user's turns."""
    known = [turn.content for turn in before if turn.role == "user"]
    agrees = text("prompt", given) in known if not isinstance(given, list) else turns("prompt", given) == before
    if not agrees:
        raise BadRow("prompt", "is not in the conversation of chosen", given)
