"""The critic: a value function in training."""

from __future__ import annotations

from torch import Tensor

from align.config import CriticConfig
from align.data import chat, collate
from align.engines.deepspeed import Engine, assign
from align.models import heads, load
from align.rewards import checkpoint_format
from align.roles import Future
from align.types import Sequences
from align.workers.base import TrainedRole, TrainedWorker, merged, worker_method


class CriticWorker(TrainedWorker):
    """A value model: it estimates the value of the state before each response token."""

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, CriticConfig)
        start = None if section.head == "new" else checkpoint_format.critic_start(section)
        size, from_row = chat.vocab_size(self.tokenizer), start is not None and start.kind == "lm_head_row0"
        if start is None:
            self.model = load.scorer(section, size, spec.seed, head="new" if len(load.labels(section)) > 1 else "auto")
        elif from_row:
            self.model = load.scorer(section, size, spec.seed, head="auto")
        else:
            self.model = load.scorer(section, size, spec.seed, head="trained", combine=start.weights or None)
        if from_row:
            assign(self.model.get_parameter("score.weight"), load.row_zero(section)[None])
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self._make_trainable(self.model, task="SEQ_CLS")
        self.engine = Engine(heads.TokenValues(self.model), section, self.device, spec.total_steps)

    @worker_method
    def values(self, sequences: Sequences) -> Tensor:
        """Values of this rank's sequences, (B, T)."""
        return self.engine.infer(sequences)["value_BT"]


class Critic(TrainedRole):
    """The driver's side of `CriticWorker`."""

    worker = CriticWorker
    update_phase = "critic_update"

    def values(self, sequences: Sequences) -> Future[Tensor]:
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        return self.ranks.call("values", CriticWorker.values, arguments, lambda parts: merged(parts, rows))
