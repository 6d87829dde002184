"""HelpSteer3-Preference (Wang et al. 2025, arXiv 2505.11475; ``nvidia/HelpSteer3``, config ``preference``).

A row, one JSON object per line:

- ``domain``              general, stem, code or multilingual
- ``language``            natural or programming language
- ``context``             list of {role, content} ending with the user's turn, or a string: that turn alone
- ``response1``, ``response2``
- ``overall_preference``  -3 to 3, negative where response 1 is better, 0 for a tie
- other fields (``individual_preference``) are not read

A folder is read line by line here and not by ``datasets``: its JSON reader settles on one type per column, so a wrong
type or a missing field in one row is cast in silence or fails without a line number. A hub id goes through
``datasets.load_dataset``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets.exceptions import DatasetsError

from align.data.chat import Message, Renderer
from align.errors import DataError
from align.sections import Data
from align.types import Packed, Pairs, Sequences

CONFIG = "preference"
SPLITS = ("train", "validation")
_FIELDS = ("context", "response1", "response2", "overall_preference", "domain", "language")


@dataclass(frozen=True)
class Preference:
    """Two responses to one conversation and which of them people preferred."""

    context: tuple[Message, ...]
    response1: str
    response2: str
    preference: int
    """-3 to 3: negative where response 1 is better, 0 for a tie."""
    domain: str
    language: str

    @property
    def key(self) -> tuple[tuple[Message, ...], str, str]:
        """What makes two rows duplicates."""
        return self.context, self.response1, self.response2

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
class SplitCounts:
    """What became of the rows of one split: ``read`` is the sum of all the others."""

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
    sources = _sources(data)
    rows, counts = {}, {}
    for split in reversed(SPLITS):  # validation first: train gives way to it
        rows[split], counts[split] = _read(sources[split], data, rows.get("validation", {}))
        if not rows[split]:
            remedy = "check data.domains and data.max_rows, and that the file is not empty"
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


_Rows = dict[tuple[tuple[Message, ...], str, str], Preference]


def _read(source: Iterable[tuple[str, Any]], data: Data, elsewhere: _Rows) -> tuple[_Rows, SplitCounts]:
    rows: _Rows = {}
    bad: Counter[str] = Counter()
    read = other_domain = duplicates = overlap = 0
    for where, raw in islice(source, data.max_rows):
        read += 1
        try:
            row = _parse(raw)
        except _BadRow as error:
            if data.bad_rows == "stop":
                remedy = "mend the row, or leave such rows out and have them counted: data.bad_rows=skip"
                raise DataError(str(error), where=where, remedy=remedy) from None
            bad[error.reason] += 1
            continue
        if data.domains and row.domain not in data.domains:
            other_domain += 1
        elif row.key in rows:
            duplicates += 1
        elif row.key in elsewhere:
            overlap += 1
        else:
            rows[row.key] = row
    return rows, SplitCounts(read, dict(bad), other_domain, duplicates, overlap, len(rows))


# Where rows come from: pairs of a place to name in errors and a line of a file (bytes) or a row of the hub (a dict).


def _sources(data: Data) -> dict[str, Iterator[tuple[str, Any]]]:
    folder = Path(data.path).expanduser()
    if folder.is_dir():
        return {split: _lines(_file(folder, split)) for split in SPLITS}
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data.path):
        raise DataError("there is no such folder", where=data.path, remedy="set data.path to a folder or a hub id")
    try:
        table = datasets.load_dataset(data.path, CONFIG, revision=data.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"neither a folder here nor a data set that the hub gives: {next(iter(str(error).splitlines()), '')}",
            where=data.path,
            remedy="check data.path, data.revision and the network, or download it and give the folder",
        ) from error
    if missing := set(SPLITS) - set(table):
        raise DataError(f"split {min(missing)} is missing, found {sorted(table)}", where=data.path)
    return {split: _hub_rows(f"{data.path}/{CONFIG}/{split}", table[split]) for split in SPLITS}


def _hub_rows(name: str, table: datasets.Dataset) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(table, start=1):
        yield f"{name}:{number}", row


def _file(folder: Path, split: str) -> Path:
    candidates = [folder / CONFIG / f"{split}.{suffix}" for suffix in ("jsonl.gz", "jsonl")]
    for file in candidates:
        if file.is_file():
            return file
    looked_for = " and ".join(map(str, candidates))
    remedy = "data.path is the folder that holds preference/train.jsonl.gz and preference/validation.jsonl.gz"
    raise DataError(f"no file of split {split}; looked for {looked_for}", where=str(folder), remedy=remedy)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{file}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        # No one can say how many rows are lost, so this stops under bad_rows=skip as well.
        message, remedy = f"the file is damaged after this line: {error}", "copy or download the file again"
        raise DataError(message, where=f"{file}:{number}", remedy=remedy) from error


# One row.


class _BadRow(Exception):
    """A row that breaks the schema: which field, what is wrong, and the value."""

    def __init__(self, field: str, problem: str, value: object = None):
        self.reason = f"{field} {problem}"
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        super().__init__(self.reason if value is None else f"{self.reason}: {shown}")


def _parse(raw: Any) -> Preference:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise _BadRow("row", "is not UTF-8", raw) from None
        except (ValueError, RecursionError):
            raise _BadRow("row", "is not JSON", raw.decode("utf-8")) from None
    if not isinstance(raw, dict):
        raise _BadRow("row", "is not a JSON object", raw)
    for field in _FIELDS:
        if field not in raw:
            raise _BadRow(field, "is missing")
    preference = raw["overall_preference"]
    if type(preference) is not int:  # bool is an int to isinstance
        raise _BadRow("overall_preference", "is not an integer", preference)
    if not -3 <= preference <= 3:
        raise _BadRow("overall_preference", "is outside -3 to 3", preference)
    texts = {field: _text(field, raw[field]) for field in ("response1", "response2", "domain", "language")}
    row = Preference(context=_context(raw["context"]), preference=preference, **texts)
    if preference and not row.chosen.strip():
        raise _BadRow("response1" if preference < 0 else "response2", "is preferred but empty", row.chosen)
    return row


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _BadRow(field, f"is {type(value).__name__}, not text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(field, "holds half a surrogate pair", value) from None
    return value


def _context(value: object) -> tuple[Message, ...]:
    """Messages: an optional system turn, then user and assistant in turn, the last one a user with something to say."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise _BadRow("context", "is neither text nor a list of turns", value)
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise _BadRow("context", "has a turn without role and content", turn)
        messages.append(Message(_text("context", turn["role"]), _text("context", turn["content"])))
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise _BadRow("context", "roles do not alternate from user to user", roles)
    if not messages[-1].content.strip():
        raise _BadRow("context", "ends with an empty user turn", messages[-1].content)
    return tuple(messages)


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
