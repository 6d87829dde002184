"""Feedback on responses and edits by it: what the models of HelpSteer3 read and imitate (Wang et al. 2025, arXiv
2503.04378).

    feedback model   context, assistant: response, user: question           -> a text of feedback
    edit model       context, assistant: response, user: instruction with
                     the numbered feedback                                  -> the edited response

Feedback that calls a response perfect asks for no change and is left out, and so is, in training, what the edit did not
follow. The set that is left is shown in all its orders, so that the order says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align.config import DataConfig, EditingConfig
from align.data.chat import Message, Renderer
from align.data.rows import Context, Edit, Feedback
from align.data.tokenize import Example, require_kept, tokenize_examples
from align.types import Packed, Sequences

QUESTION = (
    "Evaluate the response to the previous prompt in terms of how helpful it is. Begin with: The response is not, "
    "slightly, partially, mostly or perfectly helpful. Then say briefly what is good about it and what is not."
)
"""What a feedback model is asked. The words up to the first "helpful it is" are the model card's."""
INSTRUCTION = (
    "Other people had this to say about your answer:\n{feedback}\nAnswer once more and follow what they said. "
    "Give the new answer only."
)
"""What an edit model is asked."""
_STEM = 5
"""Letters of a word that count, so that explain and explained are one."""
_GRAMMAR = (
    "a about all also an and any are as at be been being but by can could did do does for from had has "
    "have how i if in into is it its just more no of on or out should so some such than that the their "
    "them then there these they this to too up was were what when which while who will with would you "
    "your response helpful not slightly partially mostly perfectly"
)
_STOP = frozenset(_GRAMMAR.split())
"""Words that say nothing of what was asked for, those of HelpSteer3's first sentence among them."""


class EditingRecipe(Protocol):
    """What demonstrations need of a recipe."""

    @property
    def data(self) -> DataConfig:
        """Its limits on tokens."""
        ...

    @property
    def editing(self) -> EditingConfig:
        """The words, and which feedback is followed."""
        ...


def feedback_prompt(context: Sequence[Message], response: str, editing: EditingConfig) -> Context:
    """What a feedback model answers."""
    return (*context, Message("assistant", response), Message("user", editing.question or QUESTION))


def edit_prompt(context: Sequence[Message], response: str, feedback: Sequence[str], editing: EditingConfig) -> Context:
    """What an edit model answers: the feedback is numbered from 1."""
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(feedback, start=1))
    instruction = (editing.instruction or INSTRUCTION).replace("{feedback}", numbered)
    return (*context, Message("assistant", response), Message("user", instruction))


def change_requests(feedback: Sequence[str], editing: EditingConfig) -> list[int]:
    """Which texts ask for a change: neither empty nor perfect, and of equal ones the first."""
    first: dict[str, int] = {}
    for number, text in enumerate(feedback):
        if text.strip() and not (editing.perfect and editing.perfect.lower() in text.lower()):
            first.setdefault(text.strip(), number)
    return list(first.values())


def effective_feedback(feedback: Sequence[str], editing: EditingConfig) -> list[str]:
    """The texts that ask for a change, each once, in their order."""
    return [feedback[number].strip() for number in change_requests(feedback, editing)]


def word_overlap(feedback: str, summary: str) -> float:
    """Share of the words of ``feedback`` that ``summary`` has too, 0 to 1.

    Each word counts once, by its first five letters, without case; words of grammar and those in which HelpSteer3
    states how helpful a response is do not count. 0 for a text of such words alone.
    """
    feedback_words, summary_words = _words(feedback), _words(summary)
    return len(feedback_words & summary_words) / len(feedback_words) if feedback_words else 0.0


def _words(text: str) -> set[str]:
    return {word[:_STEM] for word in re.findall(r"\w+", text.lower()) if word not in _STOP}


def followed_feedback(row: Edit, editing: EditingConfig) -> list[str]:
    """The effective feedback that the edit of a row followed."""
    requests = effective_feedback(row.feedback, editing)
    if editing.used_by == "none":
        return requests
    return [text for text in requests if word_overlap(text, row.change_summary) >= editing.min_overlap]


def feedback_orders(texts: Sequence[str], most: int) -> Iterator[list[str]]:
    """All orders of ``texts``, or ``most`` of them, evenly spaced in the sequence of all."""
    total = math.factorial(len(texts))
    count = min(total, most)
    for number in range(count):
        left, rank, order = list(texts), number * total // count, []
        for place in range(len(texts), 0, -1):
            which, rank = divmod(rank, math.factorial(place - 1))
            order.append(left.pop(which))
        yield order


def feedback_demonstrations(
    rows: Iterable[Feedback], renderer: Renderer, config: EditingRecipe
) -> tuple[Sequences, dict[str, int]]:
    """One demonstration of each text that people wrote of a response.

    The counts say of ``rows`` (responses) how many texts were ``empty`` or ``too_long`` and how many ``kept``. Raises
    `DataError` when none is left.
    """
    counts = {"rows": 0}

    def items() -> Iterator[Example]:
        for row in rows:
            counts["rows"] += 1
            yield row.where, feedback_prompt(row.context, row.response, config.editing), row.feedback

    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return tokenize_examples(items(), renderer, *limits, counts), counts


def edit_demonstrations(
    rows: Iterable[Edit], renderer: Renderer, config: EditingRecipe
) -> tuple[Sequences, dict[str, int]]:
    """One demonstration of each order of the feedback that an edit followed.

    The counts say of ``rows`` how many texts of feedback were ``perfect`` (or the same as another) and
    ``not_followed``, how many rows were then left with ``no_feedback``, and how many demonstrations were ``empty``,
    ``too_long`` and ``kept``. Raises `DataError` when none is left.
    """
    counts = _counts()

    def items() -> Iterator[Example]:
        for row, feedback in _followed_rows(rows, config.editing, counts):
            for order in feedback_orders(feedback, config.editing.max_permutations):
                yield row.where, edit_prompt(row.context, row.original, order, config.editing), (row.edited,)

    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return tokenize_examples(items(), renderer, *limits, counts), counts


@dataclass(frozen=True)
class EditPrompts:
    """Prompts of an edit model, row by row."""

    tokens: Packed
    judged: Packed
    """The conversations themselves, to which an edit is an answer: what judges read."""
    contexts: list[Context]
    originals: list[str]
    """The responses to be edited."""
    counts: dict[str, int]


def edit_prompts(rows: Iterable[Edit], renderer: Renderer, editing: EditingConfig, max_tokens: int) -> EditPrompts:
    """A prompt of each row, its feedback in the order of the data. Counts are those of `edit_demonstrations`. Raises
    `DataError` when none is left."""
    counts = _counts() | {"too_long": 0, "kept": 0}
    ids: list[list[int]] = []
    judged: list[list[int]] = []
    kept: list[Edit] = []
    for row, feedback in _followed_rows(rows, editing, counts):
        with renderer.row(row.where, counts):
            prompt = renderer.prompt_ids(edit_prompt(row.context, row.original, feedback, editing))
            conversation = renderer.prompt_ids(row.context)
            if len(prompt) > max_tokens:
                counts["too_long"] += 1
                continue
            ids.append(prompt)
            judged.append(conversation)
            kept.append(row)
    counts["kept"] = len(kept)
    require_kept(counts, "edit prompts")
    packed = Packed.from_lists(ids), Packed.from_lists(judged)
    return EditPrompts(*packed, [row.context for row in kept], [row.original for row in kept], counts)


def _counts() -> dict[str, int]:
    return dict.fromkeys(("rows", "perfect", "not_followed", "no_feedback"), 0)


def _followed_rows(
    rows: Iterable[Edit], editing: EditingConfig, counts: dict[str, int]
) -> Iterator[tuple[Edit, list[str]]]:
    """Rows with the feedback that they followed, without those that have none."""
    for row in rows:
        requests, followed = effective_feedback(row.feedback, editing), followed_feedback(row, editing)
        counts["rows"] += 1
        counts["perfect"] += len(row.feedback) - len(requests)
        counts["not_followed"] += len(requests) - len(followed)
        counts["no_feedback"] += not followed
        if followed:
            yield row, followed


def unchanged_edits(originals: Sequence[str], edits: Sequence[str]) -> Tensor:
    """Which edits changed nothing but white space, (B,), bool."""
    return torch.tensor([a.split() == b.split() for a, b in zip(originals, edits, strict=True)], dtype=torch.bool)
