"""How feedback and edits are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EditingConfig:
    """What a feedback model and an edit model read after a response, and which feedback is followed (HelpSteer3, arXiv
    2503.04378)."""

    question: str = ""
    """The user's turn after the response that a feedback model answers; empty takes `align.data.editing.QUESTION`, the
    model card's first half with our words for what is not published there."""
    instruction: str = ""
    """The user's turn after the response that an edit model answers; ``{feedback}`` stands for the numbered texts.
    Empty takes `align.data.editing.INSTRUCTION`, our words: the paper's are not published."""
    perfect: str = "perfectly helpful"
    """Feedback with these words is left out: it asks for no change (the paper). Empty leaves out none."""
    used_by: Literal["overlap", "none"] = "overlap"
    """In training, which feedback counts as followed by the edit: that whose words the summary of changes shares, or
    all. The paper asked Llama-3.3-70B-Instruct; ``overlap`` is ours, see `align.data.editing.share`."""
    min_overlap: float = 0.2
    """Least share of the words, with ``overlap``. Ours, not measured on HelpSteer3."""
    max_permutations: int = 6
    """Most orders of one set of feedback that become demonstrations. 6: all orders of three, as in the paper."""

    def __post_init__(self) -> None:
        if self.instruction and self.instruction.count("{feedback}") != 1:
            raise ValueError(f"instruction must hold {{feedback}} once: {self.instruction!r}")
        if not 0 <= self.min_overlap <= 1 or self.max_permutations < 1:
            raise ValueError(
                "min_overlap lies in [0, 1] and max_permutations must be positive: "
                f"{self.min_overlap}, {self.max_permutations}"
            )
