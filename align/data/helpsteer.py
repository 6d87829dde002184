"""Preference data: HelpSteer3-Preference here, HelpSteer2 through `helpsteer2`, and what becomes of the rows of all.

HelpSteer3-Preference (Wang et al. 2025, arXiv 2505.11475; ``nvidia/HelpSteer3``, config ``preference``), a row:

- ``domain``              general, stem, code or multilingual
- ``language``            natural or programming language
- ``context``             list of {role, content} ending with the user's turn, or a string: that turn alone
- ``response1``, ``response2``
- ``overall_preference``  -3 to 3, negative where response 1 is better, 0 for a tie
- other fields (``individual_preference``) are not read
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch

from align.data import helpsteer2
from align.data.chat import Message, Renderer
from align.data.rows import BadRow, Preference, conversation, decoded, integer, require, require_spoken, text
from align.data.sources import Rows, tables
from align.errors import DataError
from align.sections import Data
from align.types import Packed, Pairs, Sequences

CONFIG = "preference"
SPLITS = ("train", "validation")
_FIELDS = ("context", "response1", "response2", "overall_preference", "domain", "language")


@dataclass(frozen=True)
class SplitCounts:
    """What became of the rows of one split: ``read`` is the sum of all the others.

    With ``format: helpsteer2`` a row is two lines of the file, or a last one alone.
    """

    read: int
    bad: Mapping[str, int]
    """Rows that break the schema, by reason (``data.bad_rows=skip``)."""
    other_domain: int
    """Rows outside ``data.domains``."""
    duplicates: int
    """Rows whose context and responses occurred before in this split."""
    in_validation: int
    """Rows of train whose context and responses are in validation too."""
    kept: int
    """Rows left, ties among them."""
    spread: int = 0
    """Rows whose annotators lie further apart than ``data.max_spread``."""


@dataclass(frozen=True)
class PreferenceData:
    """Both splits, without duplicates and without overlap, in the order of the files."""

    train: list[Preference]
    validation: list[Preference]
    counts: Mapping[str, SplitCounts]
    """By name of the split."""
    fingerprint: str
    """sha256 over the content and order of the rows kept; equal on every machine."""


def load(data: Data) -> PreferenceData:
    """Read both splits as the section ``data`` of a recipe says.

    A duplicate is a row with the context and both responses of an earlier one. A row that is in both splits stays in
    validation. Ties are kept here, because their prompts are as good as any; `pairs` drops them.

    Raises `DataError` for a source that is missing or damaged, for a row that breaks the schema (``bad_rows: stop``)
    and for a split with no rows left.
    """
    sources, parse = _FORMATS[data.format]
    splits = sources(data)
    rows, counts = {}, {}
    for split in reversed(SPLITS):  # validation first: train gives way to it
        rows[split], counts[split] = _read(splits[split], parse, data, rows.get("validation", {}))
        if not rows[split]:
            remedy = "check data.domains, data.max_rows and data.max_spread, and that the file is not empty"
            raise DataError(f"no rows of {split} are left: {counts[split]}", where=data.path, remedy=remedy)
    train, validation = (list(rows[split].values()) for split in SPLITS)
    return PreferenceData(train, validation, counts, _fingerprint(train, validation))


def _fingerprint(*splits: list[Preference]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            content = [*row.key, row.preference, row.domain, row.language]
            digest.update(json.dumps(content).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


_Parse = Callable[[Any], Preference]
_Kept = dict[tuple[tuple[Message, ...], str, str], Preference]


def _read(source: Rows, parse: _Parse, data: Data, elsewhere: _Kept) -> tuple[_Kept, SplitCounts]:
    rows: _Kept = {}
    bad: Counter[str] = Counter()
    read = other_domain = spread = duplicates = overlap = 0
    for where, raw in source:
        read += 1
        try:
            row = parse(raw)
        except BadRow as error:
            if data.bad_rows == "stop":
                remedy = "mend the row, or leave such rows out and have them counted: data.bad_rows=skip"
                raise DataError(str(error), where=error.where or where, remedy=remedy) from None
            bad[error.reason] += 1
            continue
        if data.domains and row.domain not in data.domains:
            other_domain += 1
        elif data.max_spread is not None and row.spread > data.max_spread:
            spread += 1
        elif row.key in rows:
            duplicates += 1
        elif row.key in elsewhere:
            overlap += 1
        else:
            rows[row.key] = row
    return rows, SplitCounts(read, dict(bad), other_domain, duplicates, overlap, len(rows), spread)


# A row of HelpSteer3-Preference.


def _sources(data: Data) -> dict[str, Rows]:
    found = tables(data, {split: f"{CONFIG}/{split}" for split in SPLITS}, name=CONFIG)
    return {split: islice(rows(), data.max_rows) for split, rows in found.items()}


def _parse(raw: Any) -> Preference:
    raw = decoded(raw)
    require(raw, _FIELDS)
    preference = integer("overall_preference", raw["overall_preference"], -3, 3)
    response1, response2, domain, language = [
        text(field, raw[field]) for field in ("response1", "response2", "domain", "language")
    ]
    row = Preference(_context(raw["context"]), response1, response2, preference, domain, language)
    if preference:
        require_spoken("response1" if preference < 0 else "response2", row.chosen)
    return row


def _context(value: object) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow("context", "is neither text nor a list of turns", value)
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRow("context", "has a turn without role and content", turn)
        messages.append(Message(text("context", turn["role"]), text("context", turn["content"])))
    return conversation("context", messages)


_FORMATS: dict[str, tuple[Callable[[Data], dict[str, Rows]], _Parse]] = {
    "helpsteer3": (_sources, _parse),
    "helpsteer2": (helpsteer2.rated, helpsteer2.parse_rated),
    "helpsteer2_preference": (helpsteer2.compared, helpsteer2.parse_compared),
}
"""By ``data.format``: both splits as they come, and how one item of them becomes a row."""


# Rows as token ids.


@dataclass(frozen=True)
class PromptSet:
    """Prompts to sample from. ``messages[i]`` is the conversation of row i of ``tokens``."""

    tokens: Packed
    messages: list[tuple[Message, ...]]
    counts: Mapping[str, int]
    """``rows``, of which ``repeated`` (same context) and ``too_long`` were dropped, and ``kept``."""


def prompts(rows: Iterable[Preference], renderer: Renderer, max_tokens: int) -> PromptSet:
    """Each context once, in the order of first occurrence. Raises `DataError` when none is left."""
    counts = _counts("rows", "repeated", "too_long", "kept")
    ids: list[list[int]] = []
    messages: list[tuple[Message, ...]] = []
    seen: set[tuple[Message, ...]] = set()
    for row in rows:
        counts["rows"] += 1
        if row.context in seen:
            counts["repeated"] += 1
            continue
        seen.add(row.context)
        prompt = renderer.prompt_ids(row.context)
        if len(prompt) > max_tokens:
            counts["too_long"] += 1
            continue
        ids.append(prompt)
        messages.append(row.context)
    counts["kept"] = len(ids)
    _require_some(counts, "prompts")
    return PromptSet(Packed.from_lists(ids), messages, counts)


def pairs(
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
    _require_some(counts, "pairs")
    prompt_B = torch.arange(len(prompts)).repeat_interleave(2)
    sequences = Sequences(Packed.from_lists(prompts), Packed.from_lists(responses), prompt_B)
    return Pairs(sequences, torch.tensor(strengths, dtype=torch.float32)), counts


def demonstrations(
    rows: Iterable[Preference],
    renderer: Renderer,
    responses: Literal["preferred", "all"],
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[Sequences, dict[str, int]]:
    """Responses to imitate: the ``preferred`` one of each row, ties left out, or ``all``, two of each row.

    The counts say of ``rows`` how many were ``ties``, and of the responses how many were ``empty`` or ``too_long``
    and how many were ``kept``. Raises `DataError` when none is left.
    """
    counts = _counts("rows", "ties", "empty", "too_long", "kept")
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    prompt_B: list[int] = []
    for row in rows:
        counts["rows"] += 1
        if responses == "preferred" and row.preference == 0:
            counts["ties"] += 1
            continue
        texts = [row.chosen] if responses == "preferred" else [row.response1, row.response2]
        spoken = [text for text in texts if text.strip()]
        counts["empty"] += len(texts) - len(spoken)
        prompt, ids = renderer.dialogue_ids(row.context, spoken)
        fitting = [one for one in ids if len(prompt) <= max_prompt_tokens and len(one) <= max_response_tokens]
        counts["too_long"] += len(ids) - len(fitting)
        if fitting:
            prompt_B += [len(prompts)] * len(fitting)
            prompts.append(prompt)
            answers += fitting
    counts["kept"] = len(answers)
    _require_some(counts, "demonstrations")
    packed = Packed.from_lists(prompts), Packed.from_lists(answers)
    return Sequences(*packed, torch.tensor(prompt_B, dtype=torch.int64)), counts


def _counts(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def _require_some(counts: Mapping[str, int], what: str) -> None:
    if not counts["kept"]:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "kept")
        remedy = "raise data.max_prompt_tokens and data.max_response_tokens, or give other data"
        raise DataError(f"no {what} are left of the data: {dropped}", remedy=remedy)
