"""From verdicts on pairs of responses to one score for each, and what is added to scores within a group.

A group is the responses to one prompt. After NeMo-Gym's ``genrm_compare``; what differs is said where it does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from align.config import GenerativeConfig
from align.data.genrm_prompts import Scores, thought
from align.ops.genrm import MIDDLE

_CODE = re.compile(r"```.*?```", re.DOTALL)
_STYLE = (
    re.compile(r"^#{1,6}[ \t]", re.MULTILINE),
    re.compile(r"^[ \t]*(?:[-*+]|\d+\.)[ \t]", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    re.compile("[\U0001f300-\U0001faff\U0001f1e6-\U0001f1ff\u2600-\u27bf]"),
)
"""Headings, list items, bold text, emoji. NeMo-Gym's range of emoji also holds all Chinese characters; this one does
not."""


def pairs(num_responses: int, which: Literal["circular", "all"], both_orders: bool) -> list[tuple[int, int]]:
    """Which responses of a group are compared, first and second.

    ``circular`` is each with the next and the last with the first. Of two responses that is one pair in either order:
    both, or with ``both_orders``, where each pair is asked about both ways, once.
    """
    if which == "all" or num_responses < 2 or (num_responses == 2 and both_orders):
        return list(combinations(range(num_responses), 2))
    return [(i, (i + 1) % num_responses) for i in range(num_responses)]


def from_verdicts(
    num_responses: int, compared: Sequence[tuple[int, int]], verdicts: Sequence[Scores], tie_break: bool
) -> list[float]:
    """Score of each response of a group: the mean over its comparisons.

    With ``tie_break`` the scores of a pair are (s + a, s - a), a = 3.5 - ranking, where both are s.
    """
    found: list[list[float]] = [[] for _ in range(num_responses)]
    for (i, j), (first, second, ranking) in zip(compared, verdicts, strict=True):
        assert second is not None
        assert ranking is not None
        lead = MIDDLE - ranking if tie_break and first == second else 0.0
        found[i].append(first + lead)
        found[j].append(second - lead)
    return [sum(scores) / len(scores) for scores in found]


def adjusted(scores: Sequence[float], responses: Sequence[str], section: GenerativeConfig) -> list[float]:
    """The scores of a group with the bonuses and the weights of ``section``; those of a single response as they are.

    Lengths are in characters, without blanks at either end. Reasoning and answer are those of `thought`.
    """
    if len(scores) < 2:
        return list(scores)
    texts = [thought(response) for response in responses]
    reasoning, answer = ([len(text[part]) for text in texts] for part in (0, 1))
    density = [style_density(text) for _, text in texts]
    # The best are those of the judge: one bonus does not open the way to the other.
    least = sorted(scores, reverse=True)[max(0, int(len(scores) * section.top) - 1)]
    found = list(scores)
    for lengths, bonus in ((reasoning, section.reasoning_bonus), (answer, section.answer_bonus)):
        shortest = min((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__, default=None)
        if shortest is not None and scores[shortest] >= least:
            found[shortest] += bonus
    weighted = [
        (section.reasoning_length_coef, centred(reasoning)),
        (section.answer_length_coef, centred(answer)),
        (section.style_coef, centred(density)),
    ]
    return [score + sum(coef * weights[i] for coef, weights in weighted) for i, score in enumerate(found)]


def centred(sizes: Sequence[float]) -> list[float]:
    """w_i - mean of w, w_i = 1 - (size_i - min) / (max - min): positive for the smaller; 0 where all are equal."""
    least, span = min(sizes), max(sizes) - min(sizes)
    if span == 0:
        return [0.0] * len(sizes)
    weights = [1 - (size - least) / span for size in sizes]
    mean = sum(weights) / len(weights)
    return [weight - mean for weight in weights]


def style_density(text: str) -> float:
    """Headings, list items, bold passages and emoji for each character of a text without its blocks of code."""
    plain = _CODE.sub("", text).strip()
    return sum(len(pattern.findall(plain)) for pattern in _STYLE) / len(plain) if plain else 0.0
