"""Reward models: frozen ones that score, and one in training."""

from __future__ import annotations

import torch
from torch import Tensor

from align.data import collate
from align.engines.deepspeed import Engine
from align.errors import DivergedError
from align.models import heads, load
from align.roles import Future
from align.sections import Reward as RewardSection
from align.sections import TrainedReward as TrainedRewardSection
from align.types import Sequences
from align.workers.base import Role, TrainedRole, TrainedWorker, Worker, answered, merged


class RewardWorker(Worker):
    """A model that gives a sequence one number."""

    stateless = True

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, RewardSection)
        if load.reward_kind(section, section.kind) == "lm_head_row0":
            self.model = load.causal_lm(section, len(self.tokenizer), spec.seed)
            head = heads.RowZeroLogit(self.model)
        else:
            self.model = load.scorer(section, len(self.tokenizer), spec.seed, new_head=False)
            head = heads.LastTokenScore(self.model)
        self.engine = Engine(head, section, self.device, spec.total_steps)

    @answered
    def score(self, sequences: Sequences) -> Tensor:
        """Scores of this rank's sequences, (B,)."""
        return self.engine.infer(sequences)["score_B"]


class TrainedRewardWorker(TrainedWorker, RewardWorker):
    """A reward model in training."""

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, TrainedRewardSection)
        self.model = load.scorer(section, len(self.tokenizer), spec.seed, new_head=True)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self._make_trainable(self.model, task="SEQ_CLS")
        self.engine = Engine(heads.LastTokenScore(self.model), section, self.device, spec.total_steps)


class Reward(Role):
    """The driver's side of `RewardWorker`."""

    worker = RewardWorker
    phase = "score"

    def score(self, sequences: Sequences) -> Future[Tensor]:
        """See `align.roles.Reward`. A score that is not finite stops the run, or stays as it is for the algorithm to
        drop (``failed: drop``); it is never replaced by a number."""
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        passed = isinstance(self.section, RewardSection) and self.section.failed == "drop"
        whole = (lambda parts: merged(parts, rows)) if passed else (lambda parts: _finite(merged(parts, rows)))
        return self.ranks.call(self.phase, RewardWorker.score, arguments, whole)


class SecondReward(Reward):
    """A second opinion."""

    phase = "second_score"


class TrainedReward(TrainedRole, Reward):
    """The driver's side of `TrainedRewardWorker`."""

    worker = TrainedRewardWorker


def _finite(score_B: Tensor) -> Tensor:
    bad = (~torch.isfinite(score_B)).nonzero().squeeze(1).tolist()
    if bad:
        raise DivergedError(
            f"the reward model gave {len(bad)} of {len(score_B)} sequences no finite score, first sequence {bad[0]}",
            remedy="check the checkpoint's dtype, and that it reads the same tokens as the policy",
        )
    return score_B
