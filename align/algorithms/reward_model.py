"""Reward models: Bradley-Terry from pairs, with margin, and scaled (HelpSteer2-Preference, arXiv 2410.01257), and
regression on the attributes of rated responses (HelpSteer2, arXiv 2406.08673).

With d = r(x, chosen) - r(x, rejected) and m = |preference strength| in {1, 2, 3}, the mean over pairs of

    bt          -log sigmoid(d)
    margin      -log sigmoid(d - m)
    scaled      -m log sigmoid(d)

each plus ``center_coef`` (r(x, chosen) + r(x, rejected))^2, or with ratings y_k of a response, the mean over responses
and their rated attributes k of

    regression  (r_k - y_k)^2

Scores are read at the last token of the conversation, found by length. The model is written with its card
(`align.rewards.card`): how the score is made of attributes, and its mean and deviation on held-out responses.

Left out: a head that averages over tokens, and losses that mix pairs and ratings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align import data
from align.algorithms import _reward_pairs, _reward_ratings
from align.config import RecipeConfig, TrainedRewardConfig
from align.data.attributes import resolve_attributes
from align.rewards.card import Card, ScoreMoments
from align.roles import LossFunction, TrainedRewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.run import Run
    from align.types import Batch

Kind = Literal["bt", "margin", "scaled", "regression"]


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Recipe of a reward model."""

    reward: TrainedRewardConfig = field(default_factory=TrainedRewardConfig)
    """The model that learns, from a causal language model or a sequence classifier."""
    loss: Kind = "scaled"
    """``bt``: plain Bradley-Terry; ``margin`` and ``scaled`` use the strength of the preference; ``scaled`` is the best
    of the three in HelpSteer2-Preference, table 3. ``regression`` reads ratings and needs ``reward.attributes``."""
    center_coef: float = 0.0
    """Weight of the centering term of a pair (Eisenstein et al. 2023, arXiv 2312.09244); TRL recommends 0.01."""
    weights: dict[str, float] = field(default_factory=dict)
    """Goodness: weight of each attribute in the score, ``regression`` only; stored with the model. Attributes that are
    not named count 0; empty means helpfulness alone."""
    batch_size: int = 64
    """Pairs of an optimizer step, or responses with ``regression``. 64 pairs: HelpSteer2-Preference."""
    validate_every: int = 20
    """Optimizer steps between two measurements on the validation split; 0 measures only at the end."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Public benchmarks on which the model is evaluated after training, each with the folder of its data."""

    def __post_init__(self) -> None:
        names, regression = resolve_attributes(self.reward.attributes), self.loss == "regression"
        if regression != bool(names):
            raise ValueError(f"loss regression needs reward.attributes, others none: {self.loss}, {list(names)}")
        if self.center_coef < 0 or (regression and self.center_coef):
            raise ValueError(f"center_coef is for pairs and must not be negative: {self.center_coef}, loss {self.loss}")
        given = ", ".join(f"weights.{name}" for name in self.weights) or "weights"
        if self.weights and not regression:
            raise ValueError(f"{given} belong to loss regression, not {self.loss}")
        if regression and not (self.goodness.keys() <= set(names) and any(self.goodness.values())):
            raise ValueError(f"{given} must be of reward.attributes, one of them not 0: {self.goodness}, {list(names)}")

    @property
    def goodness(self) -> dict[str, float]:
        """Weight of each attribute in the score; none without attributes."""
        return self.weights or ({"helpfulness": 1.0} if self.reward.attributes else {})

    def reads(self) -> Literal["preferences", "ratings"]:
        return "ratings" if self.loss == "regression" else "preferences"

    def evaluations(self) -> Mapping[str, str]:
        return self.benchmarks


class RewardModelRoles(Protocol):
    """Roles of the algorithm."""

    reward: TrainedRewardRole


class RewardTask(Protocol):
    """Rows to learn from and rows to be judged by."""

    @property
    def loss(self) -> LossFunction:
        """Loss of a batch."""
        ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The rows ``index`` of the training split."""
        ...

    def measure(self, reward: TrainedRewardRole) -> tuple[dict[str, float], Tensor]:
        """Numbers of the validation split by name, and the score of each of its responses, (B,)."""
        ...


@dataclass(frozen=True)
class RewardModelData:
    """What to learn, and what will stand beside the model, but for its moments."""

    task: RewardTask
    card: Card


def load_data(config: Config, source: DataSplits[Any], renderer: Renderer) -> tuple[RewardModelData, dict[str, int]]:
    """Rows of both splits, and their counts by outcome."""
    names = resolve_attributes(config.reward.attributes)
    if config.loss == "regression":
        task, counts = _reward_ratings.load_ratings(source, renderer, config.data, names, config.goodness)
    else:
        loss = partial(_reward_pairs.loss, kind=config.loss, center_coef=config.center_coef)
        task, counts = _reward_pairs.load_pairs(source, renderer, config.data, loss)
    kind = "attributes" if names else "sequence_classification"
    read = renderer.template, config.data.date
    card = Card(kind, names, config.goodness, None, *read, source.fingerprint, config.loss)
    return RewardModelData(task, card), counts


def train(config: Config, train_data: RewardModelData, roles: RewardModelRoles, run: Run) -> None:
    """Visit the rows in seeded order."""
    task, score_B = train_data.task, None
    order = data.prompts.BatchOrder(len(task), config.batch_size, config.run.seed)
    for step in run.steps():
        metrics, held_out = roles.reward.update(task.batch(order.indices(step)), task.loss).result(), {}
        if run.is_last(step) or (config.validate_every and step % config.validate_every == 0):
            held_out, score_B = task.measure(roles.reward)
        run.log(step, metrics | {f"validation/{name}": value for name, value in held_out.items()})
    if score_B is None:  # a resumed run that had made its last step
        _, score_B = task.measure(roles.reward)
    card = replace(train_data.card, moments=ScoreMoments.of(score_B))
    roles.reward.export(run.final, card.files()).result()
