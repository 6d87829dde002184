"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), against a HelpSteer reward
model.

For K responses y_i to a prompt x, with r the reward model's score and pi_ref the reference:

    R_i = r(x, y_i) - kl_coef * KL_i          KL_i = sum_t or mean_t of an estimate at each token
    A_i = R_i - mean of R_j over the other usable j
    L   = - sum_i A_i sum_t log pi(y_it | x, y_i<t) / number of tokens of responses that have an A_i

One optimizer step for each batch of rollouts, so there is no ratio to an older policy and no clipping. All
log-probabilities are taken at the sampling temperature. The defaults are those of NeMo-Aligner's REINFORCE, with which
Llama-3.1-Nemotron-70B-Instruct was aligned (HelpSteer2-Preference, arXiv 2410.01257).

Left out: several steps for each rollout, and sequence-level clipped ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from align import data, ops, roles, sections

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.helpsteer import PreferenceData
    from align.data.prompts import PromptStream
    from align.run import Run
    from align.types import Batch, Rollouts


@dataclass(frozen=True)
class Config(sections.Recipe):
    """Recipe of RLOO."""

    policy: sections.Policy = field(default_factory=sections.Policy)
    """The model that learns."""
    reference: sections.Reference = field(default_factory=lambda: sections.StartingPolicy())
    """The frozen policy that KL is measured to; by default what the policy starts from."""
    reward: sections.Reward = field(default_factory=sections.Reward)
    """The reward model. It must read the policy's token ids."""
    sampling: sections.Sampling = field(default_factory=lambda: sections.Sampling(num_samples=4))
    """``num_samples`` is K, at least 2. 4: HelpSteer2-Preference."""
    prompts_per_step: int = 64
    """Prompts of an optimizer step, P. 64: NeMo-Aligner."""
    kl_coef: float = 0.01
    """Weight of the KL divergence in the reward. Its unit depends on ``kl_reduction``. 0.01: NeMo-Aligner."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """KL of a response is that of its mean token (NeMo-Aligner) or of all its tokens (TRL)."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "abs"
    """Estimate at a token, see `align.ops.kl`. ``abs``: NeMo-Aligner; TRL takes k1."""
    unfinished: Literal["exclude", "keep", "penalise"] = "exclude"
    """Responses cut off at the limit: out of baseline and gradient (NeMo-Aligner's intent), like any other, or
    penalised."""
    unfinished_penalty: float = 1.0
    """Subtracted from the score of an unfinished response when they are penalised, in units of the score."""

    def __post_init__(self) -> None:
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples must be at least 2 for a leave-one-out baseline: {self.sampling.num_samples}"
            )
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be positive: greedy responses to a prompt are all alike")

    def notes(self) -> list[str]:
        """What a reader of the configuration should know."""
        length = self.sampling.max_tokens
        mean = self.kl_reduction == "mean"
        other, converted = ("sum", self.kl_coef / length) if mean else ("mean", self.kl_coef * length)
        return [
            f"kl_coef {self.kl_coef:g} on the {self.kl_reduction} over tokens equals {converted:.3g} on the {other} "
            f"for a response of {length} tokens (sampling.max_tokens)"
        ]


class Cast(Protocol):
    """Roles of this algorithm."""

    policy: roles.Policy
    reference: roles.Reference
    reward: roles.Reward


def prepare(config: Config, source: PreferenceData, renderer: Renderer) -> tuple[PromptStream, dict[str, int]]:
    """The prompts of the training split, each once, and what became of its rows."""
    found = data.helpsteer.prompts(source.train, renderer, config.data.max_prompt_tokens)
    stream = data.prompts.PromptStream(found.tokens, config.prompts_per_step, config.run.seed, renderer.stop_ids)
    return stream, dict(found.counts)


def learn_from(
    config: Config, rollouts: Rollouts, score_B: Tensor, reference_BT: Tensor
) -> tuple[Batch, dict[str, float]]:
    """From scores and reference log-probabilities to advantages, and what is worth knowing about them."""
    mask_BT, K = rollouts.mask_BT, config.sampling.num_samples
    reward_B, usable_B = ops.rewards.treat_unfinished(
        score_B, rollouts.finished_B, config.unfinished, config.unfinished_penalty
    )
    kl_BT = ops.kl.per_token(rollouts.logprob_BT, reference_BT, config.kl_estimator)
    reward_B = ops.rewards.subtract_kl(
        reward_B, ops.kl.per_sequence(kl_BT, mask_BT, config.kl_reduction), config.kl_coef
    )
    advantage_PK, learnable_PK = ops.advantages.leave_one_out(reward_B.view(-1, K), usable_B.view(-1, K))
    signed_BT = ops.kl.per_token(rollouts.logprob_BT, reference_BT, "k1")
    statistics = {
        "reward": float(score_B.mean()),
        "reward_std": float(score_B.std()),
        "shaped_reward": float(reward_B.mean()),
        "kl": float(ops.logprobs.masked_sum(signed_BT, mask_BT).mean()),
        "kl_limited_tokens": float(ops.kl.num_limited(rollouts.logprob_BT, reference_BT, mask_BT)),
        "response_tokens": float(mask_BT.sum(1).double().mean()),
        "unfinished": 1.0 - float(rollouts.finished_B.double().mean()),
        "learnable": float(learnable_PK.double().mean()),
    }
    return rollouts.batch(advantage_B=advantage_PK.flatten(), learnable_B=learnable_PK.flatten()), statistics


def loss(
    *, logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor, advantage_B: Tensor, learnable_B: Tensor
) -> roles.Loss:
    """REINFORCE over the responses that have an advantage; the entropy is that of all responses."""
    total, count = ops.losses.reinforce(logprob_BT, advantage_B, mask_BT & learnable_B[:, None])
    entropy = ops.logprobs.masked_sum(entropy_BT, mask_BT).sum()
    return roles.Loss(total, count, {"entropy": (entropy, mask_BT.sum())})


def train(config: Config, prompts: PromptStream, cast: Cast, run: Run) -> None:
    """Sample, judge, compare, step."""
    for step in run.steps():
        rollouts = cast.policy.generate(prompts.batch(step), config.sampling).result()
        score_B, reference_BT = roles.together(
            cast.reward.score(rollouts.sequences), cast.reference.logprobs(rollouts.sequences, rollouts.temperature)
        )
        batch, statistics = learn_from(config, rollouts, score_B, reference_BT)
        metrics = cast.policy.update(batch, loss).result()
        run.log(step, statistics | metrics, rollouts, score_B)
    cast.policy.export(run.final).result()
