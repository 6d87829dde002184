"""Reward models from preference pairs: Bradley-Terry, with margin, and scaled (HelpSteer2-Preference, arXiv
2410.01257).

With d = r(x, chosen) - r(x, rejected) and m = |preference strength| in {1, 2, 3}, the mean over pairs of

    bt      -log sigmoid(d)
    margin  -log sigmoid(d - m)
    scaled  -m log sigmoid(d)

The score is read at the last token of the conversation, found by length.

Left out: regression on attributes and starting from another reward model's head, which have recipes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from align import data, ops, roles, sections

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.helpsteer import PreferenceData
    from align.run import Run
    from align.types import Pairs

Kind = Literal["bt", "margin", "scaled"]


@dataclass(frozen=True)
class Config(sections.Recipe):
    """Recipe of a reward model."""

    reward: sections.TrainedReward = field(default_factory=sections.TrainedReward)
    """The model that learns; ``path`` is a causal language model or a sequence classifier."""
    loss: Kind = "scaled"
    """Scaled is the best of the three in HelpSteer2-Preference, table 3."""
    batch_size: int = 64
    """Pairs of an optimizer step. 64: HelpSteer2-Preference."""
    validate_every: int = 20
    """Optimizer steps between two measurements on the validation split; 0 measures only at the end."""


class Cast(Protocol):
    """Roles of this algorithm."""

    reward: roles.TrainedReward


@dataclass(frozen=True)
class Material:
    """Pairs to learn from and pairs to be judged by."""

    train: Pairs
    validation: Pairs


def prepare(config: Config, source: PreferenceData, renderer: Renderer) -> tuple[Material, dict[str, int]]:
    """Pairs of both splits, and what became of their rows."""
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    train_pairs, counts = data.helpsteer.pairs(source.train, renderer, *limits)
    validation, others = data.helpsteer.pairs(source.validation, renderer, *limits)
    return Material(train_pairs, validation), counts | {f"validation_{name}": n for name, n in others.items()}


def loss(*, score_B: Tensor, strength_B: Tensor, mask_BT: Tensor, kind: Kind) -> roles.Loss:
    """The chosen loss over adjacent (chosen, rejected) rows, with accuracy and mean margin d."""
    difference_P, strength_P = score_B[0::2] - score_B[1::2], strength_B[0::2]
    match kind:
        case "bt":
            loss_P = ops.losses.bradley_terry(difference_P)
        case "margin":
            loss_P = ops.losses.margin_bradley_terry(difference_P, strength_P)
        case "scaled":
            loss_P = ops.losses.scaled_bradley_terry(difference_P, strength_P)
    count = mask_BT.new_tensor(len(loss_P), dtype=loss_P.dtype)
    right = (difference_P > 0).to(loss_P.dtype).sum()
    return roles.Loss(loss_P.sum(), count, {"accuracy": (right, count), "margin": (difference_P.sum(), count)})


def validate(pairs: Pairs, cast: Cast) -> dict[str, float]:
    """Accuracy (ties count as wrong), mean margin and calibration on held-out pairs."""
    score_B = cast.reward.score(pairs.sequences).result()
    measured = ops.preferences.summary(score_B[0::2] - score_B[1::2])
    return {f"validation/{name}": value for name, value in measured.items()}


def train(config: Config, material: Material, cast: Cast, run: Run) -> None:
    """Visit the pairs in seeded order."""
    order = data.prompts.Order(len(material.train), config.batch_size, config.run.seed)
    for step in run.steps():
        batch = material.train.select(order.indices(step)).batch()
        metrics = cast.reward.update(batch, partial(loss, kind=config.loss)).result()
        due = step == config.run.steps or (config.validate_every and step % config.validate_every == 0)
        run.log(step, metrics | (validate(material.validation, cast) if due else {}))
    cast.reward.export(run.final).result()
