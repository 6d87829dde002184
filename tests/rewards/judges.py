"""Functions that stand in for judges that write: imported by file, so they need nothing beside them."""

from __future__ import annotations

import hashlib

WORD = "cat"


def _seen(messages: list[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in messages if turn["role"].startswith("response_")]


def _written(scores: list[int]) -> str:
    text = f"[The Begin of Individual Scores]\n\\boxed{{{', '.join(map(str, scores))}}}\n[The End of Individual Scores]"
    if len(scores) == 1:
        return text
    ranking = 4 if scores[1] > scores[0] else 3
    return f"{text}\n[The Begin of Ranking Score]\n\\boxed{{{ranking}}}\n[The End of Ranking Score]"


def length(messages: list[dict[str, str]], sample: int) -> str:
    """A response of n words, 1 to 5, has the score n."""
    return _written([len(text.split()) for text in _seen(messages)])


def partial(messages: list[dict[str, str]], sample: int) -> str:
    """As `length` at most 4, and one more for the first response: a judge that favours a place."""
    first, *rest = [len(text.split()) for text in _seen(messages)]
    return _written([first + 1, *rest])


def words(messages: list[dict[str, str]], sample: int) -> str:
    """One point and one more for each time that `WORD` is said, at most 4; every fourth verdict is broken."""
    draw = hashlib.sha256(repr((messages, sample)).encode()).digest()[0]
    found = _written([1 + min(4, text.split().count(WORD)) for text in _seen(messages)])
    return found[:-5] if draw % 4 == 0 else found


def unreadable(messages: list[dict[str, str]], sample: int) -> str:
    """No verdict."""
    return "Both have their merits."


def late(messages: list[dict[str, str]], sample: int) -> str:
    """The verdict of `length` comes with the third attempt (votes 2: samples 4 and 5)."""
    return length(messages, sample) if sample >= 4 else "Wait."


def fulfils(messages: list[dict[str, str]], sample: int) -> str:
    """Whether the response says `WORD`, to a question that names the principle; every other attempt is prose."""
    assert "names an animal" in messages[-1]["content"]
    said = WORD in messages[-2]["content"].split()
    return f"<think>Yes? No?</think>**{'Yes' if said else 'No'}.**" if sample else "Hard to say: Yes and No."
