"""Schemas of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy's loss over response tokens; equations in `align.ops.policy_losses`."""

    kind: Literal["reinforce", "clipped", "sequence_clipped", "sequence_mean_clipped"] = "reinforce"
    """``reinforce``: -A log pi, for one update per rollout batch. ``clipped``: PPO's ratio of each token.
    ``sequence_clipped``: the ratio of whole responses (TRL's RLOO). ``sequence_mean_clipped``: its geometric mean over
    tokens (GSPO, arXiv 2507.18071). Both ``sequence_*`` kinds need ``aggregation: sequence_mean_token_mean`` and one
    advantage per response, so PPO and REINFORCE refuse them."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - this. 0.2: PPO (arXiv 1707.06347)."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + this. 0.2: PPO; DAPO takes 0.28."""
    dual_clip: float | None = None
    """Bound c on the ratio where the advantage is negative, above 1 (arXiv 1912.09729); ``clipped`` only."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_mean_token_mean", "constant"] = "token_mean"
    """Denominator of the sum over tokens, over the whole optimizer step: the number of tokens; of responses; of each
    response's tokens, then of responses; or responses times ``sampling.max_tokens`` (Dr. GRPO)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, nats per token."""
    importance_cap: float = 2.0
    """Bound C on the importance weight min(pi_old / pi_rollout, C) of a token sampled by older weights
    (``max_off_policy_steps``), or by a sampler, which rounds differently. On-policy without a sampler it is 1."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"clip_low lies in (0, 1), clip_high above 0: {self.clip_low}, {self.clip_high}")
        if self.dual_clip is not None and (self.dual_clip <= 1 or self.kind != "clipped"):
            raise ValueError(f"dual_clip is above 1 and belongs to kind clipped: {self.dual_clip}, {self.kind}")
        if self.kind.startswith("sequence") and self.aggregation != "sequence_mean_token_mean":
            raise ValueError(f"kind {self.kind} needs aggregation sequence_mean_token_mean, not {self.aggregation}")
        if self.importance_cap < 1:
            raise ValueError(f"importance_cap must be at least 1: {self.importance_cap}")


@dataclass(frozen=True)
class PreferenceLossConfig:
    """The loss of preference pairs, of ``dpo`` and ``online_dpo``; equations in `align.ops.preference_losses`.

    d is the difference between preferred and rejected response of the sum over tokens of log pi - log pi_ref.
    """

    kind: Literal[
        "dpo",
        "cdpo",
        "robust",
        "ipo",
        "hinge",
        "margin",
        "scaled",
        "rpo_sq",
        "rpo_fwd_kl",
        "rpo_bwd_kl",
        "simpo",
    ] = "dpo"
    """Which function of d; ``simpo`` needs no reference (docs/algorithms/dpo.md)."""
    beta: float = 0.1
    """Weight of d. 0.1: DPO (arXiv 2305.18290) and TRL; HelpSteer2 takes 1e-3."""
    smoothing: float = 0.0
    """Probability e that a label is wrong, below 1/2; ``cdpo`` and ``robust`` only."""
    eta: float = 1.0
    """Scale of the gold reward difference; ``rpo_*`` only. NeMo-Aligner: 1."""
    gamma: float = 0.5
    """Margin of ``simpo``, subtracted from beta d. 0.5: TRL."""
    average: bool = True
    """Whether ``ipo`` computes d from token means (TRL) or, with false, from sums (its paper)."""
    sft_coef: float = 0.0
    """Weight of an added supervised term: the mean over the preferred responses' tokens of -log pi, over the whole
    optimizer step. 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive: {self.beta}")
        if not 0 <= self.smoothing < 0.5 or (self.smoothing and self.kind not in ("cdpo", "robust")):
            raise ValueError(
                f"smoothing lies in [0, 0.5) and belongs to kind cdpo or robust: {self.smoothing}, {self.kind}"
            )

    @property
    def needs_reference(self) -> bool:
        """All but simpo compare with the reference."""
        return self.kind != "simpo"

    @property
    def reads_gold(self) -> bool:
        """The loss has a target for d."""
        return self.kind.startswith("rpo")

    @property
    def by_token_mean(self) -> bool:
        """d is made of token means in place of sums."""
        return self.kind == "simpo" or (self.kind == "ipo" and self.average)
