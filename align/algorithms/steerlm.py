"""SteerLM: SFT on responses conditioned on attribute labels in the prompt (Dong et al. 2023, arXiv 2310.05344;
HelpSteer, arXiv 2311.09528).

    L = - sum_i sum_t log pi(y_it | x_i, a_i, y_i<t) / sum_i |y_i|

over the response tokens of an optimizer step. The labels a_i, whole numbers from 0 to 4, come from people or from an
attribute model, whose ratings are clipped to 0 to 4 and rounded. Later rounds are the paper's bootstrapping: the policy
of the previous round answers training prompts that request ``steering.values``, the attribute model labels the answers,
and the policy trains on them with these labels in the prompt.
Left out: labels of earlier turns of a conversation, and the first paper's attribute model, which writes its labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align import data
from align.algorithms import _steerlm
from align.algorithms._evaluation import Evaluator
from align.algorithms.sft import loss
from align.config import AnyRewardConfig, EvaluationConfig, PolicyConfig, RecipeConfig, SamplingConfig, SteeringConfig
from align.data.attributes import resolve_attributes
from align.roles import PolicyRole, RewardRole

if TYPE_CHECKING:
    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.rows import Rating
    from align.run import Run

NOISE = -100
"""Step number that names the noise of bootstrapping in round 0; training steps count from 1."""


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Recipe of SteerLM."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model that learns."""
    reward: AnyRewardConfig | None = None
    """The attribute model: a frozen regression model that labels responses and scores held-out answers. Refused with
    ``labels: data``, one round and no evaluation, which do not use it."""
    eval_reward: AnyRewardConfig | None = None
    """A second reward model that scores held-out answers."""
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    """Which attributes the prompt shows the policy, and where."""
    labels: Literal["reward", "data"] = "reward"
    """Who labels the responses of the data: the attribute model (``reward``), or the human annotators (``data``)."""
    batch_size: int = 128
    """Responses of an optimizer step. 128: NeMo-Aligner's guide to SteerLM."""
    rounds: int = 1
    """How often ``run.steps`` are run. Each later round starts from the policy of the previous one (its best with
    ``evaluation.keep_best``) and bootstraps."""
    bootstrap_prompts: int = 0
    """Training prompts that a later round answers, different ones in each round; 0 for all of them."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.9))
    """How training prompts are answered in bootstrapping, ``num_samples`` times each, and held-out ones beside the
    greedy answers. 0.7 and 0.9: HelpSteer2 (arXiv 2406.08673)."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation during training, of answers for ``steering.values``."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1 or self.bootstrap_prompts < 0:
            numbers = f"{self.batch_size}, {self.rounds}, {self.bootstrap_prompts}"
            raise ValueError(f"batch_size and rounds must be positive, bootstrap_prompts not negative: {numbers}")
        used = self.rates or bool(self.evaluation.every)
        if used and not self.reward:
            raise ValueError(
                f"reward is null: labels {self.labels}, rounds {self.rounds} and evaluation.every "
                f"{self.evaluation.every} need an attribute model; labels data without the others needs none"
            )
        if self.reward and not used:
            raise ValueError("reward is not read with labels data, rounds 1 and evaluation.every 0: leave it out")
        if self.eval_reward and not self.evaluation.every:
            raise ValueError("eval_reward scores held-out answers: set evaluation.every")

    @property
    def rates(self) -> bool:
        """Whether the attribute model labels anything."""
        return self.labels == "reward" or self.rounds > 1

    def reads(self) -> Literal["preferences", "ratings"]:
        return _steerlm.reads(self.labels, self.data)

    def rated(self) -> Mapping[str, Sequence[str]]:
        return {"reward": resolve_attributes(self.steering.attributes)} if self.rates else {}

    def num_rounds(self) -> int:
        return self.rounds

    def in_round(self, start: str) -> Config:
        return replace(self, policy=replace(self.policy, path=start, revision=None, init={}))


class SteerLMRoles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole
    reward: RewardRole | None
    eval_reward: RewardRole | None


def load_data(
    config: Config, source: DataSplits[Any], renderer: Renderer
) -> tuple[_steerlm.SteerLMData, dict[str, int]]:
    """Responses of the training split, held-out prompts, and row counts by outcome."""
    train_data, counts = _steerlm.load_data(config, config.evaluation, config.steering, config.labels, source, renderer)
    if config.rounds > 1:  # fewer answers are left where some do not end
        contexts = list({row.context for row in train_data.rows})[: config.bootstrap_prompts or None]
        data.prompts.require_rows(config, len(contexts) * config.sampling.num_samples)
    return train_data, counts


def bootstrap(config: Config, train_data: _steerlm.SteerLMData, policy: PolicyRole, run: Run) -> list[Rating]:
    """Answers of the policy to training prompts that request the best labels; truncated answers are left out."""
    contexts = list(dict.fromkeys(row.context for row in train_data.rows))
    count, renderer = min(config.bootstrap_prompts or len(contexts), len(contexts)), train_data.renderer
    chosen = data.prompts.BatchOrder(len(contexts), count, config.run.seed).indices(run.round).tolist()
    requests = [("", contexts[i], train_data.form.values) for i in chosen]
    steered = data.steerlm_dataset.steered_prompts(requests, renderer, train_data.form, config.data.max_prompt_tokens)
    prompts = data.prompts.first_prompts(steered.steered, count, renderer.stop_ids, NOISE - run.round)
    parts = data.steerlm_dataset.prompt_batches(prompts, _steerlm.PART)
    answered = ((part.index_P, policy.generate(part, config.sampling).result()) for part in parts)
    rows, counts = data.steerlm_dataset.sampled_responses(steered.contexts, answered, renderer)
    run.report(f"round {run.round}, bootstrap prompts: {_steerlm.format_counts(steered.counts)}")
    run.report(f"round {run.round}, their answers: {_steerlm.format_counts(counts)}")
    return rows


def train(config: Config, train_data: _steerlm.SteerLMData, roles: SteerLMRoles, run: Run) -> None:
    """Label, then train on the responses in seeded order. A resumed run repeats everything before its first step."""
    rows = train_data.rows if run.round == 1 else bootstrap(config, train_data, roles.policy, run)
    if roles.reward and (run.round > 1 or config.labels == "reward"):
        rows = _steerlm.label_ratings(rows, roles.reward, train_data.form, run)
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    sequences, counts = data.steerlm_dataset.steered_demonstrations(rows, train_data.renderer, train_data.form, *limits)
    run.report(f"round {run.round}, demonstrations: {_steerlm.format_counts(counts)}")
    data.prompts.require_rows(config, counts["kept"])
    evaluator = Evaluator(config.evaluation, config.sampling, train_data.held_out, roles, run)
    order = data.prompts.BatchOrder(len(sequences), config.batch_size, config.run.seed)
    for step in run.steps():
        metrics = roles.policy.update(sequences.select(order.indices(step)).batch(), loss).result()
        run.log(step, metrics | evaluator.measure(step))
    roles.policy.export(run.final, train_data.files).result()
