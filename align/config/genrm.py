"""Schema of generative reward models: judges that write a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.config.generators import AnyGeneratorConfig, ModelGeneratorConfig
from align.config.sampling import SamplingConfig

WEIGHTS = ("reasoning_bonus", "answer_bonus", "reasoning_length_coef", "answer_length_coef", "style_coef")
"""Fields of `GenerativeConfig` that change scores by length and style."""


@dataclass(frozen=True)
class JudgeSamplingConfig(SamplingConfig):
    """Sampling of verdicts, with the values of NeMo-Gym's ``genrm_compare``. ``num_samples`` stays 1; set ``votes``."""

    max_tokens: int = 16384
    """Longest verdict with its reasoning, in tokens. A truncated verdict is unreadable."""
    temperature: float = 0.6
    """Divides the logits; 0 is greedy, and then a retry gives the same text."""
    top_p: float = 0.95
    """Keep the smallest set of tokens whose probability reaches this sum."""


@dataclass(frozen=True)
class GenerativeConfig:
    """A judge that writes verdicts, and how they become one number for each response (docs/genrm.md)."""

    judge: AnyGeneratorConfig = field(default_factory=ModelGeneratorConfig)
    """The generator that writes verdicts: a model in the role's processes, an endpoint, or a function."""
    form: Literal["helpsteer3", "json", "principle"] = "helpsteer3"
    """``helpsteer3``: boxed scores and a ranking. ``json``: an object with both. ``principle``: Yes or No to the
    question whether a response satisfies ``principle``; each response is judged separately."""
    custom_roles: bool = False
    """Show the responses as turns of the roles ``response_1`` and ``response_2``, for a model that was trained on these
    (HelpSteer3's GenRMs, NeMo-Gym's). False uses our prompt, which any model can follow."""
    principle: str = ""
    """The criterion of the judge: a turn of the role ``principle``, a passage of our prompt, or the text in the
    question of form ``principle``."""
    pairs: Literal["circular", "all"] = "circular"
    """Which of N responses to one prompt are compared: each with the next and the last with the first, N pairs
    (NeMo-Gym), or all N (N - 1) / 2."""
    both_orders: bool = True
    """Judge each pair in both orders and take the mean, which cancels a position bias."""
    votes: int = 1
    """Verdicts on each pair in each order, which are averaged."""
    verdict_retries: int = 3
    """Retries for an unreadable verdict. 3: NeMo-Gym. After these it counts as no opinion."""
    sampling: JudgeSamplingConfig = field(default_factory=JudgeSamplingConfig)
    """Sampling of verdicts."""
    tie_break: bool = True
    """If a pair has equal scores, the ranking decides: 3.5 - ranking is added to the first score and subtracted
    from the second (NeMo-Gym's ``simple_tiebreaker``)."""
    reasoning_bonus: float = 0.0
    """Added to the score of the response with the shortest reasoning (the text up to ``</think>``) of its prompt, if
    it is among the best. Super-3: 0.5."""
    answer_bonus: float = 0.0
    """The same for the shortest answer. Super-3: 0.5."""
    top: float = 0.2
    """Fraction of the responses to a prompt that count as the best for both bonuses, at least one. 0.2: NeMo-Gym."""
    reasoning_length_coef: float = 0.0
    """Weight of a length score of the reasoning among the responses to a prompt, from 1 for the shortest to 0 for the
    longest, minus their mean. Super-3: 0.3."""
    answer_length_coef: float = 0.0
    """The same for the answer. Super-3: 0.35."""
    style_coef: float = 0.0
    """The same for the amount of headings, list items, bold text and emoji in the answer. Super-3: 0.05."""
    strip_thoughts: bool = True
    """Hide the policy's reasoning, the text up to ``</think>``, from the judge."""

    def __post_init__(self) -> None:
        if self.form == "principle" and not self.principle:
            raise ValueError(f"form principle needs a principle: {self.principle!r}")
        if self.form == "principle" and self.custom_roles:
            raise ValueError("form principle puts its question in a user turn: custom_roles must be false")
        if self.votes < 1 or self.verdict_retries < 0:
            raise ValueError(
                f"votes must be positive and verdict_retries not negative: {self.votes}, {self.verdict_retries}"
            )
        if self.votes > 1 and self.sampling.temperature == 0:
            raise ValueError(f"votes {self.votes} are all alike with sampling.temperature 0")
        if self.sampling.num_samples != 1:
            raise ValueError(f"sampling.num_samples stays 1, set votes: {self.sampling.num_samples}")
        if not 0 < self.top <= 1:
            raise ValueError(f"top lies in (0, 1]: {self.top}")
        weights = {name: getattr(self, name) for name in WEIGHTS}
        if min(weights.values()) < 0:
            raise ValueError(f"{', '.join(weights)} must not be negative: {', '.join(map(str, weights.values()))}")
        if self.judge.zero_stage == 3:
            raise ValueError(
                f"judge.zero_stage must be below 3, because each process retries on its own: {self.judge.zero_stage}"
            )
