"""Data in the layouts of TRL's trainers: pairs, conversations, prompts with completions, and prompts alone.

==========================================  ==========================================================================
``chosen``, ``rejected``                    whole conversations (lists of {role, content}) that differ in their last
                                            turn: the prompt is implicit, as in ``trl.data_utils.extract_prompt``
``prompt``, ``chosen``, ``rejected``        text or list of {role, content}; the answers are text, one turn of the
                                            assistant, or whole conversations that begin with the prompt
``messages``                                list of {role, content} that ends with the assistant's turn
``prompt``, ``completion``                  text or lists of {role, content}
``prompt``                                  text or list of {role, content}, or ``messages`` that end with the user's
==========================================  ==========================================================================

Text is one turn: a prompt the user's, an answer the assistant's. Rows may also have ``domain`` and ``language``.

TRL decides what is a conversation and where an implicit prompt ends; this module checks each row before, because TRL
checks nothing. Importing ``trl.data_utils`` takes about 1.4 s (it loads ``transformers.modeling_utils``), so
`align.data.dataset` imports this module when the first row of this format is read.
"""

from __future__ import annotations

from typing import Any

from trl.data_utils import extract_prompt, is_conversational

from align.data import openai
from align.data.chat import Message
from align.data.rows import (
    BadRow,
    Context,
    DataRow,
    Demonstration,
    Preference,
    Prompt,
    conversation,
    parse_row,
    require_fields,
    require_response,
    text,
    turns,
)


def parse_preference(raw: Any) -> list[Preference]:
    """A pair; the chosen response is the first. Raises `BadRow`."""
    row = parse_row(raw)
    require_fields(row, ("chosen", "rejected"))
    if not _holds_prompt(row["chosen"]) and not _holds_prompt(row["rejected"]):
        if "prompt" not in row:
            raise BadRow("prompt", "is missing, and chosen is not a list of turns that holds it", row["chosen"])
        return openai.parse_preference(row)
    context, (chosen, rejected) = _split_pair(row)
    require_response("chosen", chosen)
    return [Preference(context, chosen, rejected, -1, *openai.domain_and_language(row))]


def parse_demonstration(raw: Any) -> list[DataRow]:
    """An answer to imitate; a row with ``chosen`` is read as a pair. Raises `BadRow`."""
    row = parse_row(raw)
    if "chosen" in row:
        return list(parse_preference(row))
    if "messages" in row:
        *before, last = turns("messages", row["messages"])
        if last.role != "assistant" or not before:
            raise BadRow("messages", "does not end with an answer of the assistant", last.role)
        return [Demonstration(conversation("messages", before), last.content, *openai.domain_and_language(row))]
    require_fields(row, ("prompt", "completion"))
    context = conversation("prompt", turns("prompt", row["prompt"]))
    response = openai.response_text("completion", row["completion"])
    return [Demonstration(context, response, *openai.domain_and_language(row))]


def parse_prompt(raw: Any) -> list[Prompt]:
    """The conversation of any row, without its answers. Raises `BadRow`."""
    row = parse_row(raw)
    if _holds_prompt(row.get("chosen")):
        context = _split_pair(row)[0]
    elif "prompt" in row:
        context = conversation("prompt", turns("prompt", row["prompt"]))
    else:
        require_fields(row, ("messages",))
        messages = turns("messages", row["messages"])
        context = conversation("messages", messages[:-1] if messages[-1].role == "assistant" else messages)
    return [Prompt(context, *openai.domain_and_language(row))]


def _holds_prompt(value: Any) -> bool:
    """Whether ``value`` is a conversation that begins before the answer."""
    return bool(value) and is_conversational({"messages": value}) and value[0]["role"] != "assistant"


def _split_pair(row: dict[str, Any]) -> tuple[Context, list[str]]:
    """The turns that both conversations share, and the last turn of each."""
    require_fields(row, ("chosen", "rejected"))
    messages = {field: turns(field, row[field]) for field in ("chosen", "rejected")}
    pair: Any = extract_prompt(messages)  # type: ignore[arg-type] - messages are named tuples
    if len(pair["chosen"]) != 1 or len(pair["rejected"]) != 1:
        roles = [turn.role for turn in messages["rejected"]]
        raise BadRow("rejected", "differs from chosen before the last turn", roles)
    answers = [pair["chosen"][0], pair["rejected"][0]]
    for field, answer in zip(messages, answers, strict=True):
        if answer.role != "assistant" or not pair["prompt"]:
            raise BadRow(field, "does not end with an answer of the assistant", answer.role)
    if row.get("prompt") is not None:
        _require_agreement(row["prompt"], pair["prompt"])
    return conversation("chosen", pair["prompt"]), [answer.content for answer in answers]


def _require_agreement(prompt: object, before: list[Message]) -> None:
    """Raise `BadRow` if the field ``prompt`` disagrees with the conversations. Text agrees with any of the user's
    turns."""
    if isinstance(prompt, list):
        agrees = turns("prompt", prompt) == before
    else:
        agrees = text("prompt", prompt) in [turn.content for turn in before if turn.role == "user"]
    if not agrees:
        raise BadRow("prompt", "is not in the conversation of chosen", prompt)
