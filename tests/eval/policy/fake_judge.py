"""Policies and judges that need no model, as functions for ``policy.function`` and ``judge.function``."""

import re


def short(messages, sample):
    return f"short {sum(turn['role'] == 'user' for turn in messages)}"


def thorough(messages, sample):
    return "<think>hm</think>a thorough answer to " + messages[-1]["content"]


def _between(text, name):
    found = re.search(rf"<{name} (\w+)>\n(.*?)\n</{name} \1>", text, re.DOTALL)
    return found[2] if found else ""


def longer(messages, sample):
    """Prefers the longer answer, strongly where it is twice as long; marks 9 for "thorough", else 4."""
    text = messages[-1]["content"]
    a, b = (_between(text, f"answer of assistant {side}") for side in "AB")
    if a or b:
        if len(a) == len(b):
            return "The same. [[A=B]]"
        if len(a) > len(b):
            return "[[A>>B]]" if len(a) >= 2 * len(b) else "[[A>B]]"
        return "[[B>>A]]" if len(b) >= 2 * len(a) else "[[B>A]]"
    answer = _between(text, "second answer of the assistant") or _between(text, "answer of the assistant")
    return f"Mark: [[{9 if 'thorough' in answer else 4}]]"


def first(messages, sample):
    """Always the answer that stands first."""
    return "[[A>B]]"


def moody(messages, sample):
    """Says nothing at first, and never anything of question 1."""
    if "question 1?" in messages[-1]["content"]:
        return "I would rather not. [[A>B]] or [[B>A]]"
    return longer(messages, sample) if sample else "no verdict"


def boxed(messages, sample):
    """A generative reward model that sees "thorough" in a response."""
    text = messages[-1]["content"]
    good = ["thorough" in _between(text, f"response {i}") for i in (1, 2)]
    if not _between(text, "response 2"):
        return f"[The Begin of Individual Scores]\n\\boxed{{{5 if good[0] else 2}}}\n[The End of Individual Scores]"
    ranking = 3 if good[0] == good[1] else 1 if good[0] else 6
    return (
        "[The Begin of Individual Scores]\n\\boxed{4, 2}\n[The End of Individual Scores]\n"
        f"[The Begin of Ranking Score]\n\\boxed{{{ranking}}}\n[The End of Ranking Score]"
    )
