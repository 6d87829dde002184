"""Schema of the prompts of feedback and edit models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EditingConfig:
    """Prompts of feedback and edit models, and which feedback counts as followed (HelpSteer3, arXiv 2503.04378)."""

    question: str = ""
    """The user turn after the response, which a feedback model answers; empty takes `align.data.editing.QUESTION`: the
    first half of the model card, and our words for what is not published there."""
    instruction: str = ""
    """The user turn after the response, which an edit model answers; ``{feedback}`` stands for the numbered texts.
    Empty takes `align.data.editing.INSTRUCTION`, our words: the paper's are not published."""
    perfect: str = "perfectly helpful"
    """Feedback with these words is dropped: it asks for no change (the paper). Empty drops none."""
    used_by: Literal["overlap", "none"] = "overlap"
    """In training, which feedback counts as followed by the edit: feedback that shares words with the summary of
    changes (``overlap``), or all (``none``). The paper used Llama-3.3-70B-Instruct; ``overlap`` is ours, see
    docs/algorithms/feedback_edit.md."""
    min_overlap: float = 0.2
    """Minimum fraction of shared words, with ``overlap``. Ours, not measured on HelpSteer3."""
    max_permutations: int = 6
    """Maximum number of orders of one set of feedback that become demonstrations. 6: all orders of three, as in the
    paper."""

    def __post_init__(self) -> None:
        if self.instruction and self.instruction.count("{feedback}") != 1:
            raise ValueError(f"instruction must hold {{feedback}} once: {self.instruction!r}")
        if not 0 <= self.min_overlap <= 1 or self.max_permutations < 1:
            raise ValueError(
                "min_overlap lies in [0, 1] and max_permutations must be positive: "
                f"{self.min_overlap}, {self.max_permutations}"
            )
