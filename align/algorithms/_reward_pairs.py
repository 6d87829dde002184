"""Reward models from pairs: the losses of a pair, and how well held-out pairs are told apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from align import data, ops
from align.roles import Loss, TrainedRewardRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import DataConfig
    from align.data.chat import Renderer
    from align.data.dataset import PreferenceData
    from align.types import Batch, Pairs

Kind = Literal["bt", "margin", "scaled"]


@dataclass(frozen=True)
class PairTask:
    """Pairs to learn from and pairs to be judged by; see `align.algorithms.reward_model.Task`."""

    train: Pairs
    validation: Pairs
    loss: partial[Loss]

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, index: Tensor) -> Batch:
        """The pairs ``index``."""
        return self.train.select(index).batch()

    def measure(self, reward: TrainedRewardRole) -> tuple[dict[str, float], Tensor]:
        """Loss, accuracy (ties count as wrong), mean margin and calibration on held-out pairs."""
        score_B = reward.score(self.validation.sequences).result()
        batch = self.validation.batch()
        value = self.loss(score_B=score_B, mask_BT=batch.sequences.mask_BT, **batch.columns)
        measured = ops.losses.preference_metrics(score_B[0::2] - score_B[1::2])
        return {"loss": float(value.sum / value.count), **measured}, score_B


def load_pairs(
    source: PreferenceData, renderer: Renderer, section: DataConfig, loss: partial[Loss]
) -> tuple[PairTask, dict[str, int]]:
    """Pairs of both splits, and row counts by outcome."""
    limits = section.max_prompt_tokens, section.max_response_tokens
    train, counts = data.dataset.tokenize_pairs(source.train, renderer, *limits)
    validation, others = data.dataset.tokenize_pairs(source.validation, renderer, *limits)
    return PairTask(train, validation, loss), counts | {f"validation_{name}": n for name, n in others.items()}


def loss(*, score_B: Tensor, strength_B: Tensor, mask_BT: Tensor, kind: Kind, center_coef: float = 0.0) -> Loss:
    """The chosen loss over adjacent (chosen, rejected) rows, plus ``center_coef`` times the centering term, with
    accuracy and mean margin d."""
    chosen_P, rejected_P, strength_P = score_B[0::2], score_B[1::2], strength_B[0::2]
    difference_P = chosen_P - rejected_P
    match kind:
        case "bt":
            loss_P = ops.losses.bradley_terry(difference_P)
        case "margin":
            loss_P = ops.losses.margin_bradley_terry(difference_P, strength_P)
        case "scaled":
            loss_P = ops.losses.scaled_bradley_terry(difference_P, strength_P)
    if center_coef:
        loss_P = loss_P + center_coef * ops.losses.centering(chosen_P, rejected_P)
    count = mask_BT.new_tensor(len(loss_P), dtype=loss_P.dtype)
    right = (difference_P > 0).to(loss_P.dtype).sum()
    return Loss(loss_P.sum(), count, {"accuracy": (right, count), "margin": (difference_P.sum(), count)})
