"""What supervised fine-tuning can imitate: the values of ``target`` in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from align.config import RowKind
from align.data import editing, genrm, tokenize
from align.data.chat import Renderer
from align.data.rows import Demonstration, Preference
from align.types import Sequences


class SFTTarget(NamedTuple):
    """Which rows a model learns from, and how they become demonstrations."""

    reads: RowKind
    """How the data is read."""
    tokenize: Callable[[Sequence[Any], Renderer, Any], tuple[Sequences, dict[str, int]]]
    """Takes rows, renderer and recipe (`align.algorithms.sft.Config`). Returns demonstrations and counts of rows."""


def _responses(
    rows: Sequence[Preference | Demonstration], renderer: Renderer, config: Any
) -> tuple[Sequences, dict[str, int]]:
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return tokenize.tokenize_demonstrations(rows, renderer, config.responses, *limits)


SFT_TARGETS: dict[str, SFTTarget] = {
    "responses": SFTTarget("demonstrations", _responses),
    "genrm_verdicts": SFTTarget("comparisons", genrm.verdict_demonstrations),
    "feedback": SFTTarget("feedback", editing.feedback_demonstrations),
    "edits": SFTTarget("edits", editing.edit_demonstrations),
}
