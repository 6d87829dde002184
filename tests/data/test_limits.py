"""Limits in tokens: a text of exactly the limit stays, of one token more it is dropped and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from align.data import tokenize, toy
from align.data.chat import Message, Renderer
from align.data.rows import Preference, Rating

CONTEXT, LONG, SHORT = (Message("user", "cat dog"),), "owl hen pig", "sun"
"""The prompt <s> <user> cat dog <assistant> has 5 tokens, a response one more than words: 4 and 2."""
PAIR = Preference(CONTEXT, LONG, SHORT, -2, "general", "english")
RATED = Rating(CONTEXT, LONG, {"helpfulness": 1}, "general", "english")
READERS: dict[str, Callable[[Any, Renderer, int, int], Mapping[str, int]]] = {
    "pairs": lambda copies, renderer, *limits: tokenize.tokenize_pairs([PAIR, *copies], renderer, *limits)[1],
    "demonstrations": lambda copies, renderer, *limits: tokenize.tokenize_demonstrations(
        [PAIR, *copies], renderer, "preferred", *limits
    )[1],
    "ratings": lambda copies, renderer, *limits: tokenize.tokenize_ratings(
        [RATED, *(Rating(row.context, row.response1, {"helpfulness": 1}, "general", "english") for row in copies)],
        renderer,
        ["helpfulness"],
        *limits,
    )[1],
}
FITS = Preference((Message("user", "cat"),), SHORT, "", -2, "general", "english")
"""Within all limits below, so that something is always left."""


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("prompt", "response", "kept"), [(5, 4, 2), (4, 4, 1), (5, 3, 1)])
def test_the_limit_itself_is_allowed(name: str, prompt: int, response: int, kept: int):
    counts = READERS[name]([FITS], Renderer(toy.tokenizer()), prompt, response)
    assert (counts["kept"], counts["too_long"]) == (kept, 2 - kept)


@pytest.mark.parametrize(("limit", "kept"), [(5, 2), (4, 1)])
def test_a_prompt_of_exactly_the_limit_is_sampled_from(limit: int, kept: int):
    assert tokenize.tokenize_prompts([PAIR, FITS], Renderer(toy.tokenizer()), limit).counts["kept"] == kept
