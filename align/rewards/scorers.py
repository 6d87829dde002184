"""Scorers of reward checkpoints and of ensembles, and the table of all kinds of scorers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from align import ops
from align.config import CheckpointRewardConfig, EnsembleRewardConfig, ModelConfig, RewardConfig, RoleConfig
from align.data import chat
from align.data.chat import Dialogue, Renderer
from align.engines.deepspeed import Engine, sharded_loading
from align.models import heads, identity, load, positions
from align.rewards import checkpoint_format, texts
from align.rewards.base import Groups, Ids, RewardScorer, TextInput
from align.rewards.checkpoint_format import HeadSpec
from align.rewards.functions import FunctionScorer
from align.rewards.genrm import GenerativeScorer
from align.rewards.http import HttpScorer
from align.types import Sequences


class _CheckpointScorerBase(RewardScorer):
    """Base of `CheckpointScorer` and `EnsembleScorer`."""

    wants: ClassVar[Literal["ids", "text"]] = "ids"

    @classmethod
    def check(cls, config: CheckpointRewardConfig, name: str, renderer: Renderer | None) -> TextInput | None:
        """None, to read the policy's token ids, if every member tokenizes a conversation to the same ids."""
        members = checkpoint_format.members(config)
        tokenizers = [chat.load_tokenizer(item.path, item.revision, item.trust_remote_code) for item in members]
        for member, tokenizer in zip(members, tokenizers, strict=True):
            load.check(member, chat.vocab_size(tokenizer), name)
        loaded = [*zip(members, tokenizers, checkpoint_format.head_specs(config), strict=True)]
        reasons = {}
        if renderer is not None:
            reasons = {item.path: texts.text_reason(spec, tokenizer, renderer) for item, tokenizer, spec in loaded}
            if not any(reasons.values()):
                return None
        reason = "; ".join(f"{path}: {reason}" for path, reason in reasons.items() if reason)
        renderers = tuple(texts.Text(tokenizer, spec, config).renderer for _, tokenizer, spec in loaded)
        return TextInput(reason, " ".join(item.fingerprint for item in renderers), renderers)

    @classmethod
    def fingerprint(cls, config: CheckpointRewardConfig, seed: int) -> str:
        models = [identity.model_fingerprint(member, seed) for member in checkpoint_format.members(config)]
        return models[0] if len(models) == 1 else hashlib.sha256(" ".join(models).encode()).hexdigest()


class CheckpointScorer(_CheckpointScorerBase):
    """Scores by one reward checkpoint: the output of its head at the last token of the conversation."""

    def __init__(
        self, config: CheckpointRewardConfig, device: torch.device, seed: int = 0, head_spec: HeadSpec | None = None
    ):
        """Raises `ModelError` if the checkpoint has no head of its kind; a head is never initialized at random."""
        self.config = config
        self.head_spec = head_spec or checkpoint_format.head_specs(config)[0]
        self.attribute_names = self.head_spec.names
        self.tokenizer = chat.load_tokenizer(config.path, config.revision, config.trust_remote_code)
        with sharded_loading(config):
            head = self._load_head(seed)
        self.engine = Engine(head, config, device, total_steps=0)

    def _load_head(self, seed: int) -> heads.Head:
        config, size = self.config, chat.vocab_size(self.tokenizer)
        match self.head_spec.kind:
            case "lm_head_row0":
                return heads.RowZeroLogit(load.causal_lm(config, size, seed))
            case "yes_no":
                yes, no = texts.yes_no_ids(self.tokenizer)
                return heads.LogitDifference(load.causal_lm(config, size, seed), yes, no)
            case "attributes":
                num_labels = len(self.attribute_names)
                return heads.LastTokenAttributes(load.scorer(config, size, seed, head="trained", num_labels=num_labels))
            case _:
                return heads.LastTokenScore(load.scorer(config, size, seed, head="trained"))

    @cached_property
    def text(self) -> texts.Text:
        """Renders conversations to token ids of this model."""
        return texts.Text(self.tokenizer, self.head_spec, self.config)

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        return self._score(self._infer(dialogues))

    def score_ids(self, sequences: Sequences) -> Tensor:
        return self._score(self.engine.infer(sequences))

    def score_attributes(self, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
        outputs = self._infer(dialogues)
        return self._score(outputs), outputs.get("attribute_BA", torch.zeros(len(dialogues), 0))

    def _infer(self, dialogues: Sequence[Dialogue]) -> dict[str, Tensor]:
        """Outputs of the head in the order of ``dialogues``."""
        sequences, dialogue_B = self.text.sequences(dialogues)
        # In a run, the prompt and response limits bound token ids; text may have any length.
        tokens = int(sequences.tokens_B().max()) if len(sequences) else 0
        positions.require(
            self.engine.head.model.config,
            tokens,
            self.config.path,
            subject=f"a conversation of {tokens} tokens",
            remedy="leave it out, or shorten it: in a run, data.max_prompt_tokens and sampling.max_tokens",
        )
        outputs = self.engine.infer(sequences)
        position_B = dialogue_B.argsort()
        return {name: value[position_B] for name, value in outputs.items()}

    def _score(self, outputs: dict[str, Tensor]) -> Tensor:
        if self.attribute_names:
            score_B = ops.losses.goodness(outputs["attribute_BA"], torch.tensor(self.head_spec.weights))
        else:
            score_B = outputs["score_B"]
        moments = self.head_spec.moments
        return score_B if moments is None else (score_B - moments.mean) / moments.std


class EnsembleScorer(_CheckpointScorerBase):
    """Combines the scores of several reward checkpoints. It reads token ids only if all of them can."""

    def __init__(self, config: EnsembleRewardConfig, device: torch.device, seed: int = 0):
        members = zip(checkpoint_format.members(config), checkpoint_format.head_specs(config), strict=True)
        self.config, self.members = config, [CheckpointScorer(item, device, seed, spec) for item, spec in members]
        self._spreads: list[Tensor] = []

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        return self._combine([member.score(dialogues) for member in self.members])

    def score_ids(self, sequences: Sequences) -> Tensor:
        return self._combine([member.score_ids(sequences) for member in self.members])

    def metrics(self) -> dict[str, float]:
        """``disagreement``: mean over responses of the standard deviation over members, where all scores are finite."""
        spread_B = torch.cat([*self._spreads, torch.zeros(0)])
        self._spreads = []
        return {"disagreement": float(spread_B.double().mean())} if len(spread_B) else {}

    def _combine(self, scores: list[Tensor]) -> Tensor:
        score_MB = torch.stack(scores)
        spread_B = ops.rewards.spread(score_MB)
        self._spreads.append(spread_B[spread_B.isfinite()])
        return ops.rewards.combined(score_MB, self.config.combine, self.config.penalty)


SCORERS: dict[str, type[RewardScorer]] = {
    "checkpoint": CheckpointScorer,
    "ensemble": EnsembleScorer,
    "generative": GenerativeScorer,
    "http": HttpScorer,
    "function": FunctionScorer,
}


def fingerprint(config: RoleConfig, seed: int) -> str:
    """Hash of a role's initial model; see `align.models.identity.model_fingerprint` and `RewardScorer.fingerprint`."""
    if isinstance(config, RewardConfig):
        return scorer_class(config).fingerprint(config, seed)
    assert isinstance(config, ModelConfig)
    return identity.model_fingerprint(config, seed)


def scorer_class(config: Any) -> type[RewardScorer]:
    """The scorer class of a reward section."""
    return SCORERS[config.kind]


def build_scorer(config: Any, device: torch.device, seed: int = 0) -> RewardScorer:
    """The scorer of a reward section, ready to score. Raises `ModelError`, `ConfigError` or `DataError` with a
    remedy."""
    return scorer_class(config)(config, device, seed)
