"""HelpSteer3 (Wang et al. 2025, arXiv 2505.11475 and 2503.04378; RLBFF, arXiv 2509.21319): ``nvidia/HelpSteer3``.

Every config is a folder with the files ``train`` and ``validation``. All rows have

- ``domain``    general, stem, code or multilingual
- ``language``  natural or programming language
- ``context``   list of {role, content} that ends with the user's turn, or a string: a single user turn

and, by config,

- ``preference``    ``response1``, ``response2``, ``overall_preference``: -3 to 3, negative where response 1 is better,
  0 for a tie
- ``feedback``      ``response1``, ``response2``, ``feedback1``, ``feedback2``: lists of texts. A row becomes two.
- ``edit``          ``original_response``, ``edited_response``, ``feedback``, ``change_summary``
- ``edit_quality``  ``original_response``, ``good_edited_response``, ``bad_edited_response``, ``feedback``. A row
  becomes two pairs of strength 1, the good edit against the bad one and against the original, which is an edit that
  changes nothing. The Edit reward model is trained on these (arXiv 2503.04378)
- ``principle``     ``response``, ``principle``, ``fulfilment``: Yes or No

Comparisons also read each annotator's reasoning about a pair (``individual_preference``: a list of {score, reasoning})
and the helpfulness of each response, from ``feedback`` on the same context and response, where the source has that
config.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from align.config import DataConfig
from align.data.rows import (
    BadRow,
    Comparison,
    Context,
    Edit,
    Feedback,
    Preference,
    Principle,
    conversation,
    integer,
    parse_row,
    require_fields,
    require_response,
    text,
    texts,
    turns,
)
from align.data.sources import RawRows, open_tables
from align.errors import DataError

PHRASES = ("not", "slightly", "partially", "mostly", "perfectly")
"""Helpfulness as the first sentence of feedback states it; position 0 is 1, position 4 is 5."""

_PHRASE = re.compile(rf"\s*The response is ({'|'.join(PHRASES)}) helpful", re.IGNORECASE)

_ALL = ("context", "domain", "language")
_PREFERENCE = ("context", "response1", "response2", "overall_preference", "domain", "language")
_FEEDBACK = ("response1", "response2", "feedback1", "feedback2", *_ALL)
_EDIT = ("original_response", "edited_response", "feedback", "change_summary", *_ALL)
_EDIT_QUALITY = ("original_response", "good_edited_response", "bad_edited_response", "feedback", *_ALL)
_PRINCIPLE = ("response", "principle", "fulfilment", *_ALL)


SPLITS = {split: f"preference/{split}" for split in ("train", "validation")}
"""The file of each split of preferences."""


def config_reader(config: str) -> Callable[[DataConfig], dict[str, RawRows]]:
    """A function that reads both splits of ``config``."""
    return partial(_sources, config)


def _sources(config: str, data: DataConfig) -> dict[str, RawRows]:
    return {split: islice(rows(), data.max_rows) for split, rows in _tables(config, data).items()}


def _tables(config: str, data: DataConfig) -> dict[str, Callable[[], RawRows]]:
    return open_tables(data, {split: f"{config}/{split}" for split in ("train", "validation")}, name=config)


def read_comparisons(data: DataConfig) -> dict[str, RawRows]:
    """Both splits of ``preference``, each row with the helpfulness scores of all responses in ``feedback``."""
    helpfulness = _helpfulness(data)
    return {
        split: ((where, (raw, helpfulness)) for where, raw in rows)
        for split, rows in _sources("preference", data).items()
    }


def _feedback(data: DataConfig) -> dict[str, Callable[[], RawRows]]:
    """Both splits of ``feedback``; none where the source has no such config."""
    folder = Path(data.path).expanduser()
    if folder.exists() and not (folder / "feedback").is_dir():
        return {}
    try:
        return _tables("feedback", data)
    except DataError as error:
        if "BuilderConfig 'feedback' not found" in str(error.__cause__):
            return {}
        raise


def _helpfulness(data: DataConfig) -> dict[bytes, float]:
    """Helpfulness by context and response: the low median of the annotators' scores, so that every label is a score
    that an annotator gave. Reads both splits completely, regardless of ``data.max_rows``, because the feedback on a
    pair may be anywhere. For a response that occurs twice, the first occurrence counts."""
    scores: dict[bytes, float] = {}
    for rows in _feedback(data).values():
        for where, raw in rows():
            try:
                parsed = parse_feedback(raw)
            except BadRow as error:
                if data.bad_rows == "stop":
                    remedy = "fix the row, or skip such rows: data.bad_rows=skip"
                    raise DataError(str(error), where=where, remedy=remedy) from None
                continue
            for row in parsed:
                words = [match[1].lower() for text in row.feedback if (match := _PHRASE.match(text))]
                if words:
                    score = statistics.median_low([1 + PHRASES.index(word) for word in words])
                    scores.setdefault(_digest(row.context, row.response), float(score))
    return scores


def _digest(context: Context, response: str) -> bytes:
    """Used as a key instead of the texts, which would keep a second copy of all contexts in memory."""
    return hashlib.sha256(json.dumps([context, response]).encode()).digest()


def parse_preference(raw: Any) -> list[Preference]:
    """A row of ``preference``. Raises `BadRow`, like all parsers of this module."""
    raw = parse_row(raw)
    require_fields(raw, _PREFERENCE)
    preference = integer("overall_preference", raw["overall_preference"], -3, 3)
    response1, response2, domain, language = [
        text(field, raw[field]) for field in ("response1", "response2", "domain", "language")
    ]
    row = Preference(_context(raw), response1, response2, preference, domain, language)
    if preference:
        require_response("response1" if preference < 0 else "response2", row.chosen)
    return [row]


def parse_comparison(item: tuple[Any, Mapping[bytes, float]]) -> list[Comparison]:
    """A row of ``preference`` with its reasons, and the helpfulness of its responses from `read_comparisons`."""
    raw, scores = item
    raw = parse_row(raw)
    (pair,) = parse_preference(raw)
    labels = [scores.get(_digest(pair.context, response)) for response in (pair.response1, pair.response2)]
    first, second = labels
    helpfulness = None if first is None or second is None else (first, second)
    pair_fields = pair.context, pair.response1, pair.response2, pair.preference
    return [Comparison(*pair_fields, tuple(_reasons(raw)), helpfulness, pair.domain, pair.language)]


def _reasons(raw: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Score and reasoning of each annotator; none where the field is missing, as in files with pairs only."""
    field = "individual_preference"
    opinions = raw.get(field)
    if not isinstance(opinions, list | None):
        raise BadRow(field, "is not a list", opinions)
    for opinion in opinions or ():
        if not isinstance(opinion, dict) or not {"score", "reasoning"} <= opinion.keys():
            raise BadRow(field, "has an entry without score and reasoning", opinion)
        reasoning = "" if opinion["reasoning"] is None else text(field, opinion["reasoning"])
        yield integer(field, opinion["score"], -3, 3), reasoning


def preference_to_json(row: Preference) -> list[dict[str, Any]]:
    """A preference as a row of ``preference``."""
    return [
        {
            "domain": row.domain,
            "language": row.language,
            "context": [message._asdict() for message in row.context],
            "response1": row.response1,
            "response2": row.response2,
            "overall_preference": row.preference,
        }
    ]


def parse_feedback(raw: Any) -> list[Feedback]:
    """Both responses of a row of ``feedback``."""
    raw = parse_row(raw)
    require_fields(raw, _FEEDBACK)
    context, place = _context(raw), _domain_and_language(raw)
    rows = []
    for i in (1, 2):
        response, comments = text(f"response{i}", raw[f"response{i}"]), texts(f"feedback{i}", raw[f"feedback{i}"])
        rows.append(Feedback(context, response, comments, *place))
    return rows


def parse_edit(raw: Any) -> list[Edit]:
    """A row of ``edit``."""
    raw = parse_row(raw)
    require_fields(raw, _EDIT)
    original, edited, summary = [
        text(field, raw[field]) for field in ("original_response", "edited_response", "change_summary")
    ]
    if not edited.strip():
        raise BadRow("edited_response", "is empty", edited)
    return [
        Edit(_context(raw), original, edited, texts("feedback", raw["feedback"]), summary, *_domain_and_language(raw))
    ]


def parse_edit_quality(raw: Any) -> list[Preference]:
    """Two pairs from a row of ``edit_quality``: good edit and bad edit, good edit and original."""
    raw = parse_row(raw)
    require_fields(raw, _EDIT_QUALITY)
    good, *others = [
        text(field, raw[field]) for field in ("good_edited_response", "bad_edited_response", "original_response")
    ]
    require_response("good_edited_response", good)
    texts("feedback", raw["feedback"])
    context, place = _context(raw), _domain_and_language(raw)
    return [Preference(context, good, other, -1, *place) for other in others]


def parse_principle(raw: Any) -> list[Principle]:
    """A row of ``principle``."""
    raw = parse_row(raw)
    require_fields(raw, _PRINCIPLE)
    fulfilment = raw["fulfilment"]
    if fulfilment not in ("Yes", "No"):
        raise BadRow("fulfilment", "is neither Yes nor No", fulfilment)
    response, principle = text("response", raw["response"]), text("principle", raw["principle"])
    if not principle.strip():
        raise BadRow("principle", "is empty", principle)
    return [Principle(_context(raw), response, principle, fulfilment == "Yes", *_domain_and_language(raw))]


def _context(raw: dict[str, Any]) -> Context:
    return conversation("context", turns("context", raw["context"]))


def _domain_and_language(raw: dict[str, Any]) -> tuple[str, str]:
    return text("domain", raw["domain"]), text("language", raw["language"])
