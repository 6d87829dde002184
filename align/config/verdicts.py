"""How a judge that writes verdicts is asked and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VerdictConfig:
    """What a judge in training is asked, and the form of its answer."""

    form: Literal["helpsteer3", "json"] = "helpsteer3"
    """``helpsteer3``: boxed scores between fixed lines, as Llama-3_3-Nemotron-Super-49B-GenRM writes them (arXiv
    2505.11475). ``json``: an object with ``score_1``, ``score_2`` and ``ranking``, as in NeMo-Gym."""
    custom_roles: bool = False
    """Show the responses as turns of the roles ``response_1`` and ``response_2``, which the chat template must know, as
    that of the model above does. False asks in words of our own, in one turn of the user."""
    principle: str = ""
    """What the judge goes by: a turn of the role ``principle``, or a passage of our question. Empty for none."""
