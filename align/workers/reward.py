"""Reward roles: frozen scorers, and a reward model in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from align.config import RewardConfig, RoleConfig, TrainedRewardConfig
from align.data import chat, collate
from align.data.attributes import resolve_attributes
from align.data.chat import Dialogue
from align.data.conversations import ConversationIndex
from align.engines import optimizer_state
from align.engines.deepspeed import Engine
from align.errors import DivergedError
from align.models import exported_files, heads, load, readme
from align.rewards import scorers
from align.rewards.base import MEAN_METRICS
from align.roles import Future, Metrics
from align.types import Record, Sequences
from align.workers.base import Role, TrainedRole, TrainedWorker, Worker, WorkerGroup, merged, worker_method


@dataclass(frozen=True)
class RankScores(Record):
    """Scores of one rank."""

    score_B: Tensor
    metrics: Mapping[str, float]
    """See `align.rewards.base.RewardScorer.metrics`."""


class RewardWorker(Worker):
    """One rank of a frozen reward role; see `align.rewards.base.RewardScorer`."""

    stateless = True

    def _prepare(self) -> None:
        optimizer_state.seed_generators(self.spec.seed)
        self.scorer = scorers.build_scorer(self.spec.section, self.device, self.spec.seed)

    @worker_method
    def score(self, sequences: Sequences) -> RankScores:
        """Scores of token ids."""
        return RankScores(self.scorer.score_ids(sequences), self.scorer.metrics())

    @worker_method
    def score_dialogues(
        self, dialogues: Sequence[Dialogue], ids: Sequence[Sequence[int]] | None, groups: Sequence[int]
    ) -> RankScores:
        """Scores of conversations; see `align.rewards.base.RewardScorer.score`."""
        return RankScores(self.scorer.score(dialogues, ids, groups), self.scorer.metrics())

    @worker_method
    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> Tensor:
        """The attributes ``names`` of conversations, (B, A), in the order of ``names``."""
        _, attribute_BA = self.scorer.score_attributes(dialogues)
        return attribute_BA[:, [self.scorer.attribute_names.index(name) for name in names]]


class TrainedRewardWorker(TrainedWorker):
    """A reward model in training."""

    def load(self) -> None:
        section, spec = self.spec.section, self.spec
        assert isinstance(section, TrainedRewardConfig)
        num_labels, combine = load.start_of(section)
        size = chat.vocab_size(self.tokenizer)
        self.model = load.scorer(section, size, spec.seed, head=section.head, num_labels=num_labels, combine=combine)
        config, names = self.model.config, resolve_attributes(section.attributes)
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

    @worker_method
    def score(self, sequences: Sequences) -> RankScores:
        """Scores of token ids."""
        return RankScores(self.engine.infer(sequences)["score_B"], {})

    @worker_method
    def attributes(self, sequences: Sequences) -> Tensor:
        """Attributes, (B, A)."""
        return self.engine.infer(sequences)["attribute_BA"]


class Reward(Role):
    """The driver's side of `RewardWorker`.

    A score that is not finite stops the run, or with ``failed: drop`` is kept for the algorithm to drop its prompt; it
    is never replaced by a number.
    """

    worker = RewardWorker
    phase = "score"

    def __init__(self, ranks: WorkerGroup, section: RoleConfig):
        super().__init__(ranks, section)
        self._conversations: ConversationIndex | None = None
        self._counts: Counter[str] = Counter()
        self._sums: dict[str, tuple[float, int]] = {}  # of metrics that are means: weighted sum, responses

    def read_text(self, conversations: ConversationIndex) -> None:
        """Switch this role to scoring decoded text."""
        self._conversations = conversations

    def score(self, sequences: Sequences) -> Future[Tensor]:
        if self._conversations is not None:
            dialogues = self._conversations.dialogues(sequences)
            return self._score_text(dialogues, sequences.prompt_B.tolist(), sequences.responses.lists())
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        return self.ranks.call(self.phase, RewardWorker.score, arguments, lambda parts: self._gather(parts, rows))

    def score_dialogues(self, dialogues: Sequence[Dialogue], groups: Sequence[int] | None = None) -> Future[Tensor]:
        """Scores of conversations given as text, (B,). See `align.rewards.base.RewardScorer.score` for ``groups``."""
        return self._score_text(dialogues, _context_groups(dialogues) if groups is None else groups, None)

    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> Future[Tensor]:
        rows = _split(dialogues, _context_groups(dialogues), self.ranks.world_size)
        arguments = [([dialogues[i] for i in index.tolist()], names) for index in rows]
        gather = lambda parts: self._require_finite(merged(parts, rows))  # noqa: E731
        return self.ranks.call(self.phase, RewardWorker.rate, arguments, gather)

    def _score_text(
        self, dialogues: Sequence[Dialogue], groups: Sequence[int], ids: Sequence[Sequence[int]] | None
    ) -> Future[Tensor]:
        rows = _split(dialogues, groups, self.ranks.world_size)
        arguments = [
            (
                [dialogues[i] for i in index],
                None if ids is None else [ids[i] for i in index],
                [groups[i] for i in index],
            )
            for index in map(Tensor.tolist, rows)
        ]
        gather = lambda parts: self._gather(parts, rows)  # noqa: E731
        return self.ranks.call(self.phase, RewardWorker.score_dialogues, arguments, gather)

    def _gather(self, parts: Sequence[RankScores], rows: Sequence[Tensor]) -> Tensor:
        for part in parts:
            for name, value in part.metrics.items():
                if name.startswith(MEAN_METRICS):
                    total, count = self._sums.get(name, (0.0, 0))
                    self._sums[name] = total + value * len(part.score_B), count + len(part.score_B)
                else:
                    self._counts[name] += value  # type: ignore[assignment]
        return self._require_finite(merged([part.score_B for part in parts], rows))

    def _require_finite(self, score_B: Tensor) -> Tensor:
        """Raise `DivergedError` for scores or attributes that are not finite, unless their prompts are dropped."""
        bad = (~torch.isfinite(score_B).reshape(len(score_B), -1).all(1)).nonzero().squeeze(1).tolist()
        if bad and not (isinstance(self.section, RewardConfig) and self.section.failed == "drop"):
            raise DivergedError(
                f"the reward model gave {len(bad)} of {len(score_B)} sequences no finite score, first sequence "
                f"{bad[0]}",
                remedy="check the checkpoint's dtype, and that it reads the same tokens as the policy; "
                "reward.failed=drop leaves such prompts out",
            )
        return score_B

    def drain(self) -> Metrics:
        """See `align.roles.Counting`: counts of all ranks, and means over responses. Counts of a service depend on the
        moment and get the prefix ``service/``."""
        metrics = dict(self._counts) | {name: total / count for name, (total, count) in self._sums.items() if count}
        self._counts, self._sums = Counter(), {}
        remote = isinstance(self.section, RewardConfig) and self.section.remote
        return {f"service/{name}": value for name, value in metrics.items()} if remote else metrics


class EvalReward(Reward):
    """The reward role that training does not use."""

    phase = "eval_score"


class TrainedReward(TrainedRole, Reward):
    """The driver's side of `TrainedRewardWorker`."""

    worker = TrainedRewardWorker

    def attributes(self, sequences: Sequences) -> Future[Tensor]:
        rows = collate.split(sequences, 1, self.ranks.world_size)
        arguments = [(sequences.select(index),) for index in rows]
        gather = lambda parts: self._require_finite(merged(parts, rows))  # noqa: E731
        return self.ranks.call(self.phase, TrainedRewardWorker.attributes, arguments, gather)


def _context_groups(dialogues: Sequence[Dialogue]) -> list[int]:
    """A number for each dialogue, the same for neighbors of one context."""
    new = (i > 0 and dialogue.context != dialogues[i - 1].context for i, dialogue in enumerate(dialogues))
    return list(accumulate(new))


def _split(dialogues: Sequence[Dialogue], groups: Sequence[int], num_ranks: int) -> list[Tensor]:
    """Indices of the dialogues of each rank, balanced by characters; groups stay whole."""
    starts = [i for i in range(1, len(dialogues)) if groups[i] != groups[i - 1]]
    sizes = [len(item.response) + sum(len(turn.content) for turn in item.context) for item in dialogues]
    return collate.balanced([0, *starts], sizes, num_ranks)
