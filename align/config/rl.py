"""Sections of recipes that learn from responses the policy samples itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from align.config.base import RecipeConfig, RowKind
from align.config.losses import PolicyLossConfig
from align.config.models import PolicyConfig, ReferenceConfig, ReferenceFromPolicyConfig, SamplerConfig
from align.config.rewards import AnyRewardConfig, CheckpointRewardConfig
from align.config.sampling import SamplingConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts that the policy answers during training: greedily, and sampled with the same noise each time
    (docs/algorithms/common.md)."""

    every: int = 0
    """Steps between two measurements; the policy is also measured before the first step and after the last. 0 turns
    them off. In ``dpo`` measurements need ``reward``."""
    prompts: int = 64
    """How many prompts, the first of the validation split."""
    keep_best: bool = False
    """Write the policy to ``best/`` each time the mean reward of its answers is the highest so far."""
    best_by: Literal["greedy", "sampled"] = "greedy"
    """Which answers ``keep_best`` compares."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.prompts < 1:
            raise ValueError(f"every must not be negative and prompts must be positive: {self.every}, {self.prompts}")
        if self.keep_best and not self.every:
            raise ValueError("keep_best needs measurements: set every")


@dataclass(frozen=True)
class RewardShapingConfig:
    """From raw scores to rewards, in this order: ``(score - mean) / std``, times ``scale``, ``clip``, overlong penalty.
    KL comes after these."""

    mean: float = 0.0
    """Subtracted from the score. HelpSteer2's PPO: the mean score of its data."""
    std: float = 1.0
    """Divides the score. HelpSteer2's PPO: the standard deviation of the scores of its data."""
    running: bool = False
    """Use the mean and standard deviation of all scores so far, those of this step included. Not together with ``mean``
    or ``std``."""
    scale: float = 1.0
    """Factor after normalization."""
    clip: float | None = None
    """Bound on the absolute value of the normalized and scaled score; null for no bound."""
    overlong_buffer: int = 0
    """Tokens before ``sampling.max_tokens`` over which a penalty rises linearly (DAPO, arXiv 2503.14476, equation 13);
    0 for none."""
    overlong_penalty: float = 1.0
    """Penalty of a response of ``sampling.max_tokens`` tokens, in units of the shaped reward. 1: DAPO."""

    def __post_init__(self) -> None:
        if self.std <= 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"std and clip must be positive: {self.std}, {self.clip}")
        if self.running and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(f"running takes the place of mean and std: {self.mean}, {self.std}")


@dataclass(frozen=True)
class OnPolicyConfig(RecipeConfig):
    """Keys of recipes whose policy samples."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model that learns."""
    reward: AnyRewardConfig = field(default_factory=CheckpointRewardConfig)
    """The reward model that the policy is trained against: a checkpoint, a service, or a function. A reward model with
    another tokenizer or chat template scores decoded text."""
    eval_reward: AnyRewardConfig | None = None
    """A second reward model that scores every rollout and held-out answer and is never trained against: a gain that it
    does not share is an error of the first."""
    sampler: SamplerConfig | None = None
    """Separate processes that sample for the policy: ``sampler: {}`` with ``placement.sampler``."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn; ``num_samples`` is K."""
    prompts_per_step: int = 64
    """Prompts of a rollout batch, P. 64: NeMo-Aligner."""
    truncated: Literal["mask", "keep", "penalize"] = "mask"
    """Responses cut off at the limit: not compared and not learned from (NeMo-Aligner's intent), like any other, or
    penalized."""
    truncation_penalty: float = 1.0
    """Subtracted from the reward of a truncated response with ``truncated: penalize``, in units of the shaped
    reward."""
    epochs: int = 1
    """Passes over a rollout batch."""
    minibatches: int = 1
    """Optimizer steps of a pass; each sees a part of the prompts."""
    max_off_policy_steps: int = 0
    """How many steps older than the trained policy a rollout may be: with n, the rollouts of step s + n are sampled
    while step s trains, if the sampler has separate slots. 0 is on-policy (docs/architecture.md)."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation during training."""
    rounds: int = 1
    """How often ``run.steps`` are run. Each later round starts from the best policy of the previous round (its last
    policy without ``evaluation.keep_best``), which also becomes the reference. HelpSteer2-Preference's PPO: 2."""

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.max_off_policy_steps < 0 or self.rounds < 1:
            raise ValueError(
                "prompts_per_step and rounds must be positive, max_off_policy_steps not negative: "
                f"{self.prompts_per_step}, {self.rounds}, {self.max_off_policy_steps}"
            )
        if self.epochs < 1 or not 1 <= self.minibatches <= self.prompts_per_step:
            raise ValueError(
                f"epochs must be positive and minibatches lie in 1 to prompts_per_step: {self.epochs}, "
                f"{self.minibatches}, {self.prompts_per_step}"
            )

    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    def reads(self) -> RowKind:
        return "prompts"

    def rows_per_step(self) -> tuple[str, int]:
        return "prompts_per_step", self.prompts_per_step

    def num_rounds(self) -> int:
        return self.rounds

    def in_round(self, start: str) -> OnPolicyConfig:
        """The reference and the sampler start from the same folder as the policy."""
        moved = {
            name: replace(section, path=start, revision=None, init={})
            for name, section in vars(self).items()
            if isinstance(section, (PolicyConfig, ReferenceConfig, SamplerConfig))
        }
        return replace(self, **moved)

    def require_varied(self) -> None:
        """Refuse a sampling that gives no two different responses to a prompt."""
        if self.sampling.num_samples < 2:
            raise ValueError(f"sampling.num_samples must be at least 2: {self.sampling.num_samples}")
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be positive: greedy responses to a prompt are all alike")


@dataclass(frozen=True)
class PolicyGradientConfig(OnPolicyConfig):
    """Keys of recipes of policy gradients (docs/algorithms/common.md)."""

    reference: ReferenceConfig = field(default_factory=lambda: ReferenceFromPolicyConfig())
    """The frozen policy to which KL is measured; by default the policy's starting weights."""
    kl_coef: float = 0.01
    """Weight of the KL divergence. In the reward its unit follows ``kl_reduction`` (``rloo``, ``grpo``), and is that of
    the sum in algorithms without that key; in the loss it follows ``loss.aggregation``. 0.01: NeMo-Aligner."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "abs"
    """Estimate at a token, see `align.ops.kl`. ``abs``: NeMo-Aligner; TRL takes k1."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """``reward``: subtracted from the reward, without gradient. ``loss``: added to the loss at each token; refused with
    ``k1``, whose gradient ignores the reference."""
    kl_target: float | None = None
    """KL of a response (sum over tokens, nats) that the coefficient is steered to (Ziegler et al. 2019, arXiv
    1909.08593, section 2.2); null keeps the coefficient constant."""
    kl_horizon: int = 10000
    """Responses over which the controller acts: a larger number reacts more slowly. At least the responses of a step.
    10000: Ziegler et al."""
    shaping: RewardShapingConfig = field(default_factory=RewardShapingConfig)
    """From scores to rewards."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The policy's loss."""
    target_kl: float | None = None
    """KL of a token to the policy before the step (nats) above which the remaining policy updates of the step are
    skipped; null never skips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 has a gradient that ignores the reference: kl_placement loss needs another"
            )
        if self.epochs * self.minibatches > 1 and self.loss.kind == "reinforce":
            raise ValueError(
                "loss.kind reinforce has no ratio to the policy that sampled: with more than one update a rollout "
                f"(epochs {self.epochs}, minibatches {self.minibatches}) take loss.kind clipped"
            )
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"kl_target must be positive: {self.kl_target}")
        responses = self.prompts_per_step * self.sampling.num_samples
        if self.kl_target is not None and self.kl_horizon < responses:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is below the {responses} responses of a step, the controller would swing"
            )

    def kl_notes(self, reduction: str) -> list[str]:
        """The coefficient in both units, so that one is not taken for the other; none where KL is in the loss."""
        length, mean = self.sampling.max_tokens, reduction == "mean"
        other, converted = ("sum", self.kl_coef / length) if mean else ("mean", self.kl_coef * length)
        note = (
            f"kl_coef {self.kl_coef:g} on the {reduction} over tokens equals {converted:.3g} on the {other} "
            f"for a response of {length} tokens (sampling.max_tokens)"
        )
        return [note] if self.kl_placement == "reward" else []
