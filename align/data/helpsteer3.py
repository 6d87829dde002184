"""HelpSteer3 (Wang et al. 2025, arXiv 2505.11475 and 2503.04378; RLBFF, arXiv 2509.21319): ``nvidia/HelpSteer3``.

Every config is a folder with the files ``train`` and ``validation``. All rows have

- ``domain``    general, stem, code or multilingual
- ``language``  natural or programming language
- ``context``   list of {role, content} ending with the user's turn, or a string: that turn alone

and besides

- ``preference``    ``response1``, ``response2``, ``overall_preference``: -3 to 3, negative where response 1 is better,
  0 for a tie
- ``feedback``      ``response1``, ``response2``, ``feedback1``, ``feedback2``: lists of texts. A row becomes two.
- ``edit``          ``original_response``, ``edited_response``, ``feedback``, ``change_summary``
- ``edit_quality``  ``original_response``, ``good_edited_response``, ``bad_edited_response``, ``feedback``. A row
  becomes two pairs of strength 1, the good edit against the bad one and against the original, which is an edit that
  changes nothing: what the Edit reward model learns from (arXiv 2503.04378)
- ``principle``     ``response``, ``principle``, ``fulfilment``: Yes or No

Other fields (``individual_preference``) are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from align.data.rows import (
    BadRow,
    Context,
    Edit,
    Feedback,
    Preference,
    Principle,
    conversation,
    decoded,
    integer,
    require,
    require_spoken,
    text,
    texts,
    turns,
)
from align.data.sources import Rows, tables
from align.sections import Data

_ALL = ("context", "domain", "language")
_PREFERENCE = ("context", "response1", "response2", "overall_preference", "domain", "language")
_FEEDBACK = ("response1", "response2", "feedback1", "feedback2", *_ALL)
_EDIT = ("original_response", "edited_response", "feedback", "change_summary", *_ALL)
_EDIT_QUALITY = ("original_response", "good_edited_response", "bad_edited_response", "feedback", *_ALL)
_PRINCIPLE = ("response", "principle", "fulfilment", *_ALL)


SPLITS = {split: f"preference/{split}" for split in ("train", "validation")}
"""The file of each split of preferences."""


def of(config: str) -> Callable[[Data], dict[str, Rows]]:
    """What reads both splits of ``config``."""
    return partial(_sources, config)


def _sources(config: str, data: Data) -> dict[str, Rows]:
    found = tables(data, {split: f"{config}/{split}" for split in ("train", "validation")}, name=config)
    return {split: islice(rows(), data.max_rows) for split, rows in found.items()}


def preference(raw: Any) -> list[Preference]:
    """A row of ``preference``. Raises `BadRow`, as the others do."""
    raw = decoded(raw)
    require(raw, _PREFERENCE)
    preference = integer("overall_preference", raw["overall_preference"], -3, 3)
    response1, response2, domain, language = [
        text(field, raw[field]) for field in ("response1", "response2", "domain", "language")
    ]
    row = Preference(_context(raw), response1, response2, preference, domain, language)
    if preference:
        require_spoken("response1" if preference < 0 else "response2", row.chosen)
    return [row]


def written(row: Preference) -> list[dict[str, Any]]:
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


def feedback(raw: Any) -> list[Feedback]:
    """Both responses of a row of ``feedback``."""
    raw = decoded(raw)
    require(raw, _FEEDBACK)
    context, place = _context(raw), _place(raw)
    found = []
    for i in (1, 2):
        response, said = text(f"response{i}", raw[f"response{i}"]), texts(f"feedback{i}", raw[f"feedback{i}"])
        found.append(Feedback(context, response, said, *place))
    return found


def edit(raw: Any) -> list[Edit]:
    """A row of ``edit``."""
    raw = decoded(raw)
    require(raw, _EDIT)
    original, edited, summary = [
        text(field, raw[field]) for field in ("original_response", "edited_response", "change_summary")
    ]
    if not edited.strip():
        raise BadRow("edited_response", "is empty", edited)
    return [Edit(_context(raw), original, edited, texts("feedback", raw["feedback"]), summary, *_place(raw))]


def edit_quality(raw: Any) -> list[Preference]:
    """Two pairs of a row of ``edit_quality``: good edit and bad one, good edit and original."""
    raw = decoded(raw)
    require(raw, _EDIT_QUALITY)
    good, *others = [
        text(field, raw[field]) for field in ("good_edited_response", "bad_edited_response", "original_response")
    ]
    require_spoken("good_edited_response", good)
    texts("feedback", raw["feedback"])
    context, place = _context(raw), _place(raw)
    return [Preference(context, good, other, -1, *place) for other in others]


def principle(raw: Any) -> list[Principle]:
    """A row of ``principle``."""
    raw = decoded(raw)
    require(raw, _PRINCIPLE)
    fulfilment = raw["fulfilment"]
    if fulfilment not in ("Yes", "No"):
        raise BadRow("fulfilment", "is neither Yes nor No", fulfilment)
    response, said = text("response", raw["response"]), text("principle", raw["principle"])
    if not said.strip():
        raise BadRow("principle", "is empty", said)
    return [Principle(_context(raw), response, said, fulfilment == "Yes", *_place(raw))]


def _context(raw: dict[str, Any]) -> Context:
    return conversation("context", turns("context", raw["context"]))


def _place(raw: dict[str, Any]) -> tuple[str, str]:
    """Domain and language."""
    return text("domain", raw["domain"]), text("language", raw["language"])
