"""Turn rows into token ids: prompts, pairs, demonstrations and rated responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from align.data.chat import Message, Renderer
from align.data.rows import DataRow, Demonstration, Preference, Rating
from align.errors import DataError
from align.types import NOT_RATED, Packed, Pairs, Ratings, Sequences


@dataclass(frozen=True)
class PromptSet:
    """Prompts to sample from. ``messages[i]`` is the conversation of row i of ``tokens``."""

    tokens: Packed
    messages: list[tuple[Message, ...]]
    counts: Mapping[str, int]
    """``rows``, of which ``repeated`` (same context) and ``too_long`` were dropped, and ``kept``."""


def tokenize_prompts(rows: Iterable[DataRow], renderer: Renderer, max_tokens: int) -> PromptSet:
    """Each context once, in the order of first occurrence. Raises `DataError` when none is left."""
    counts = _counts("rows", "repeated", "too_long", "kept")
    ids: list[list[int]] = []
    messages: list[tuple[Message, ...]] = []
    contexts: set[tuple[Message, ...]] = set()
    for row in rows:
        counts["rows"] += 1
        if row.context in contexts:
            counts["repeated"] += 1
            continue
        contexts.add(row.context)
        with renderer.row(row.where, counts):
            prompt = renderer.prompt_ids(row.context)
            if len(prompt) > max_tokens:
                counts["too_long"] += 1
                continue
            ids.append(prompt)
            messages.append(row.context)
    counts["kept"] = len(ids)
    require_kept(counts, "prompts")
    return PromptSet(Packed.from_lists(ids), messages, counts)


def tokenize_pairs(
    rows: Iterable[Preference], renderer: Renderer, max_prompt_tokens: int, max_response_tokens: int
) -> tuple[Pairs, dict[str, int]]:
    """Preferred and rejected responses (rows 2i and 2i + 1) that share the prompt i.

    The counts say of ``rows`` how many were dropped as ``ties``, ``too_long`` or ``identical`` (both responses are the
    same tokens), and how many were ``kept``. Raises `DataError` when none is left.
    """
    counts = _counts("rows", "ties", "too_long", "identical", "kept")
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    strengths: list[int] = []
    for row in rows:
        counts["rows"] += 1
        if row.preference == 0:
            counts["ties"] += 1
            continue
        with renderer.row(row.where, counts):
            prompt, (chosen, rejected) = renderer.dialogue_ids(row.context, [row.chosen, row.rejected])
            if len(prompt) > max_prompt_tokens or max(len(chosen), len(rejected)) > max_response_tokens:
                counts["too_long"] += 1
            elif chosen == rejected:
                counts["identical"] += 1
            else:
                prompts.append(prompt)
                responses += [chosen, rejected]
                strengths.append(row.strength)
    counts["kept"] = len(prompts)
    require_kept(counts, "pairs")
    prompt_B = torch.arange(len(prompts)).repeat_interleave(2)
    sequences = Sequences(Packed.from_lists(prompts), Packed.from_lists(responses), prompt_B)
    return Pairs(sequences, torch.tensor(strengths, dtype=torch.float32)), counts


def tokenize_demonstrations(
    rows: Iterable[Preference | Demonstration],
    renderer: Renderer,
    responses: Literal["preferred", "all"],
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[Sequences, dict[str, int]]:
    """Responses to imitate: the ``preferred`` one of each row, ties left out, or ``all``, two of each row.

    The counts say of ``rows`` how many were ``ties``, and of the responses how many were ``empty`` or ``too_long``
    and how many were ``kept``. Raises `DataError` when none is left.
    """
    counts = _counts("rows", "ties")

    def items() -> Iterator[Example]:
        for row in rows:
            counts["rows"] += 1
            if isinstance(row, Demonstration):
                yield row.where, row.context, [row.response]
                continue
            if responses == "preferred" and row.preference == 0:
                counts["ties"] += 1
                continue
            yield row.where, row.context, [row.chosen] if responses == "preferred" else [row.response1, row.response2]

    return tokenize_examples(items(), renderer, max_prompt_tokens, max_response_tokens, counts), counts


Example = tuple[str, Sequence[Message], Sequence[str]]
"""Place of a row, a conversation, and answers to it."""


def tokenize_examples(
    items: Iterable[Example],
    renderer: Renderer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    counts: dict[str, int],
) -> Sequences:
    """Answers to imitate.

    ``counts`` gets the answers that were ``empty`` or ``too_long`` and those ``kept``. Raises `DataError` when none is
    left.
    """
    counts |= _counts("empty", "too_long", "kept")
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    prompt_B: list[int] = []
    for where, messages, texts in items:
        nonempty = [text for text in texts if text.strip()]
        counts["empty"] += len(texts) - len(nonempty)
        with renderer.row(where, counts):
            prompt, ids = renderer.dialogue_ids(messages, nonempty)
            fitting = [
                answer_ids
                for answer_ids in ids
                if len(prompt) <= max_prompt_tokens and len(answer_ids) <= max_response_tokens
            ]
            counts["too_long"] += len(ids) - len(fitting)
            if fitting:
                prompt_B += [len(prompts)] * len(fitting)
                prompts.append(prompt)
                answers += fitting
    counts["kept"] = len(answers)
    require_kept(counts, "demonstrations")
    packed = Packed.from_lists(prompts), Packed.from_lists(answers)
    return Sequences(*packed, torch.tensor(prompt_B, dtype=torch.int64))


def tokenize_ratings(
    rows: Iterable[Rating],
    renderer: Renderer,
    attributes: Sequence[str],
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[Ratings, dict[str, int]]:
    """Rated responses with a label for each of ``attributes``, `NOT_RATED` where a row has none.

    Rows in succession with one context share their prompt. The counts say of ``rows`` how many were ``unrated`` (by
    none of ``attributes``) or ``too_long`` and how many were ``kept``. Raises `DataError` when none is left.
    """
    counts = _counts("rows", "unrated", "too_long", "kept")
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    prompt_B: list[int] = []
    labels: list[list[float]] = []
    for context, group in groupby(rows, key=lambda row: row.context):
        members = list(group)
        rated = [row for row in members if not row.ratings.keys().isdisjoint(attributes)]
        counts["rows"] += len(members)
        counts["unrated"] += len(members) - len(rated)
        if not rated:
            continue
        rendered: list[tuple[Rating, list[int]]] = []
        prompt: list[int] = []
        for row in rated:
            with renderer.row(row.where, counts):
                prompt, (response,) = renderer.dialogue_ids(context, [row.response])
                rendered.append((row, response))
        fits = len(prompt) <= max_prompt_tokens
        kept = [pair for pair in rendered if fits and len(pair[1]) <= max_response_tokens]
        counts["too_long"] += len(rendered) - len(kept)
        if kept:
            prompt_B += [len(prompts)] * len(kept)
            prompts.append(prompt)
            responses += [ids for _, ids in kept]
            labels += [[row.ratings.get(name, NOT_RATED) for name in attributes] for row, _ in kept]
    counts["kept"] = len(responses)
    require_kept(counts, "rated responses")
    packed = Packed.from_lists(prompts), Packed.from_lists(responses)
    sequences = Sequences(*packed, torch.tensor(prompt_B, dtype=torch.int64))
    return Ratings(sequences, torch.tensor(labels, dtype=torch.float32)), counts


def _counts(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def require_kept(counts: Mapping[str, int], what: str) -> None:
    """Raise `DataError` where nothing was kept."""
    if not counts["kept"]:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "kept")
        remedy = "raise data.max_prompt_tokens and data.max_response_tokens, or use other data"
        if not any(counts.values()):
            remedy = (
                "use data with a validation split, or raise data.validation, the fraction of train that is held out"
            )
        raise DataError(f"no {what} are left in the data: {dropped}", remedy=remedy)
