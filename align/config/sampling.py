"""Schema of sampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters. Filters apply in the order temperature, top-k, top-p, min-p (as in transformers)."""

    num_samples: int = 1
    """K, responses per prompt."""
    max_tokens: int = 1024
    """T, longest response in tokens; a response that reaches it without an end token is truncated."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_tokens < 1:
            raise ValueError(f"num_samples and max_tokens must be positive: {self.num_samples}, {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative: {self.temperature}, {self.top_k}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p lies in (0, 1] and min_p in [0, 1]: {self.top_p}, {self.min_p}")
