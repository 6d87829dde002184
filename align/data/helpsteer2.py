"""HelpSteer (Wang et al. 2023, arXiv 2311.09528), HelpSteer2 (Wang et al. 2024, arXiv 2406.08673) and
HelpSteer2-Preference (arXiv 2410.01257): ``nvidia/HelpSteer`` and ``nvidia/HelpSteer2``.

``format: helpsteer`` and ``helpsteer2`` read ``train`` and ``validation``, a rated response in each row:

- ``prompt``, ``response``
- ``helpfulness``, ``correctness``, ``coherence``, ``complexity``, ``verbosity``  0 to 4

As preferences, adjacent rows with the same prompt become pairs. In ``helpsteer2`` every two rows form one pair. In
``helpsteer``, which has up to four responses to a prompt, every two of them form a pair, in the order of the file. The
preference is the helpfulness of the second response minus that of the first, clipped to -3..3: negative where the first
is better. The other attributes are validated but not used.

``format: helpsteer2_disagreements`` reads ``disagreements/disagreements``, one file without splits. Its rows are those
of ``helpsteer2``, but each attribute is a list with one rating per annotator; the label is their mean. One prompt
in twenty is validation, chosen by its hash (`is_held_out`).

``format: helpsteer2_preference`` reads ``preference/preference``, one file for both splits:

- ``split``                 ``train``; anything else is validation
- ``prompt``, ``response_1``, ``response_2``
- ``preference_strength``   -3 to 3, negative where response 1 is better
- ``three_most_similar_preferences``  list of {strength, ...}: the annotations whose mean is the strength
- other fields are not read, ``all_preferences_unprocessed`` among them: it holds outliers and -100 for "neither is
  valid", and the data set's card says that the paper did not use it

A prompt of several turns is one text, with a line ``<extra_id_1>Assistant`` or ``<extra_id_1>User`` between them.
There is no domain, and the language is English.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations, groupby, islice
from typing import Any

from align.config import DataConfig
from align.data.attributes import HELPSTEER_ATTRIBUTES
from align.data.chat import Message
from align.data.rows import (
    BadRow,
    Context,
    Preference,
    Rating,
    at_line,
    conversation,
    integer,
    parse_row,
    require_fields,
    require_response,
    text,
)
from align.data.sources import RawRows, open_tables

NO_DOMAIN, LANGUAGE = "", "english"
_OPINIONS = "three_most_similar_preferences"
_RATED = ("prompt", "response", *HELPSTEER_ATTRIBUTES)
_COMPARED = ("split", "prompt", "response_1", "response_2", "preference_strength", _OPINIONS)
MARK = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
STRAY = re.compile("<extra_id_1>(Assistant|User)")
_HELD_OUT_OF = 20


# A rated response.


def read_ratings(data: DataConfig) -> dict[str, RawRows]:
    """The rows of both splits."""
    split_rows = open_tables(data, {"train": "train", "validation": "validation"})
    return {split: islice(rows(), data.max_rows) for split, rows in split_rows.items()}


def parse_rating(raw: Any) -> list[Rating]:
    """A response with its ratings. Raises `BadRow`."""
    prompt, response, ratings = _parse_ratings(raw)
    floats = {name: float(value) for name, value in ratings.items()}
    return [Rating(marked_turns("prompt", prompt), response, floats, NO_DOMAIN, LANGUAGE)]


def _parse_ratings(raw: Any) -> tuple[str, str, dict[str, int]]:
    """Prompt, response and ratings."""
    row = parse_row(raw)
    require_fields(row, _RATED)
    ratings = {name: integer(name, row[name], 0, 4) for name in HELPSTEER_ATTRIBUTES}
    return text("prompt", row["prompt"]), text("response", row["response"]), ratings


# Rated responses to one prompt, in pairs.


def read_rating_pairs(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, with every two rows of the file as one item; the last item may hold one row."""
    return {split: group_in_twos(rows) for split, rows in read_ratings(data).items()}


def group_in_twos(rows: RawRows) -> RawRows:
    """Every two adjacent rows as one item; the last item may hold one row."""
    for first in rows:
        yield first[0], [first, *islice(rows, 1)]


def parse_rating_pair(pair: list[tuple[str, Any]]) -> list[Preference]:
    """The preference between two rated responses. Raises `BadRow`."""
    preferences = parse_prompt_group(pair)
    if not preferences:
        raise BadRow("row", "is the last row and has no second response")
    return preferences


def read_prompt_groups(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, with adjacent rows that share a prompt as one item; a row that cannot be read is one item."""
    return {split: _by_prompt(rows) for split, rows in read_ratings(data).items()}


def _by_prompt(rows: RawRows) -> RawRows:
    for _, group in groupby(map(_opened, rows), key=lambda row: row[1]["prompt"] if _has_prompt(row[1]) else [row[0]]):
        rows_of_prompt = list(group)
        yield rows_of_prompt[0][0], rows_of_prompt


def _opened(row: tuple[str, Any]) -> tuple[str, Any]:
    """The decoded row, or the raw row if it cannot be decoded."""
    with suppress(BadRow):
        return row[0], parse_row(row[1])
    return row


def _has_prompt(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("prompt"), str)


def parse_prompt_group(group: list[tuple[str, Any]]) -> list[Preference]:
    """A preference for every two responses to a prompt; empty for a single response. Raises `BadRow`."""
    responses = []
    for where, raw in group:
        with at_line(where):
            responses.append((where, *_parse_ratings(raw)))
            if responses[-1][1] != responses[0][1]:
                raise BadRow("prompt", "differs from the previous row", responses[-1][1])
    context = marked_turns("prompt", responses[0][1])
    pairs = []
    for (where1, _, response1, ratings1), (where2, _, response2, ratings2) in combinations(responses, 2):
        preference = max(-3, min(3, ratings2["helpfulness"] - ratings1["helpfulness"]))
        pairs.append(Preference(context, response1, response2, preference, NO_DOMAIN, LANGUAGE))
        if preference:
            with at_line(where2 if preference > 0 else where1):
                require_response("response", pairs[-1].chosen)
    return pairs


# A response with what each annotator said.


def read_disagreements(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, from the same table."""
    table = open_tables(data, {"train": "disagreements/disagreements"}, data_dir="disagreements")["train"]
    return {split: islice(_part(split, table()), data.max_rows) for split in ("train", "validation")}


def is_held_out(prompt: str) -> bool:
    """Whether rows with this prompt are validation, for files without splits: one prompt in twenty, by its hash."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8]) % _HELD_OUT_OF == 0


def _part(split: str, rows: RawRows) -> RawRows:
    """Rows of a split. A row whose prompt cannot be read is bad, and counts once: in validation."""
    for where, raw in map(_opened, rows):
        in_train = _has_prompt(raw) and not is_held_out(raw["prompt"])
        if in_train == (split == "train"):
            yield where, raw


def parse_disagreements(raw: Any) -> list[Rating]:
    """A response with the means of its ratings, and the spread of its helpfulness. Raises `BadRow`."""
    row = parse_row(raw)
    require_fields(row, _RATED)
    opinions = {name: _opinions(name, row[name]) for name in HELPSTEER_ATTRIBUTES}
    ratings = {name: sum(values) / len(values) for name, values in opinions.items()}
    spread = max(opinions["helpfulness"]) - min(opinions["helpfulness"])
    context = marked_turns("prompt", text("prompt", row["prompt"]))
    return [Rating(context, text("response", row["response"]), ratings, NO_DOMAIN, LANGUAGE, spread)]


def _opinions(name: str, values: object) -> list[int]:
    if not isinstance(values, list) or not values:
        raise BadRow(name, "is not a list of ratings", values)
    return [integer(name, value, 0, 4) for value in values]


# One row, with a preference.


def read_preferences(data: DataConfig) -> dict[str, RawRows]:
    """Both splits, selected from the same table by its ``split`` field."""
    table = open_tables(data, {"train": "preference/preference"}, data_dir="preference")["train"]
    return {split: islice(_only(split, table()), data.max_rows) for split in ("train", "validation")}


def _only(split: str, rows: RawRows) -> RawRows:
    """Rows of a split. A row without a split that can be read is bad, and counts once: in validation."""
    for where, raw in map(_opened, rows):
        in_train = isinstance(raw, dict) and raw.get("split") == "train"
        if in_train == (split == "train"):
            yield where, raw


def parse_preference(raw: Any) -> list[Preference]:
    """The preference of a row, with the spread of the annotations it is the mean of. Raises `BadRow`."""
    row = parse_row(raw)
    require_fields(row, _COMPARED)
    text("split", row["split"])
    preference = integer("preference_strength", row["preference_strength"], -3, 3)
    context = marked_turns("prompt", text("prompt", row["prompt"]))
    response1, response2 = [text(field, row[field]) for field in ("response_1", "response_2")]
    parsed = Preference(context, response1, response2, preference, NO_DOMAIN, LANGUAGE, _spread(row[_OPINIONS]))
    if preference:
        require_response("response_1" if preference < 0 else "response_2", parsed.chosen)
    return [parsed]


def _spread(opinions: object) -> int:
    if not isinstance(opinions, list) or not opinions:
        raise BadRow(_OPINIONS, "is not a list of opinions", opinions)
    strengths = []
    for opinion in opinions:
        if not isinstance(opinion, dict) or "strength" not in opinion:
            raise BadRow(_OPINIONS, "has an opinion without strength", opinion)
        strengths.append(integer(_OPINIONS, opinion["strength"], -100, 3))
    return max(strengths) - min(strengths)


# All formats.


def marked_turns(field: str, prompt: str, before: Sequence[Message] = ()) -> Context:
    """Parse a text with markers between its turns, the first of which is the user's, and append it to ``before``.

    Raises `BadRow`.
    """
    parts = ["User", *MARK.split(prompt)]
    messages = [Message(role.lower(), content) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    for message in messages:
        if stray := STRAY.search(message.content):
            raise BadRow(field, "has a turn marker that is not on a separate line", stray[0])
    return conversation(field, [*before, *messages])
