"""Judges of responses: reward checkpoints by kind, ensembles of them, services and functions, behind one method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from align import ops
from align.config import RewardConfig
from align.data import chat
from align.data.chat import Dialogue
from align.engines.deepspeed import Engine, sharded_loading
from align.errors import ConversationError
from align.models import heads, load
from align.models.positions import positions
from align.rewards import checkpoint_format, texts
from align.rewards.checkpoint_format import Reading
from align.rewards.functions import FunctionJudge
from align.rewards.genrm import GenerativeJudge
from align.rewards.http import HttpJudge
from align.types import Sequences

AVERAGED = ("latency", "disagreement", "order_consistency")
"""How metrics begin that are means; all others are counts, which add up."""


class Judge(Protocol):
    """Whatever gives responses a score."""

    def score(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """A score of each response, (B,) float32 on the CPU; NaN where there is none."""
        ...

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call; see `AVERAGED`."""
        ...


class ModelJudge:
    """A reward checkpoint that is read by its kind."""

    def __init__(self, section: RewardConfig, read: Reading, device: torch.device, seed: int):
        """Raises `ModelError` for a checkpoint that is not of its kind: no head is ever made up."""
        self.section, self.reading = section, read
        self.names = read.names
        """Of the head's outputs; none for one score."""
        self.tokenizer = chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
        with sharded_loading(section):
            head = self._head(seed)
        self.engine = Engine(head, section, device, total_steps=0)

    def _head(self, seed: int) -> heads.Head:
        section, size = self.section, chat.vocab_size(self.tokenizer)
        match self.reading.kind:
            case "lm_head_row0":
                return heads.RowZeroLogit(load.causal_lm(section, size, seed))
            case "yes_no":
                yes, no = texts.yes_and_no(self.tokenizer)
                return heads.LogitDifference(load.causal_lm(section, size, seed), yes, no)
            case "attributes":
                model = load.scorer(section, size, seed, head="trained", num_labels=len(self.names))
                return heads.LastTokenAttributes(model)
            case _:
                return heads.LastTokenScore(load.scorer(section, size, seed, head="trained"))

    @cached_property
    def text(self) -> texts.Text:
        """How it reads conversations."""
        return texts.Text(self.tokenizer, self.reading, self.section)

    def score(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """See `Judge`."""
        return self._score(self._infer(dialogues))

    def score_ids(self, sequences: Sequences) -> Tensor:
        """Scores of conversations as ids of this model's tokenizer, in the order that they come in."""
        return self._score(self.engine.infer(sequences))

    def attributes(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """All outputs of the head, (B, A), in the order of ``names``; A is 0 for a checkpoint with one score."""
        if not self.names:
            return torch.zeros(len(dialogues), 0)
        return self._infer(dialogues)["attribute_BA"]

    def goodness(self, attribute_BA: Tensor) -> Tensor:
        """Scores of `attributes`, by their weights."""
        return self._normalized(ops.ratings.goodness(attribute_BA, torch.tensor(self.reading.weights)))

    def metrics(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def _infer(self, dialogues: Sequence[Dialogue]) -> dict[str, Tensor]:
        """Outputs of the head in the order of ``dialogues``."""
        sequences, dialogue_B = self.text.sequences(dialogues)
        self._require_positions(sequences)
        outputs = self.engine.infer(sequences)
        back_B = dialogue_B.argsort()
        return {name: value[back_B] for name, value in outputs.items()}

    def _require_positions(self, sequences: Sequences) -> None:
        """Text comes from anywhere and may have any length. Ids are those of a run, which has limits of its own."""
        longest = int(sequences.tokens_B().max()) if len(sequences) else 0
        limit = positions(self.engine.head.model.config)
        if limit is not None and longest > limit[0]:
            message = f"a conversation has {longest} tokens, the reward model has positions for {limit[0]}"
            raise ConversationError(
                message,
                public=message,
                where=self.section.path,
                remedy="leave it out, or shorten it: in a run, data.max_prompt_tokens and sampling.max_tokens",
            )

    def _score(self, outputs: dict[str, Tensor]) -> Tensor:
        if self.names:
            return self.goodness(outputs["attribute_BA"])
        return self._normalized(outputs["score_B"])

    def _normalized(self, score_B: Tensor) -> Tensor:
        moments = self.reading.moments
        return score_B if moments is None else (score_B - moments.mean) / moments.std


class EnsembleJudge:
    """Several checkpoints that judge together."""

    names: tuple[str, ...] = ()

    def __init__(self, judges: Sequence[ModelJudge], section: RewardConfig):
        self.judges, self.section = judges, section.ensemble
        self._disagreements: list[Tensor] = []

    def score(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """See `Judge`."""
        return self._combined([one.score(dialogues) for one in self.judges])

    def score_ids(self, sequences: Sequences) -> Tensor:
        """Scores of conversations as ids that all members share."""
        return self._combined([one.score_ids(sequences) for one in self.judges])

    def attributes(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """None: members may have different ones."""
        return torch.zeros(len(dialogues), 0)

    def metrics(self) -> dict[str, float]:
        """``disagreement``: mean over responses of the standard deviation over members, where all gave a number."""
        found, self._disagreements = self._disagreements, []
        spread_B = torch.cat([*found, torch.zeros(0)])
        return {"disagreement": float(spread_B.double().mean())} if len(spread_B) else {}

    def _combined(self, scores: list[Tensor]) -> Tensor:
        score_MB = torch.stack(scores)
        spread_B = ops.rewards.spread(score_MB)
        self._disagreements.append(spread_B[spread_B.isfinite()])
        return ops.rewards.combined(score_MB, self.section.combine, self.section.penalty)


def open_judge(
    section: RewardConfig, device: torch.device, seed: int = 0
) -> ModelJudge | EnsembleJudge | GenerativeJudge | HttpJudge | FunctionJudge:
    """The judge that a section names, ready to score. ``seed`` matters to random weights (``init``) and to the words of
    a judge that writes.

    Raises `ModelError`, `ConfigError` or `DataError`, each with a remedy.
    """
    if section.kind == "generative":
        return GenerativeJudge(section.generative, device, seed)
    if section.kind == "http":
        return HttpJudge(section.http, section.failed)
    if section.kind == "function":
        return FunctionJudge(section.function)
    judges = [
        ModelJudge(one, read, device, seed)
        for one, read in zip(checkpoint_format.members(section), checkpoint_format.read(section), strict=True)
    ]
    return judges[0] if len(judges) == 1 else EnsembleJudge(judges, section)
