"""Supervised fine-tuning on demonstrations.

    L = - sum_i sum_t log pi(y_it | x_i, y_i<t) / sum_i |y_i|

over the response tokens of an optimizer step, end-of-turn token included; prompts are not learned.
What is demonstrated is answers (of HelpSteer3-Preference the preferred one of each row or both), verdicts of a judge,
feedback, or edits; see `align.data.sft_targets`.

Left out: packing several conversations into one row (the packed layout needs none), and learning from earlier assistant
turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align import data, ops
from align.config import EditingConfig, PolicyConfig, RecipeConfig, RowKind, VerdictConfig
from align.rewards import genrm_card
from align.roles import Loss, PolicyRole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.run import Run
    from align.types import Sequences


@dataclass(frozen=True)
class Config(RecipeConfig):
    """Recipe of supervised fine-tuning."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The model that learns."""
    batch_size: int = 128
    """Demonstrations of an optimizer step. 128: HelpSteer2's first stage of SFT (arXiv 2406.08673)."""
    target: Literal["responses", "genrm_verdicts", "feedback", "edits"] = "responses"
    """What the model learns to write: ``responses`` to a conversation; ``genrm_verdicts`` on two responses, with the
    annotators' reasons, as a start for ``genrm``; ``feedback`` on a response; ``edits`` of a response by feedback."""
    responses: Literal["preferred", "all"] = "preferred"
    """Imitate the preferred response of each row, or both. Only with ``target: responses``."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    """Prompt and answer format of a judge. Used with ``genrm_verdicts``."""
    editing: EditingConfig = field(default_factory=EditingConfig)
    """Prompts of feedback and edit models. Used with ``feedback`` and ``edits``."""

    def __post_init__(self) -> None:
        if self.responses == "all" and self.target != "responses":
            raise ValueError(f"responses=all requires target=responses. Got target={self.target}")

    def reads(self) -> RowKind:
        return data.sft_targets.SFT_TARGETS[self.target].reads


class SFTRoles(Protocol):
    """Roles of the algorithm."""

    policy: PolicyRole


@dataclass(frozen=True)
class SFTData:
    """What is imitated."""

    demonstrations: Sequences
    files: Mapping[str, str]
    """What the folder of a judge gets beside the model, text by name; nothing of other models."""


def load_data(config: Config, source: DataSplits[Any], renderer: Renderer) -> tuple[SFTData, dict[str, int]]:
    """Demonstrations of the training split, and row counts by outcome."""
    made, counts = data.sft_targets.SFT_TARGETS[config.target].tokenize(source.train, renderer, config)
    judges = config.target == "genrm_verdicts"
    return SFTData(made, genrm_card.files(config.verdict, config.data.date) if judges else {}), counts


def loss(*, logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor) -> Loss:
    """Cross-entropy, with the mean entropy of the model's predictions."""
    total, count = ops.losses.cross_entropy(logprob_BT, mask_BT)
    entropy = ops.logprobs.masked_sum(entropy_BT, mask_BT).sum()
    return Loss(total, count, {"entropy": (entropy, count)})


def train(config: Config, train_data: SFTData, roles: SFTRoles, run: Run) -> None:
    """Visit the demonstrations in seeded order."""
    demonstrations = train_data.demonstrations
    order = data.prompts.BatchOrder(len(demonstrations), config.batch_size, config.run.seed)
    for step in run.steps():
        batch = demonstrations.select(order.indices(step)).batch()
        metrics = roles.policy.update(batch, loss).result()
        run.log(step, metrics)
    roles.policy.export(run.final, train_data.files).result()
