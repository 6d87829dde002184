"""What supervised fine-tuning can demonstrate beside answers, by the name that a recipe gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from align.config import RowKind
from align.data import editing, genrm, tokenize
from align.data.chat import Renderer
from align.data.rows import Demonstration, Preference
from align.types import Sequences


class SFTTarget(NamedTuple):
    """Which rows a model learns to continue, and how."""

    reads: RowKind
    """What the data is read as."""
    make: Callable[[Sequence[Any], Renderer, Any], tuple[Sequences, dict[str, int]]]
    """Demonstrations of rows, by the recipe (`align.algorithms.sft.Config`), and what became of the rows."""


def _answers(
    rows: Sequence[Preference | Demonstration], renderer: Renderer, config: Any
) -> tuple[Sequences, dict[str, int]]:
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return tokenize.tokenize_demonstrations(rows, renderer, config.responses, *limits)


SFT_TARGETS: dict[str, SFTTarget] = {
    "answers": SFTTarget("demonstrations", _answers),
    "verdicts": SFTTarget("comparisons", genrm.verdict_demonstrations),
    "feedback": SFTTarget("feedback", editing.feedback_demonstrations),
    "edits": SFTTarget("edits", editing.edit_demonstrations),
}
"""By ``demonstrates`` of a recipe."""
