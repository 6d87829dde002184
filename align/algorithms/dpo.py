"""DPO and its kin: a policy from preference pairs (Rafailov et al. 2023, arXiv 2305.18290; margin and scaled DPO:
HelpSteer2-Preference, arXiv 2410.01257; reward-aware: Nemotron-4 340B, arXiv 2406.11704).

    d = [log pi(y_c|x) - log pi_ref(y_c|x)] - [log pi(y_r|x) - log pi_ref(y_r|x)]          sums over response tokens
    L = mean over pairs of f(d)  +  sft_coef * mean over preferred tokens of -log pi

with f by ``loss.kind``; the functions are in `align.ops.preference_losses`, the whole loss in
`align.algorithms._preference_loss`. The strength m of a preference comes from the data; the gold difference d* of
``rpo_*`` is the strength or the difference of a reward model's scores.
Left out: pairs with more than two responses, and a reference that moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from align import data, ops
from align.algorithms import _evaluation, _preference_loss
from align.algorithms._evaluation import Evaluator
from align.config import (
    AnyRewardConfig,
    EvaluationConfig,
    PolicyConfig,
    PreferenceLossConfig,
    RecipeConfig,
    ReferenceConfig,
    ReferenceFromPolicyConfig,
    SamplingConfig,
)
from align.roles import PolicyRole, ReferenceRole, RewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import PreferenceData
    from align.run import Run
    from align.types import Pairs


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Recipe of DPO."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model that learns."""
    reference: ReferenceConfig = field(default_factory=lambda: ReferenceFromPolicyConfig())
    """The frozen policy in d; by default the policy's starting weights. Absent with ``reference_cache``, which
    needs the policy's own ``path``, ``revision`` and ``dtype`` here, and with ``loss.kind: simpo``."""
    reference_cache: str = ""
    """Folder that caches the starting policy's log-probabilities under the fingerprints of model and pairs; they are
    computed once, by the driver, before the first step. Empty: reference workers compute them in each step."""
    reward: AnyRewardConfig | None = None
    """A reward model for ``gold: reward`` and for held-out evaluation; null without."""
    eval_reward: AnyRewardConfig | None = None
    """A second reward model that scores held-out answers."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    """The loss of a pair."""
    gold: Literal["strength", "reward"] = "strength"
    """Where the target d* of ``rpo_*`` comes from: the strength of the preference, or ``reward``'s scores."""
    batch_size: int = 128
    """Pairs of an optimizer step. 128: HelpSteer2 (arXiv 2406.08673)."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation during training."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How held-out prompts are answered, beside the greedy answers. ``num_samples`` is not used."""

    def __post_init__(self) -> None:
        if not self.reward and (self.gold == "reward" or self.evaluation.every):
            raise ValueError("gold: reward and evaluation.every need a reward model: give reward.path")
        if self.reward and self.gold != "reward" and not self.evaluation.every:
            raise ValueError("reward is read with gold reward or evaluation.every only")
        if self.eval_reward and not self.evaluation.every:
            raise ValueError("eval_reward scores held-out answers: set evaluation.every")
        if self.gold == "reward" and not self.loss.reads_gold:
            raise ValueError(f"gold: reward is a target of loss.kind rpo_*, not of {self.loss.kind}")
        if self.reference_cache and not self.loss.needs_reference:
            raise ValueError(f"reference_cache is of no use to loss.kind {self.loss.kind}: leave it out")
        start, own = ((model.path, model.revision, model.dtype) for model in (self.policy, self.reference))
        if self.reference_cache and start != own:
            problem = "reference_cache requires reference.path, revision and dtype to equal those of policy.path"
            raise ValueError(f"{problem}. Got {own} and {start}")
        if self.gold == "reward" and self.reward and self.reward.failed == "drop":
            raise ValueError("reward.failed drop would leave a pair without a target: gold reward needs fail")

    def absent(self) -> set[str]:
        needless = self.reference_cache or not self.loss.needs_reference
        return super().absent() | ({"reference"} if needless else set())


class DPORoles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole
    reference: ReferenceRole | None
    reward: RewardRole | None
    eval_reward: RewardRole | None


@dataclass(frozen=True)
class DPOData:
    """Training pairs and held-out prompts."""

    pairs: Pairs
    held_out: _evaluation.HeldOutPrompts | None


def load_data(config: Config, source: PreferenceData, renderer: Renderer) -> tuple[DPOData, dict[str, int]]:
    """Pairs of the training split without ties, and row counts by outcome."""
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    pairs, counts = data.dataset.tokenize_pairs(source.train, renderer, *limits)
    return DPOData(pairs, _evaluation.load_held_out(config.evaluation, source, renderer, config.data, counts)), counts


def reference_sums(
    config: Config, pairs: Pairs, roles: DPORoles, fingerprints: Mapping[str, str]
) -> Callable[[Pairs, Tensor], Tensor]:
    """A function from pairs and row numbers to reference log-probabilities (nats), cached by model."""
    if not config.reference_cache:
        return lambda batch, rows: _preference_loss.reference_sums(roles.reference, batch)
    key = data.cache.cache_key(fingerprints["policy"], config.policy.dtype, pairs.sequences)
    cached_B = data.cache.cached_logprobs(
        config.reference_cache, key, pairs.sequences, partial(_preference_loss.log_prob_sums, roles.policy)
    )
    return lambda batch, rows: cached_B[data.prompts.group_members(rows, 2)]


def gold(config: Config, pairs: Pairs, roles: DPORoles) -> Tensor:
    """Numbers whose difference in a pair is the target d* of ``rpo_*``."""
    if config.gold == "reward" and roles.reward:
        return roles.reward.score(pairs.sequences).result()
    return ops.advantages.interleave(pairs.strength_P, 0.0 * pairs.strength_P)


def train(config: Config, train_data: DPOData, roles: DPORoles, run: Run) -> None:
    """Train on the pairs in seeded order."""
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    reference = reference_sums(config, train_data.pairs, roles, run.identity.models)
    loss = partial(_preference_loss.loss, how=config.loss)
    order = data.prompts.BatchOrder(len(train_data.pairs), config.batch_size, config.run.seed)
    for step in run.steps():
        rows = order.indices(step)
        pairs = train_data.pairs.select(rows)
        batch = pairs.batch(reference_B=reference(pairs, rows), gold_B=gold(config, pairs, roles))
        metrics = roles.policy.update(batch, loss).result()
        run.log(step, metrics | evaluator.measure(step))
    roles.policy.export(run.final).result()
