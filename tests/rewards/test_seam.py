"""A kind of reward is added by a configuration, a scorer and an entry in the table, and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from align import prepare
from align.config import RewardConfig
from align.data import chat, toy
from align.data.chat import Dialogue, Message
from align.data.conversations import ConversationIndex
from align.prechecks.roles import role_configs
from align.rewards import scorers
from align.rewards.base import Groups, Ids, RewardScorer
from align.run import Clock
from align.types import Packed, Sequences
from align.workers import local
from align.workers.base import WorkerSpec
from align.workers.reward import Reward as Role
from align.workers.reward import RewardWorker


@dataclass(frozen=True)
class WordRewardConfig(RewardConfig):
    kind: Literal["words"] = "words"

    @property
    def source(self) -> str:
        return "words"


PROMPT = (Message("user", "say the first word : cat dog"),)


class WordScorer(RewardScorer):
    """Counts words, and how often it was called."""

    attribute_names = ("words",)

    def __init__(self, config: RewardConfig, device: torch.device, seed: int = 0):
        self.calls = 0

    @classmethod
    def fingerprint(cls, config: RewardConfig, seed: int) -> str:
        return "words"

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([float(len(dialogue.response.split())) for dialogue in dialogues])

    def score_attributes(self, dialogues: Sequence[Dialogue]) -> tuple[torch.Tensor, torch.Tensor]:
        score_B = self.score(dialogues)
        return score_B, score_B[:, None]

    def metrics(self) -> dict[str, float]:
        return {"calls": float(self.calls)}


def test_a_second_implementation_is_checked_built_called_and_counted(monkeypatch: pytest.MonkeyPatch):
    config = WordRewardConfig()
    monkeypatch.setitem(scorers.SCORERS, "words", WordScorer)
    renderer = chat.Renderer(toy.tokenizer())
    recipe: Any = SimpleNamespace(rated=dict, absent=set, reward=config)
    assert list(prepare.text_inputs(recipe, role_configs(recipe), renderer)) == ["reward"]
    assert scorers.fingerprint(config, 0) == "words"

    ranks = local.start_role(RewardWorker, WorkerSpec("reward", 0, 1, config, 0, 1, 60.0), Clock())
    role = Role(ranks, config)
    role.read_text(ConversationIndex([PROMPT], renderer))
    ids = [renderer.response_ids(PROMPT, text) for text in ("cat", "cat dog")]
    prompts = Packed.from_lists([renderer.prompt_ids(PROMPT)])
    sequences = Sequences(prompts, Packed.from_lists(ids), torch.tensor([0, 0]))
    assert role.score(sequences).result().tolist() == [1.0, 2.0]
    assert role.rate([Dialogue(PROMPT, "a b c")], ["words"]).result().tolist() == [[3.0]]
    assert role.drain() == {"calls": 1.0}


def test_ids_are_refused_by_a_scorer_of_text():
    with pytest.raises(TypeError, match="WordScorer scores text"):
        WordScorer(WordRewardConfig(), torch.device("cpu")).score_ids(
            Sequences(*[Packed.from_lists([])] * 2, torch.zeros(0, dtype=torch.int64))
        )
