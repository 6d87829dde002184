"""Judges that reason before they say whether a response satisfies a principle (RLBFF, arXiv 2509.21319)."""

from __future__ import annotations

import math
import re

from align.config import GenerativeConfig
from align.data.chat import Dialogue, Message
from align.data.genrm_prompts import thought
from align.generators.base import Completion
from align.rewards import texts

NO_OPINION = 0.0
"""Score of a response whose verdict cannot be read."""

_VERDICT = re.compile(r"[\s*_\"']*(Yes|No)[\s*_\"'.!]*")


def ask(dialogue: Dialogue, section: GenerativeConfig) -> tuple[Message, ...]:
    """The conversation that is answered by Yes or No: the question follows the response, as of a ``yes_no`` model."""
    question = Message("user", texts.question_of(section.principle))
    return (*dialogue.context, Message("assistant", dialogue.response), question)


def read(completion: Completion) -> float | None:
    """log p(Yes) - log p(No) at the verdict; 1 or -1 where the judge gives none; None for what is not Yes or No.

    The verdict is all of the answer after the reasoning.
    """
    match = _VERDICT.fullmatch(thought(completion.text)[1])
    if match is None:
        return None
    if completion.margin is not None and math.isfinite(completion.margin):
        return completion.margin
    return 1.0 if match[1] == "Yes" else -1.0
