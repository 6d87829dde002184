"""Reward roles: frozen models and other judges that score, and a model in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from align.config import ModelConfig, RewardConfig, TrainedRewardConfig
from align.data import chat, collate
from align.data.attributes import resolve
from align.data.chat import Dialogue
from align.data.conversations import Conversations
from align.engines import optimizer_state
from align.engines.deepspeed import Engine
from align.errors import DivergedError
from align.models import exported_files, heads, load, readme
from align.rewards import scorers
from align.rewards.functions import FunctionJudge
from align.rewards.genrm import GenerativeJudge
from align.rewards.scorers import EnsembleJudge, ModelJudge
from align.roles import Future, Metrics
from align.types import Record, Sequences
from align.workers.base import Ranks, Role, TrainedRole, TrainedWorker, Worker, answered, merged


@dataclass(frozen=True)
class Scored(Record):
    """What a rank says of its sequences."""

    score_B: Tensor
    metrics: Mapping[str, float]
    """See `align.rewards.scorers.Judge.metrics`."""


class RewardWorker(Worker):
    """A judge that gives a response one number."""

    stateless = True

    def _prepare(self) -> None:
        section = self.spec.section
        assert isinstance(section, RewardConfig)
        optimizer_state.seed_generators(self.spec.seed)
        self.judge = scorers.open_judge(section, self.device, self.spec.seed)

    @answered
    def score(self, sequences: Sequences) -> Scored:
        """Scores of this rank's sequences, which a model reads as they are."""
        assert isinstance(self.judge, (ModelJudge, EnsembleJudge))
        return Scored(self.judge.score_ids(sequences), self.judge.metrics())

    @answered
    def score_dialogues(
        self, dialogues: Sequence[Dialogue], ids: Sequence[Sequence[int]] | None, groups: Sequence[int]
    ) -> Scored:
        """Scores of this rank's conversations; ``ids`` are those of the responses, where there are any, and ``groups``
        say which belong to one prompt."""
        if isinstance(self.judge, GenerativeJudge):
            return Scored(self.judge.score(dialogues, groups), self.judge.metrics())
        if isinstance(self.judge, FunctionJudge):
            return Scored(self.judge.score(dialogues, ids), self.judge.metrics())
        return Scored(self.judge.score(dialogues), self.judge.metrics())

    @answered
    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> Tensor:
        """The attributes ``names`` of this rank's conversations, whatever the order of the head's outputs, (B, A)."""
        assert isinstance(self.judge, ModelJudge)
        return self.judge.attributes(dialogues)[:, [self.judge.names.index(name) for name in names]]


class TrainedRewardWorker(TrainedWorker):
    """A reward model in training."""

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, TrainedRewardConfig)
        num_labels, combine = load.start_of(section)
        size = chat.vocab_size(self.tokenizer)
        self.model = load.scorer(section, size, spec.seed, head=section.head, num_labels=num_labels, combine=combine)
        config, names = self.model.config, resolve(section.attributes)
        if spec.exported is not None:
            spec.exported.chat.set_template(self.tokenizer)
            exported_files.set_padding(self.tokenizer, config, spec.exported.chat)
        if names:
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        self._make_trainable(self.model, task="SEQ_CLS")
        head = heads.LastTokenAttributes(self.model) if names else heads.LastTokenScore(self.model)
        self.engine = Engine(head, section, self.device, spec.total_steps)

    def _readme(self) -> dict[str, str]:
        exported, section = self.spec.exported, self.spec.section
        if exported is None:
            return {}
        assert isinstance(section, TrainedRewardConfig)
        pads = self.model.config.get_text_config().pad_token_id is not None
        form = pads, bool(section.attributes), section.trust_remote_code
        return {readme.NAME: readme.reward(self._origin(exported), exported.chat, self.tokenizer, *form)}

    @answered
    def score(self, sequences: Sequences) -> Scored:
        """Scores of this rank's sequences."""
        return Scored(self.engine.infer(sequences)["score_B"], {})

    @answered
    def attributes(self, sequences: Sequences) -> Tensor:
        """Attributes of this rank's sequences, (B, A)."""
        return self.engine.infer(sequences)["attribute_BA"]


class Reward(Role):
    """The driver's side of `RewardWorker`.

    A score that is not finite stops the run, or stays as it is for the algorithm to drop (``failed: drop``); it is
    never replaced by a number.
    """

    worker = RewardWorker
    phase = "score"

    def __init__(self, ranks: Ranks, section: ModelConfig):
        super().__init__(ranks, section)
        self._conversations: Conversations | None = None
        self._counts: dict[str, float] = {}
        self._averaged: dict[str, tuple[float, int]] = {}  # sums, and of how many responses

    def read_text(self, conversations: Conversations) -> None:
        """From now on, score what was said instead of the policy's token ids."""
        self._conversations = conversations

    def score(self, sequences: Sequences) -> Future[Tensor]:
        """See `align.roles.Reward`."""
        if self._conversations is not None:
            dialogues = self._conversations.dialogues(sequences)
            return self._score_text(dialogues, sequences.prompt_B.tolist(), sequences.responses.lists())
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        return self.ranks.call(self.phase, RewardWorker.score, arguments, lambda parts: self._gathered(parts, rows))

    def score_dialogues(self, dialogues: Sequence[Dialogue], groups: Sequence[int] | None = None) -> Future[Tensor]:
        """Scores of conversations given as text, (B,). Neighbours with one number in ``groups`` are responses that a
        judge may compare, and no others have it; without numbers, those of one context."""
        return self._score_text(dialogues, _by_context(dialogues) if groups is None else groups, None)

    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> Future[Tensor]:
        """See `align.roles.Reward`."""
        rows = _shares(dialogues, _by_context(dialogues), self.ranks.world_size)
        arguments = [([dialogues[i] for i in index.tolist()], names) for index in rows]
        return self.ranks.call(
            self.phase, RewardWorker.rate, arguments, lambda parts: self._passed(merged(parts, rows))
        )

    def _score_text(
        self, dialogues: Sequence[Dialogue], groups: Sequence[int], ids: Sequence[Sequence[int]] | None
    ) -> Future[Tensor]:
        rows = _shares(dialogues, groups, self.ranks.world_size)
        arguments = [
            (
                [dialogues[i] for i in index],
                None if ids is None else [ids[i] for i in index],
                [groups[i] for i in index],
            )
            for index in map(Tensor.tolist, rows)
        ]
        return self.ranks.call(
            self.phase, RewardWorker.score_dialogues, arguments, lambda parts: self._gathered(parts, rows)
        )

    def _gathered(self, parts: Sequence[Scored], rows: Sequence[Tensor]) -> Tensor:
        for part in parts:
            for name, value in part.metrics.items():
                if name.startswith(scorers.AVERAGED):
                    total, count = self._averaged.get(name, (0.0, 0))
                    self._averaged[name] = total + value * len(part.score_B), count + len(part.score_B)
                else:
                    self._counts[name] = self._counts.get(name, 0.0) + value
        score_B = merged([part.score_B for part in parts], rows)
        return self._passed(score_B)

    def _passed(self, score: Tensor) -> Tensor:
        """Scores or attributes that a run may go on with."""
        dropped = isinstance(self.section, RewardConfig) and self.section.failed == "drop"
        return score if dropped else _finite(score)

    def drain(self) -> Metrics:
        """See `align.roles.Counting`: counts of all ranks, and means over responses. Those of a service depend on the
        moment, and have names that say so."""
        means = {name: total / count for name, (total, count) in self._averaged.items() if count}
        found = self._counts | means
        self._counts, self._averaged = {}, {}
        service = isinstance(self.section, RewardConfig) and self.section.remote
        return {f"service/{name}": value for name, value in found.items()} if service else found


class SecondReward(Reward):
    """A second opinion."""

    phase = "second_score"


class TrainedReward(TrainedRole, Reward):
    """The driver's side of `TrainedRewardWorker`."""

    worker = TrainedRewardWorker

    def attributes(self, sequences: Sequences) -> Future[Tensor]:
        """See `align.roles.TrainedReward`."""
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        gather = lambda parts: _finite(merged(parts, rows))  # noqa: E731
        return self.ranks.call(self.phase, TrainedRewardWorker.attributes, arguments, gather)


def _by_context(dialogues: Sequence[Dialogue]) -> list[int]:
    """A number for each dialogue, the same for neighbours of one context."""
    return list(accumulate(i > 0 and one.context != dialogues[i - 1].context for i, one in enumerate(dialogues)))


def _shares(dialogues: Sequence[Dialogue], groups: Sequence[int], num_ranks: int) -> list[Tensor]:
    """Numbers of the dialogues of each rank; those of one group stay together."""
    new = [i for i in range(1, len(dialogues)) if groups[i] != groups[i - 1]]
    sizes = [len(one.response) + sum(len(turn.content) for turn in one.context) for one in dialogues]
    return collate.balanced([0, *new], sizes, num_ranks)


def _finite(score_B: Tensor) -> Tensor:
    bad = (~torch.isfinite(score_B).reshape(len(score_B), -1).all(1)).nonzero().squeeze(1).tolist()
    if bad:
        raise DivergedError(
            f"the reward model gave {len(bad)} of {len(score_B)} sequences no finite score, first sequence {bad[0]}",
            remedy="check the checkpoint's dtype, and that it reads the same tokens as the policy; reward.failed=drop "
            "leaves such prompts out",
        )
    return score_B
