"""Scores of a group of responses: pairs and their verdicts, principles, bonuses within the group.

A group is the responses to one prompt. After NeMo-Gym's ``genrm_compare``; differences are noted where they occur.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from align.config import GenerativeConfig
from align.data.chat import Dialogue, Message
from align.data.genrm_prompts import Verdict, split_reasoning
from align.generators.base import Completion
from align.ops.genrm import MIDDLE
from align.rewards import texts

NO_OPINION = 0.0
"""Score by principle of a response whose verdict is unreadable."""

_YES_NO = re.compile(r"[\s*_\"']*(Yes|No)[\s*_\"'.!]*")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_STYLE = (
    re.compile(r"^#{1,6}[ \t]", re.MULTILINE),
    re.compile(r"^[ \t]*(?:[-*+]|\d+\.)[ \t]", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    re.compile("[\U0001f300-\U0001faff\U0001f1e6-\U0001f1ff\u2600-\u27bf]"),
)
"""Headings, list items, bold text, emoji. NeMo-Gym's range of emoji also contains all Chinese characters; this one does
not."""


def pairs(num_responses: int, which: Literal["circular", "all"], both_orders: bool) -> list[tuple[int, int]]:
    """Pairs of a group to compare, as (first, second).

    ``circular`` pairs each response with the next and the last with the first. For two responses that is one pair in
    both orders; with ``both_orders``, where every pair is judged in both orders anyway, it is listed once.
    """
    if which == "all" or num_responses < 2 or (num_responses == 2 and both_orders):
        return list(combinations(range(num_responses), 2))
    return [(i, (i + 1) % num_responses) for i in range(num_responses)]


def from_verdicts(
    num_responses: int, compared: Sequence[tuple[int, int]], verdicts: Sequence[Verdict], tie_break: bool
) -> list[float]:
    """Score of each response of a group: the mean over its comparisons.

    With ``tie_break``, a pair with equal scores s gets (s + a, s - a), a = 3.5 - ranking.
    """
    scores: list[list[float]] = [[] for _ in range(num_responses)]
    for (i, j), (first, second, ranking) in zip(compared, verdicts, strict=True):
        assert second is not None
        assert ranking is not None
        lead = MIDDLE - ranking if tie_break and first == second else 0.0
        scores[i].append(first + lead)
        scores[j].append(second - lead)
    return [sum(values) / len(values) for values in scores]


def adjusted(scores: Sequence[float], responses: Sequence[str], config: GenerativeConfig) -> list[float]:
    """The scores of a group plus the bonuses of ``config``; a single response is unchanged.

    Lengths are in characters, without surrounding whitespace. `split_reasoning` splits reasoning and answer.
    """
    if len(scores) < 2:
        return list(scores)
    texts_of = [split_reasoning(response) for response in responses]
    reasoning, answer = ([len(text[part]) for text in texts_of] for part in (0, 1))
    density = [style_density(text) for _, text in texts_of]
    # The best are chosen by the judge's scores: one bonus does not make a response eligible for the other.
    threshold = sorted(scores, reverse=True)[max(0, int(len(scores) * config.top) - 1)]
    totals = list(scores)
    for lengths, bonus in ((reasoning, config.reasoning_bonus), (answer, config.answer_bonus)):
        shortest = min((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__, default=None)
        if shortest is not None and scores[shortest] >= threshold:
            totals[shortest] += bonus
    weighted = [
        (config.reasoning_length_coef, centered(reasoning)),
        (config.answer_length_coef, centered(answer)),
        (config.style_coef, centered(density)),
    ]
    return [total + sum(coef * weights[i] for coef, weights in weighted) for i, total in enumerate(totals)]


def centered(sizes: Sequence[float]) -> list[float]:
    """w_i - mean of w, w_i = 1 - (size_i - min) / (max - min): positive for the smaller; 0 if all are equal."""
    least, span = min(sizes), max(sizes) - min(sizes)
    if span == 0:
        return [0.0] * len(sizes)
    weights = [1 - (size - least) / span for size in sizes]
    mean = sum(weights) / len(weights)
    return [weight - mean for weight in weights]


def style_density(text: str) -> float:
    """Headings, list items, bold passages and emoji per character of a text without its code blocks."""
    plain = _CODE.sub("", text).strip()
    return sum(len(pattern.findall(plain)) for pattern in _STYLE) / len(plain) if plain else 0.0


def ask_principle(dialogue: Dialogue, principle: str) -> tuple[Message, ...]:
    """The conversation whose answer is Yes or No: the question of a ``yes_no`` model follows the response (RLBFF, arXiv
    2509.21319)."""
    question = Message("user", texts.question_of(principle))
    return (*dialogue.context, Message("assistant", dialogue.response), question)


def read_principle(completion: Completion) -> float | None:
    """log p(Yes) - log p(No) at the verdict; 1 or -1 without log-probabilities; None if the answer after the reasoning
    is not Yes or No alone."""
    match = _YES_NO.fullmatch(split_reasoning(completion.text)[1])
    if match is None:
        return None
    if completion.margin is not None and math.isfinite(completion.margin):
        return completion.margin
    return 1.0 if match[1] == "Yes" else -1.0
