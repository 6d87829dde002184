"""Schemas of SteerLM: policies that are conditioned on attribute values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from align.config.models import DType, ModelConfig, ReferenceConfig

LABEL_MAX = 4
"""Attributes are whole numbers from 0 to this."""


@dataclass(frozen=True)
class SteeringConfig:
    """Which attribute values the prompt shows the policy, and where: ``helpfulness:4,correctness:4,...``."""

    attributes: list[str] = field(
        default_factory=lambda: ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    )
    """Names, in the order of the prompt; those of HelpSteer. ``[nemo]`` stands for the nine of NeMo-Aligner."""
    values: dict[str, int] = field(default_factory=dict)
    """Requested values in bootstrapping, in held-out evaluation and in ``align generate``, 0 to 4. Attributes that are
    not named are 4, except complexity and verbosity 2 (HelpSteer2, arXiv 2406.08673) and toxicity, humor and creativity
    0 (NeMo-Aligner)."""
    place: Literal["assistant", "user", "system"] = "assistant"
    """Where the values stand: as the first words of the answer (NeMo-Aligner), at the end of the last user turn, or at
    the end of the system turn, which is added if there is none."""
    prefix: str = "<extra_id_2>"
    """Text before them. The default and the next are NeMo-Aligner's."""
    suffix: str = "\n"
    """Text after them, a line break."""

    def __post_init__(self) -> None:
        if not self.attributes or any(not name or set(",:") & set(name) for name in self.attributes):
            raise ValueError(f"attributes are names without comma and colon: {self.attributes}")
        given = ", ".join(f"values.{name}" for name in self.values)
        if any(not 0 <= value <= LABEL_MAX for value in self.values.values()):
            raise ValueError(f"{given} must lie in 0 to {LABEL_MAX}: {list(self.values.values())}")
        if self.attributes != ["nemo"] and not self.values.keys() <= set(self.attributes):
            raise ValueError(f"{given} must be of attributes: {self.attributes}")


@dataclass(frozen=True)
class PreviousPolicyConfig(ReferenceConfig):
    """The frozen policy that samples in SteerLM 2.0, Q': the policy from which this round starts."""

    path: str = "${policy.path}"
    """Follows the policy of the round, as do the next four."""
    revision: str | None = "${policy.revision}"
    """Follows the policy."""
    init: dict[str, Any] = "${policy.init}"  # type: ignore[assignment] - random weights of one seed are the same
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment] - a reference to another key, which OmegaConf follows
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""
    max_num_seqs: int = 64
    """Rows of the key-value cache on one rank; further sequences wait until a row is free."""
    gather_weights_for_generation: bool = True
    """As ``policy.gather_weights_for_generation``: False fetches weights layer by layer at ZeRO 3, for every token."""


@dataclass(frozen=True)
class PriorPolicyConfig(ModelConfig):
    """The frozen model that gives P(y|x) in SteerLM 2.0: its prompts hold no attributes, and it stays the same in
    all rounds."""
