"""`RewardScorer`: the interface of everything that scores responses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from align.data.chat import Dialogue

if TYPE_CHECKING:
    from align.data.chat import Renderer
    from align.types import Sequences

Ids = Sequence[Sequence[int]] | None
Groups = Sequence[int] | None
MEAN_METRICS = ("latency", "disagreement", "order_consistency")
"""Prefixes of metrics that are averaged over ranks, weighted by responses; all other metrics are counts and add up."""


@dataclass(frozen=True)
class TextInput:
    """Why a scorer reads the text of conversations instead of the policy's token ids, and how it renders them."""

    reason: str
    """Printed when a run starts: a reason, or the source that is scored by."""
    renderers: str = ""
    """Fingerprints of the templates that conversations are rendered with; empty if there is no model."""
    templates: tuple[Renderer, ...] = ()
    """Renderers that must be able to render every row of the data."""


class RewardScorer(Protocol):
    """Gives each response a number: a checkpoint, an ensemble, a service, a function, a generative reward model.

    To add a kind of reward, write (1) its configuration in `align/config/rewards.py`, (2) a subclass of this protocol
    in a file of `align/rewards/`, and (3) an entry in `align.rewards.scorers.SCORERS`. The role's workers, the checks
    before a run, resume and the reward service work through this interface only.

    Instances live in the processes of the reward role, one on each rank. The class methods are called by the driver
    before anything starts; they must not load weights or contact a server.
    """

    wants: ClassVar[Literal["ids", "text"]] = "text"
    """``text``: `score` is called with decoded conversations. ``ids``: `score_ids` is called with the policy's token
    ids unless `check` returns a `TextInput`; `score` must work as well, for evaluations and the reward service."""
    attribute_names: tuple[str, ...] = ()
    """Outputs of a head with several; empty for a scorer with one number."""

    def __init__(self, config: Any, device: torch.device, seed: int = 0):
        """``config`` is the recipe's reward section. ``seed`` feeds random weights (``init``) and sampled verdicts.

        Raises `ModelError`, `ConfigError` or `DataError` with a remedy.
        """
        ...

    @classmethod
    def check(cls, config: Any, name: str, renderer: Renderer | None) -> TextInput | None:
        """Check everything that the scorer needs.

        ``name`` is the section's key for messages; ``renderer`` is the policy's tokenizer and template, None without
        a policy. A `TextInput` makes a scorer that `wants` ids read text, and names the templates that render it.
        Raises `AlignError` with a remedy.
        """
        return None

    @classmethod
    def fingerprint(cls, config: Any, seed: int) -> str:
        """Hash of what scores depend on beside the recipe: weights, source code. A run resumes only if it is equal."""
        return hashlib.sha256(config.kind.encode()).hexdigest()

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        """Scores of conversations, (B,) float32 on the CPU; NaN where there is no score.

        ``completion_ids`` are the token ids of the responses, if the policy sampled them. ``groups`` has a number for
        each response: neighbors with the same number answer one prompt and may be compared with each other. Without
        it, neighbors with the same context form a group. Groups are never split over ranks.
        """
        ...

    def score_ids(self, sequences: Sequences) -> Tensor:
        """Scores of the policy's token ids, (B,) float32 on the CPU. Only called if `wants` is ``ids``."""
        raise TypeError(f"{type(self).__name__} scores text, not token ids")

    def score_attributes(self, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        """Scores, (B,), and all outputs of the head, (B, A), in the order of `attribute_names`."""
        return self.score(dialogues), torch.zeros(len(dialogues), 0)

    def metrics(self) -> dict[str, float]:
        """Counts and means since the last call; see `MEAN_METRICS`."""
        return {}

    def close(self) -> None:
        """End threads and connections."""
