"""SteerLM 2.0: trains an attribute-conditioned policy towards the ratings of the attribute model (HelpSteer2, arXiv
2406.08673).

The target of the policy Q is P(y|a, x), proportional to P(a|x, y) P(y|x). A regression model gives the first factor by
a Beta distribution around its rating (`align.ops.steerlm.beta_bins`), a base model without attributes the second. The n
samples y_i of the previous policy Q' for each prompt x with attributes a give

    w'_i = softmax_i( log P(a|x, y_i) + log P(y_i|x) - log Q'(y_i|a, x) )
    b'_i = softmax_i( log Q(y_i|a, x) - log Q'(y_i|a, x) )
    L    = mean over groups of - sum_i (w'_i - b'_i) log Q(y_i|a, x) / mean |y_i|

with sums of log-probabilities over tokens at temperature 1, and no gradient through w' and b'. The gradient is that of
KL(w' || b') over the samples (metric ``kl``). a are the labels of a response of the data. In a second round Q' and Q
start from the policy of the first; the base stays. Left out: several epochs over samples that are drawn once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align import data, ops
from align.algorithms import _candidates, _diagnostics, _rollout, _steerlm
from align.algorithms._evaluation import Evaluator
from align.config import OnPolicyConfig, PreviousPolicyConfig, PriorPolicyConfig, SamplingConfig, SteeringConfig
from align.data.attributes import resolve_attributes
from align.data.steerlm import SteeringFormat, require_same_steering
from align.roles import Loss, PolicyRole, ReferenceRole, RewardRole, SamplingRole, wait_for_all

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.run import Run
    from align.types import Batch, Rollouts


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """Recipe of SteerLM 2.0."""

    previous: PreviousPolicyConfig = field(default_factory=lambda: PreviousPolicyConfig())
    """The frozen policy Q' that samples. With its own slots and ``max_off_policy_steps`` it samples while the policy
    learns; the result is the same."""
    base: PriorPolicyConfig = field(default_factory=PriorPolicyConfig)
    """The model of P(y|x): its prompts hold no attributes, and it stays the same in all rounds. HelpSteer2's is the
    supervised model that its SteerLM model started from."""
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    """Which attributes the prompt shows the policy, and where: as in the training of its SteerLM model."""
    labels: Literal["reward", "data"] = "reward"
    """Who labels the responses of the data, whose labels are requested: the attribute model (``reward``), or the human
    annotators (``data``)."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=10, temperature=0.7, top_p=0.9))
    """n samples, at least 2. 10 at temperature 0.7 and top-p 0.9: HelpSteer2."""
    prompts_per_step: int = 128
    """Groups of a step. 128: HelpSteer2's batch."""
    rounds: int = 2
    """How often ``run.steps`` are run; each later round starts from the policy of the previous one. 2: HelpSteer2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()

    def reads(self) -> Literal["preferences", "ratings"]:
        return _steerlm.reads(self.labels, self.data)

    def rated(self) -> Mapping[str, Sequence[str]]:
        return {"reward": resolve_attributes(self.steering.attributes)}


class SteerLM2Roles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole
    previous: SamplingRole
    base: ReferenceRole
    reward: RewardRole
    eval_reward: RewardRole | None


def load_data(
    config: Config, source: DataSplits[Any], renderer: Renderer
) -> tuple[_steerlm.SteerLMData, dict[str, int]]:
    """Responses whose labels are requested, held-out prompts, and row counts by outcome."""
    require_same_steering(SteeringFormat.of(config.steering), config.policy.path)
    return _steerlm.load_data(config, config.evaluation, config.steering, config.labels, source, renderer)


def loss(
    *,
    logprob_BT: Tensor,
    entropy_BT: Tensor,
    mask_BT: Tensor,
    previous_BT: Tensor,
    weight_B: Tensor,
    learnable_B: Tensor,
    num_samples: int,
) -> Loss:
    """The group objective, mean over groups with two usable samples; its KL divergence; the mean entropy."""
    ratio_B = ops.logprobs.masked_sum(logprob_BT - previous_BT, mask_BT).detach()
    grouped = ops.logprobs.masked_sum(logprob_BT, mask_BT), weight_B, ratio_B, learnable_B, mask_BT.sum(1)
    logprob_PK, weight_PK, ratio_PK, usable_PK, tokens_PK = (x.view(-1, num_samples) for x in grouped)
    target_PK, baseline_PK = (ops.steerlm.shares(x, usable_PK) for x in (weight_PK, ratio_PK))
    loss_P = ops.steerlm.group_loss(logprob_PK, target_PK, baseline_PK, usable_PK, tokens_PK)
    learn_P = usable_PK.sum(1) >= 2
    count = learn_P.sum()
    over_groups = lambda x_P: x_P.masked_select(learn_P).sum()  # noqa: E731
    learn_BT = mask_BT & (usable_PK & learn_P[:, None]).flatten()[:, None]
    entropy = ops.logprobs.masked_sum(entropy_BT.detach(), learn_BT).sum()
    kl = over_groups(ops.steerlm.divergence(target_PK, baseline_PK, usable_PK))
    metrics = {"kl": (kl, count), "entropy": (entropy, learn_BT.sum())}
    return Loss(over_groups(loss_P), count, metrics)


def weigh_samples(
    config: Config, train_data: _steerlm.LabelGroups, roles: SteerLM2Roles, rollouts: Rollouts
) -> tuple[Batch, Tensor, dict[str, float]]:
    """Samples with their weights log P(a|x, y) + log P(y|x) - log Q'(y|a, x); log P(a|x, y); statistics."""
    sequences, previous_BT = rollouts.sequences, rollouts.untempered_logprob_BT
    rows_B = train_data.rows(rollouts)[sequences.prompt_B]
    responses = zip(rows_B.tolist(), map(train_data.steerlm.renderer.text, sequences.responses.lists()), strict=True)
    dialogues = [data.chat.Dialogue(train_data.prompt_set.contexts[i], text) for i, text in responses]
    rating = roles.reward.rate(dialogues, train_data.steerlm.form.names)
    rating_BA, base_BT = wait_for_all(rating, roles.base.logprobs(train_data.for_reward_models(rollouts), 1.0))
    fit_B = ops.steerlm.attribute_logprob(rating_BA, train_data.prompt_set.label_PA[rows_B]).float()
    weight_B = fit_B + ops.logprobs.masked_sum(base_BT - previous_BT, rollouts.mask_BT)
    weight_PK, usable_PK = _candidates.comparable_candidates(config, rollouts, weight_B)
    columns = {"previous_BT": previous_BT, "weight_B": weight_PK.flatten(), "learnable_B": usable_PK.flatten()}
    batch = replace(rollouts.batch(**columns), unit=config.sampling.num_samples, temperature=1.0)
    effective = ops.steerlm.effective_samples(ops.steerlm.shares(weight_PK, usable_PK))
    learnable = float((usable_PK.sum(1) >= 2).double().mean())
    return batch, fit_B, {"learnable": learnable, "effective_samples": effective}


def train(config: Config, train_data: _steerlm.SteerLMData, roles: SteerLM2Roles, run: Run) -> None:
    """Sample from the previous policy, weigh, update."""
    prompts = _steerlm.group_labels(config, config.labels, train_data, roles.reward, run)
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    for step, rollouts in run.rollouts(prompts.prompts, roles.previous, config.sampling, config.max_off_policy_steps):
        batch, fit_B, statistics = weigh_samples(config, prompts, roles, rollouts)
        sequences = prompts.for_reward_models(rollouts)
        eval_B = roles.eval_reward.score(sequences).result() if roles.eval_reward else None
        statistics |= _diagnostics.reward_diagnostics(rollouts, fit_B, eval_B, None, run.state)
        update = roles.policy, batch, partial(loss, num_samples=config.sampling.num_samples)
        metrics = _rollout.run_updates(config, step, config.sampling.num_samples, {"": update})
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, fit_B)
    roles.policy.export(run.final, train_data.files).result()
