"""Responses with labels, and conversations that ask for them, as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.data import openai
from align.data.chat import Renderer
from align.data.rows import Context, Preference, Rating
from align.data.steerlm import SteeringFormat
from align.data.tokenize import require_kept
from align.errors import DataError
from align.types import Packed, Prompts, Rollouts, Sequences


def distinct_responses(
    rows: Iterable[Preference | Rating], renderer: Renderer, max_prompt_tokens: int, max_response_tokens: int
) -> tuple[list[Rating], dict[str, int]]:
    """Every response, once per conversation; those of pairs, ties among them, have no ratings.

    The counts say how many ``responses`` there are, of which ``empty``, ``repeated`` and ``too_long`` were dropped, and
    how many were ``kept``. Raises `DataError` when none is left.
    """
    counts: dict[str, int] = {"responses": 0, "empty": 0, "repeated": 0, "too_long": 0, "kept": 0}
    responses: dict[tuple[Context, str], Rating | None] = {}
    for row in rows:
        pair = isinstance(row, Preference)
        for text in (row.response1, row.response2) if pair else (row.response,):
            counts["responses"] += 1
            if not text.strip() or (row.context, text) in responses:
                counts["repeated" if text.strip() else "empty"] += 1
                continue
            with renderer.row(row.where, counts):
                prompt, (ids,) = renderer.dialogue_ids(row.context, [text])
                fits = len(prompt) <= max_prompt_tokens and len(ids) <= max_response_tokens
                counts["kept" if fits else "too_long"] += 1
                rating = Rating(row.context, text, {}, row.domain, row.language, where=row.where) if pair else row
                responses[row.context, text] = rating if fits else None
    require_kept(counts, "responses")
    return [row for row in responses.values() if row is not None], counts


def human_ratings(rows: Sequence[Rating], names: Sequence[str]) -> tuple[list[Rating], Tensor]:
    """The rows that people rated by all of ``names``, and these ratings, (B, A). Raises `DataError` for none."""
    rated = [row for row in rows if row.ratings.keys() >= set(names)]
    unrated = {"rows": len(rows), f"not rated by all of {', '.join(names)}": len(rows) - len(rated), "kept": len(rated)}
    require_kept(unrated, "rated responses")
    return rated, torch.tensor([[row.ratings[name] for name in names] for row in rated])


def with_labels(rows: Sequence[Rating], label_BA: Tensor, names: Sequence[str]) -> list[Rating]:
    """The rows with these labels in place of their ratings."""
    every = [dict(zip(names, map(float, values), strict=True)) for values in label_BA.tolist()]
    return [replace(row, ratings=ratings) for row, ratings in zip(rows, every, strict=True)]


def integer_labels(row: Rating, names: Sequence[str]) -> tuple[int, ...]:
    """The ratings by ``names``, which are whole numbers."""
    return tuple(int(row.ratings[name]) for name in names)


def sampled_responses(
    contexts: Sequence[Context], answered: Iterable[tuple[Tensor, Rollouts]], renderer: Renderer
) -> tuple[list[Rating], dict[str, int]]:
    """Responses that ended and say something, without ratings. Each item is rollouts, and before them which of
    ``contexts`` their prompts are, (P,).

    The counts say of the ``answers`` how many were dropped as ``truncated`` or ``empty`` and how many were ``kept``.
    Raises `DataError` when none is left.
    """
    counts: dict[str, int] = dict.fromkeys(("answers", "truncated", "empty", "kept"), 0)
    responses: list[Rating] = []
    for index_P, rollouts in answered:
        texts = [renderer.text(ids) for ids in rollouts.sequences.responses.lists()]
        context_index = index_P[rollouts.sequences.prompt_B].tolist()
        counts["answers"] += len(texts)
        for i, text, ended in zip(context_index, texts, rollouts.finished_B.tolist(), strict=True):
            outcome = "truncated" if not ended else "kept" if text.strip() else "empty"
            counts[outcome] += 1
            responses += [Rating(contexts[i], text, {}, "", "")] if outcome == "kept" else []
    if not responses:
        outcomes = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(
            f"no response of the policy is left to train on: {outcomes}", remedy="raise sampling.max_tokens"
        )
    return responses, counts


def ratings_to_jsonl(rows: Iterable[Rating]) -> str:
    """The rows as `align.data.openai` reads them: a file of ``data.format: openai``."""
    rows_json = (row_json for row in rows for row_json in openai.rating_to_json(row))
    return "".join(json.dumps(row_json, ensure_ascii=False) + "\n" for row_json in rows_json)


def prompt_batches(prompts: Prompts, size: int) -> Iterator[Prompts]:
    """Batches of at most ``size`` prompts."""
    return (prompts.select(index) for index in torch.arange(len(prompts)).split(size))


def steered_demonstrations(
    rows: Iterable[Rating], renderer: Renderer, form: SteeringFormat, max_prompt_tokens: int, max_response_tokens: int
) -> tuple[Sequences, dict[str, int]]:
    """Responses to imitate, each after a prompt that asks for its own labels.

    The counts say how many were ``too_long`` and how many ``kept``. Raises `DataError` when none is left.
    """
    counts = {"too_long": 0, "kept": 0}
    prompts, responses = [], []
    for row in rows:
        messages, opening = form.steered(row.context, integer_labels(row, form.names))
        with renderer.row(row.where, counts):
            prompt, (response,) = renderer.dialogue_ids(messages, [row.response], opening)
            fits = len(prompt) <= max_prompt_tokens and len(response) <= max_response_tokens
            counts["kept" if fits else "too_long"] += 1
            if fits:
                prompts.append(prompt)
                responses.append(response)
    require_kept(counts, "labelled responses")
    return Sequences(Packed.from_lists(prompts), Packed.from_lists(responses), torch.arange(len(prompts))), counts


@dataclass(frozen=True)
class SteeredPrompts:
    """Prompts that ask for attributes, each row once."""

    steered: Packed
    """As the policy reads them."""
    plain: Packed
    """As everybody else reads them."""
    contexts: list[Context]
    label_PA: Tensor
    """What is asked for, (P, A), in the order of the form's names."""
    counts: Mapping[str, int]
    """``asked``, of which ``repeated`` and ``too_long`` were dropped, and ``kept``."""


def steered_prompts(
    requests: Iterable[tuple[str, Context, tuple[int, ...]]],
    renderer: Renderer,
    form: SteeringFormat,
    max_prompt_tokens: int,
) -> SteeredPrompts:
    """Prompts for ``requests``: the place of a row, its conversation, and the requested values; in the order of first
    occurrence. Raises `DataError` when none is left."""
    counts = {"asked": 0, "repeated": 0, "too_long": 0, "kept": 0}
    rows: dict[tuple[Context, tuple[int, ...]], tuple[list[int], list[int]] | None] = {}
    for where, context, values in requests:
        counts["asked"] += 1
        if (context, values) in rows:
            counts["repeated"] += 1
            continue
        with renderer.row(where, counts):
            steered, plain = renderer.prompt_ids(*form.steered(context, values)), renderer.prompt_ids(context)
            fits = len(steered) <= max_prompt_tokens
            counts["kept" if fits else "too_long"] += 1
            rows[context, values] = (steered, plain) if fits else None
    require_kept(counts, "prompts")
    kept = {request: ids for request, ids in rows.items() if ids is not None}
    return SteeredPrompts(
        Packed.from_lists([steered for steered, _ in kept.values()]),
        Packed.from_lists([plain for _, plain in kept.values()]),
        [context for context, _ in kept],
        torch.tensor([values for _, values in kept], dtype=torch.int64),
        counts,
    )
