"""Reward models from ratings: regression on attributes (HelpSteer2, arXiv 2406.08673), and how well held-out ratings
are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align import data, ops
from align.data.attributes import NEMO_ATTRIBUTES
from align.errors import ConfigError
from align.roles import Loss, TrainedRewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import DataConfig
    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.rows import Rating
    from align.types import Batch, Ratings


def loss(*, attribute_BA: Tensor, label_BA: Tensor, mask_BT: Tensor) -> Loss:
    """Mean squared error over the attributes that somebody rated."""
    error, count = ops.losses.squared_error(attribute_BA, label_BA)
    return Loss(error, count, {})


@dataclass(frozen=True)
class RatingTask:
    """Ratings to learn from and ratings to be judged by; see `align.algorithms.reward_model.Task`."""

    train: Ratings
    validation: Ratings
    names: tuple[str, ...]
    """Of the attributes, in the order of the model's outputs."""
    weights: Mapping[str, float]
    """Goodness weights."""
    loss = staticmethod(loss)

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, index: Tensor) -> Batch:
        """The responses ``index``."""
        return self.train.select(index).batch()

    def measure(self, reward: TrainedRewardRole) -> tuple[dict[str, float], Tensor]:
        """On held-out responses: the loss; mean squared error and Pearson correlation of each attribute that is rated
        there; accuracy on pairs of responses to one prompt whose goodness differs (a tie of scores is wrong)."""
        attribute_BA = reward.attributes(self.validation.sequences).result()
        label_BA = self.validation.label_BA
        error, count = ops.losses.squared_error(attribute_BA, label_BA)
        metrics = {"loss": float(error / count)}
        for name, predicted_B, label_B in zip(self.names, attribute_BA.T, label_BA.T, strict=True):
            metrics |= {f"{name}/{key}": n for key, n in ops.losses.rating_metrics(predicted_B, label_B).items()}
        weight_A = label_BA.new_tensor([self.weights.get(name, 0.0) for name in self.names])
        score_B = ops.losses.goodness(attribute_BA, weight_A)
        label_B = ops.losses.label_goodness(label_BA, weight_A)
        difference_P = ops.losses.rated_differences(score_B, label_B, self.validation.sequences.prompt_B)
        if len(difference_P):
            metrics |= ops.losses.preference_metrics(difference_P)
        return metrics, score_B


def load_ratings(
    source: DataSplits[Rating],
    renderer: Renderer,
    section: DataConfig,
    names: tuple[str, ...],
    weights: Mapping[str, float],
) -> tuple[RatingTask, dict[str, int]]:
    """Rated responses of both splits, and row counts by outcome. Raises `ConfigError` for an attribute that nobody
    rated, but for those of NeMo-Aligner's nine that have no weight."""
    limits = section.max_prompt_tokens, section.max_response_tokens
    train, counts = data.dataset.tokenize_ratings(source.train, renderer, names, *limits)
    validation, others = data.dataset.tokenize_ratings(source.validation, renderer, names, *limits)
    rated_A = ops.losses.is_rated(train.label_BA).any(0).tolist()
    missing = [name for name, rated in zip(names, rated_A, strict=True) if not rated]
    if wrong := [name for name in missing if weights.get(name) or name not in NEMO_ATTRIBUTES]:
        raise ConfigError(
            f"reward.attributes: no row of train is rated by {', '.join(wrong)}",
            remedy="name attributes that the data has, and give those that it lacks no weight",
        )
    task = RatingTask(train, validation, names, weights)
    return task, counts | {f"validation_{name}": n for name, n in others.items()}
