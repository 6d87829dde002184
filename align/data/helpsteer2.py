"""HelpSteer2 (Wang et al. 2024, arXiv 2406.08673) and HelpSteer2-Preference (arXiv 2410.01257): ``nvidia/HelpSteer2``.

``format: helpsteer2`` reads ``train`` and ``validation``. Two rows in succession rate two responses to one prompt:

- ``prompt``, ``response``
- ``helpfulness``, ``correctness``, ``coherence``, ``complexity``, ``verbosity``  0 to 4

They become one preference, helpfulness of the second less that of the first, cut to -3 to 3: negative where the first
is better. The other attributes are checked, and not used.

``format: helpsteer2_preference`` reads ``preference/preference``, one file for both splits:

- ``split``                 ``train``; anything else is validation
- ``prompt``, ``response_1``, ``response_2``
- ``preference_strength``   -3 to 3, negative where response 1 is better
- ``three_most_similar_preferences``  list of {strength, ...}: the opinions that the strength is the mean of
- other fields are not read, ``all_preferences_unprocessed`` among them: it holds outliers and -100 for "neither is
  valid", and the data set's card says that the paper did not use it

A prompt of several turns is one text, with a line ``<extra_id_1>Assistant`` or ``<extra_id_1>User`` between them.
There is no domain, and the language is English.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import islice
from typing import Any

from align.data.chat import Message
from align.data.rows import BadRow, Preference, at, conversation, decoded, integer, require, require_spoken, text
from align.data.sources import Rows, tables
from align.sections import Data

RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
NO_DOMAIN, LANGUAGE = "", "english"
_OPINIONS = "three_most_similar_preferences"
_RATED = ("prompt", "response", *RATINGS)
_COMPARED = ("split", "prompt", "response_1", "response_2", "preference_strength", _OPINIONS)
_MARK = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_STRAY = re.compile("<extra_id_1>(Assistant|User)")


# Two rows, each with its ratings.


def rated(data: Data) -> dict[str, Rows]:
    """Both splits, two rows of the file at a time; the last item may hold one."""
    found = tables(data, {"train": "train", "validation": "validation"})
    return {split: _in_twos(islice(rows(), data.max_rows)) for split, rows in found.items()}


def _in_twos(rows: Rows) -> Rows:
    for first in rows:
        yield first[0], [first, *islice(rows, 1)]


def parse_rated(pair: list[tuple[str, Any]]) -> Preference:
    """The preference that two rated responses amount to. Raises `BadRow`."""
    found = []
    for where, raw in pair:
        with at(where):
            found.append(_rated(raw))
            if found[-1][0] != found[0][0]:
                raise BadRow("prompt", "differs from that of the row before", found[-1][0])
    if len(found) < 2:
        raise BadRow("row", "is the last one, and has no second response")
    (prompt, response1, helpfulness1), (_, response2, helpfulness2) = found
    preference = max(-3, min(3, helpfulness2 - helpfulness1))
    row = Preference(_turns(prompt), response1, response2, preference, NO_DOMAIN, LANGUAGE)
    if preference:
        with at(pair[preference > 0][0]):
            require_spoken("response", row.chosen)
    return row


def _rated(raw: Any) -> tuple[str, str, int]:
    """Prompt, response and helpfulness."""
    row = decoded(raw)
    require(row, _RATED)
    ratings = {name: integer(name, row[name], 0, 4) for name in RATINGS}
    return text("prompt", row["prompt"]), text("response", row["response"]), ratings["helpfulness"]


# One row, with a preference.


def compared(data: Data) -> dict[str, Rows]:
    """Both splits, told apart in the one table that holds them."""
    table = tables(data, {"train": "preference/preference"}, data_dir="preference")["train"]
    return {split: islice(_only(split, table()), data.max_rows) for split in ("train", "validation")}


def _only(split: str, rows: Rows) -> Rows:
    """Rows of a split. A row without a split that can be read is bad, and counts once: in validation."""
    for where, raw in rows:
        with suppress(BadRow):
            raw = decoded(raw)
        in_train = isinstance(raw, dict) and raw.get("split") == "train"
        if in_train == (split == "train"):
            yield where, raw


def parse_compared(raw: Any) -> Preference:
    """The preference of a row, with the spread of the opinions behind it. Raises `BadRow`."""
    row = decoded(raw)
    require(row, _COMPARED)
    text("split", row["split"])
    preference = integer("preference_strength", row["preference_strength"], -3, 3)
    context = _turns(text("prompt", row["prompt"]))
    response1, response2 = [text(field, row[field]) for field in ("response_1", "response_2")]
    parsed = Preference(context, response1, response2, preference, NO_DOMAIN, LANGUAGE, _spread(row[_OPINIONS]))
    if preference:
        require_spoken("response_1" if preference < 0 else "response_2", parsed.chosen)
    return parsed


def _spread(opinions: object) -> int:
    if not isinstance(opinions, list) or not opinions:
        raise BadRow(_OPINIONS, "is not a list of opinions", opinions)
    strengths = []
    for opinion in opinions:
        if not isinstance(opinion, dict) or "strength" not in opinion:
            raise BadRow(_OPINIONS, "has an opinion without strength", opinion)
        strengths.append(integer(_OPINIONS, opinion["strength"], -100, 3))
    return max(strengths) - min(strengths)


# Both.


def _turns(prompt: str) -> tuple[Message, ...]:
    """The conversation in a text with marks between its turns; the first turn is the user's."""
    parts = ["User", *_MARK.split(prompt)]
    messages = [Message(role.lower(), content) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    for message in messages:
        if stray := _STRAY.search(message.content):
            raise BadRow("prompt", "has a mark of a turn that is not a line of its own", stray[0])
    return conversation("prompt", messages)
