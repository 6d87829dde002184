"""The critic: a value function in training."""

from __future__ import annotations

from torch import Tensor

from align.data import collate
from align.engines.deepspeed import Engine, assign
from align.models import heads, load
from align.roles import Future
from align.sections import Critic as CriticSection
from align.types import Sequences
from align.workers.base import TrainedRole, TrainedWorker, answered, merged


class CriticWorker(TrainedWorker):
    """A model that gives the state before each response token a value."""

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, CriticSection)
        fresh = section.head == "new"
        from_row = not fresh and load.reward_kind(section, section.kind) == "lm_head_row0"
        self.model = load.scorer(section, len(self.tokenizer), spec.seed, new_head=fresh or from_row)
        if from_row:
            assign(self.model.get_parameter("score.weight"), load.row_zero(section)[None])
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self._make_trainable(self.model, task="SEQ_CLS")
        self.engine = Engine(heads.TokenValues(self.model), section, self.device, spec.total_steps)

    @answered
    def values(self, sequences: Sequences) -> Tensor:
        """Values of this rank's sequences, (B, T)."""
        return self.engine.infer(sequences)["value_BT"]


class Critic(TrainedRole):
    """The driver's side of `CriticWorker`."""

    worker = CriticWorker
    update_phase = "critic_update"

    def values(self, sequences: Sequences) -> Future[Tensor]:
        """See `align.roles.Critic`."""
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        return self.ranks.call("values", CriticWorker.values, arguments, lambda parts: merged(parts, rows))
