"""Supervised fine-tuning on demonstrations.

    L = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

over the response tokens of an optimizer step, end-of-turn token included; prompts are not learned.
HelpSteer3-Preference gives either the preferred response of each row or both.

Left out: packing several conversations into one row (the packed layout needs none), and learning from earlier assistant
turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from align import data, ops, roles, sections

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.helpsteer import PreferenceData
    from align.run import Run
    from align.types import Sequences


@dataclass(frozen=True)
class Config(sections.Recipe):
    """Recipe of supervised fine-tuning."""

    policy: sections.Policy = field(default_factory=sections.Policy)
    """The model that learns."""
    batch_size: int = 128
    """Demonstrations of an optimizer step. 128: HelpSteer2's first stage of SFT (arXiv 2406.08673)."""
    responses: Literal["preferred", "all"] = "preferred"
    """Imitate the preferred response of each row, or both."""


class Cast(Protocol):
    """Roles of this algorithm."""

    policy: roles.Policy


def prepare(config: Config, source: PreferenceData, renderer: Renderer) -> tuple[Sequences, dict[str, int]]:
    """Demonstrations of the training split, and what became of its rows."""
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return data.helpsteer.demonstrations(source.train, renderer, config.responses, *limits)


def loss(*, logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor) -> roles.Loss:
    """Cross-entropy, with the mean entropy of the model's predictions."""
    total, count = ops.losses.cross_entropy(logprob_BT, mask_BT)
    entropy = ops.logprobs.masked_sum(entropy_BT, mask_BT).sum()
    return roles.Loss(total, count, {"entropy": (entropy, count)})


def train(config: Config, demonstrations: Sequences, cast: Cast, run: Run) -> None:
    """Visit the demonstrations in seeded order."""
    order = data.prompts.Order(len(demonstrations), config.batch_size, config.run.seed)
    for step in run.steps():
        batch = demonstrations.select(order.indices(step)).batch()
        metrics = cast.policy.update(batch, loss).result()
        run.log(step, metrics)
    cast.policy.export(run.final).result()
