"""Schema of the prompts and answers of generative reward models in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VerdictConfig:
    """Prompt and answer format of a generative reward model in training."""

    form: Literal["helpsteer3", "json"] = "helpsteer3"
    """``helpsteer3``: boxed scores between fixed lines, as Llama-3_3-Nemotron-Super-49B-GenRM writes them (arXiv
    2505.11475). ``json``: an object with ``score_1``, ``score_2`` and ``ranking``, as in NeMo-Gym."""
    custom_roles: bool = False
    """Show the responses as turns of the roles ``response_1`` and ``response_2``, which the chat template must know, as
    that of the model above does. False uses our own prompt in one user turn."""
    principle: str = ""
    """The criterion of the judge: a turn of the role ``principle``, or a passage of our prompt. Empty for none."""
