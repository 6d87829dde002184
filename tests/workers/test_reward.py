"""The reward role's driver side: how text is split over ranks, and how their numbers are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.cluster import roles as cluster_roles
from align.config import (
    CheckpointRewardConfig,
    ClusterConfig,
    CriticConfig,
    EndpointGeneratorConfig,
    FunctionGeneratorConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    HttpRewardConfig,
    OptimizerConfig,
)
from align.data import chat, collate, toy
from align.data.chat import Dialogue, Message
from align.data.conversations import ConversationIndex
from align.errors import DivergedError
from align.roles import CompletedFuture, MeteredRole
from align.run import Clock
from align.types import Packed, Sequences
from align.workers import local
from align.workers.base import WorkerGroup, WorkerSpec
from align.workers.critic import CriticWorker
from align.workers.reward import RankScores
from align.workers.reward import Reward as Role


class Pretended(WorkerGroup):
    """Ranks that score a response by the number of its words, and count."""

    def __init__(self, world_size: int, metrics: Sequence[dict[str, float]] = ()):
        self.world_size, self.metrics = world_size, metrics or [{}] * world_size
        self.arguments: list[tuple[Any, ...]] = []

    def call(self, phase: str, method: Any, arguments: Any, gather: Callable[[list[Any]], Any]) -> CompletedFuture[Any]:
        self.arguments = list(arguments)
        scores = [torch.tensor([float(len(one.response.split())) for one in own[0]]) for own in arguments]
        return CompletedFuture(
            gather([RankScores(score, metrics) for score, metrics in zip(scores, self.metrics, strict=True)])
        )

    def start(self, method: Any, arguments: Any) -> list[Any]:
        raise NotImplementedError


A, B, C = ((Message("user", "x" * length),) for length in (60, 10, 8))
SAID = [
    *(Dialogue(A, word) for word in ("one", "one two")),
    *(Dialogue(B, word) for word in ("a b c", "", "a b c d")),
    Dialogue(C, "a b c d e"),
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_text_is_split_by_context_and_put_together_in_order(world_size: int):
    ranks = Pretended(world_size)
    scores = Role(ranks, CheckpointRewardConfig(path="p")).score_dialogues(SAID).result()
    assert scores.tolist() == [1, 2, 3, 0, 4, 5]
    shares = [[one.context for one in own[0]] for own in ranks.arguments]
    assert sum(map(len, shares)) == len(SAID)
    for context in (A, B, C):
        assert sum(context in share for share in shares) == 1
    if world_size == 2:  # 130 characters against 42
        assert sorted(map(len, shares)) == [2, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_prompt_that_comes_twice_in_a_row_is_two_groups_where_numbers_say_so(world_size: int):
    """Each is whole on one rank, and the ranks are told where one ends."""
    said, groups = [Dialogue(A, f"word {i}") for i in range(6)], [7, 7, 8, 8, 8, 9]
    ranks = Pretended(world_size)
    Role(ranks, CheckpointRewardConfig(path="p")).score_dialogues(said, groups).result()
    runs = [[(key, len(list(run))) for key, run in groupby(own[2])] for own in ranks.arguments]
    assert sorted(run for own in runs for run in own) == [(7, 2), (8, 3), (9, 1)]
    for dialogues, _, own in ranks.arguments:
        assert [groups[said.index(one)] for one in dialogues] == own


def test_what_is_counted_elsewhere_has_names_that_say_so():
    remote = EndpointGeneratorConfig(url="http://x/v1", model="m")
    for judge, prefix in ((remote, "service/"), (FunctionGeneratorConfig(function="m:f"), "")):
        section = GenerativeRewardConfig(judge=judge)
        role = Role(Pretended(1, [{"verdicts": 6.0, "order_consistency": 0.5}]), section)
        role.score_dialogues(SAID).result()
        assert role.drain() == {f"{prefix}verdicts": 6.0, f"{prefix}order_consistency": 0.5}


def test_ids_of_the_responses_go_along_with_their_text():
    tokenizer = toy.tokenizer()
    renderer = chat.Renderer(tokenizer)
    contexts = [(Message("user", "say the first word : cat dog"),), (Message("user", "sort the words : pig ant"),)]
    responses = [[renderer.response_ids(contexts[0], "cat")], [renderer.response_ids(contexts[1], "ant pig")]]
    sequences = Sequences(
        Packed.from_lists([renderer.prompt_ids(one) for one in contexts]),
        Packed.from_lists([ids for (ids,) in responses]),
        torch.tensor([0, 1]),
    )
    role = Role(ranks := Pretended(2), FunctionRewardConfig(function="m:f"))
    role.read_text(ConversationIndex(contexts, renderer))
    assert role.score(sequences).result().tolist() == [1, 2]
    sent = [pair for dialogues, ids, _ in ranks.arguments for pair in zip(dialogues, ids, strict=True)]
    assert sorted(sent) == [
        (Dialogue(contexts[0], "cat"), responses[0][0]),
        (Dialogue(contexts[1], "ant pig"), responses[1][0]),
    ]


def test_counts_add_up_and_means_are_over_responses():
    """Two ranks with 2 and 4 responses: (2 * 0.3 + 4 * 0.6) / 6 = 0.5; a second call of the same step counts on."""
    metrics = [{"requests": 3.0, "disagreement": 0.3}, {"requests": 4.0, "disagreement": 0.6}]
    role = Role(Pretended(2, metrics), CheckpointRewardConfig(path="p"))
    assert isinstance(role, MeteredRole)
    role.score_dialogues(SAID).result()
    first, second = [len(own[0]) for own in role.ranks.arguments]  # type: ignore[attr-defined]
    mean = (0.3 * first + 0.6 * second) / 6
    assert role.drain() == pytest.approx({"requests": 7.0, "disagreement": mean})
    assert role.drain() == {}
    role.score_dialogues(SAID).result()
    role.score_dialogues(SAID).result()
    assert role.drain() == pytest.approx({"requests": 14.0, "disagreement": mean})


def test_counts_of_a_service_have_names_of_their_own():
    role = Role(Pretended(1, [{"requests": 3.0}]), HttpRewardConfig(url="http://127.0.0.1:1"))
    role.score_dialogues(SAID).result()
    assert role.drain() == {"service/requests": 3.0}


@pytest.mark.parametrize("failed", ["fail", "drop"])
def test_no_score_stops_or_stays(failed: Any):
    class Fails(Pretended):
        def call(
            self, phase: str, method: Any, arguments: Any, gather: Callable[[list[Any]], Any]
        ) -> CompletedFuture[Any]:
            return CompletedFuture(gather([RankScores(torch.tensor([1.0, math.nan]), {})]))

    role = Role(Fails(1), CheckpointRewardConfig(path="p", failed=failed))
    if failed == "drop":
        assert role.score_dialogues(SAID[:2]).result()[1].isnan()
        return
    with pytest.raises(DivergedError, match="gave 1 of 2 sequences no finite score, first sequence 1"):
        role.score_dialogues(SAID[:2]).result()


def test_the_longest_goes_first_to_the_rank_with_the_least():
    """Blocks of 5, 4, 3 and 3: ranks get 5 + 3 and 4 + 3."""
    rows = collate.balanced([0, 2, 3, 4], [2, 3, 4, 3, 3], 2)
    assert [one.tolist() for one in rows] == [[0, 1, 4], [2, 3]]
    assert [one.tolist() for one in collate.balanced([0], [], 2)] == [[], []]


def test_a_judge_by_itself(tmp_path: Path, tiny_reward: Path):
    section = CheckpointRewardConfig(path=str(tiny_reward), dtype="float32")
    dialogues = [Dialogue((Message("user", "say the last word : cat dog"),), word) for word in ("dog", "cat", "okay")]
    with cluster_roles.start_reward(section, "local", (0,), ClusterConfig(), tmp_path, print) as role:
        together = role.score_dialogues(dialogues).result()
        alone = [float(role.score_dialogues([one]).result()) for one in dialogues]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
    assert len(set(alone)) == 3


@pytest.mark.full  # `tests/eval/test_reward.py` has a judge on two processes too
@pytest.mark.slow
def test_a_judge_by_itself_on_two_processes(tmp_path: Path, tiny_reward: Path):
    section = CheckpointRewardConfig(path=str(tiny_reward), dtype="float32")
    dialogues = [
        Dialogue((Message("user", f"say the last word : {word} dog"),), answer)
        for word in ("cat", "hen", "owl")
        for answer in ("dog", word)
    ]
    scores = []
    for executor in ("local", "ray"):
        with cluster_roles.start_reward(section, executor, (0, 1), ClusterConfig(), tmp_path, print) as role:
            scores.append(role.score_dialogues(dialogues).result())
    assert torch.allclose(*scores, atol=1e-6)
    assert {log.name for log in tmp_path.glob("*.log")} == {"reward-0.log", "reward-1.log"}


def test_a_critic_starts_from_the_weighted_sum_of_attributes(tmp_path: Path, tiny_reward: Path):
    """Its one row is the sum of the head's rows, each times its weight; an attribute without one counts 0."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        tiny_reward, num_labels=3, ignore_mismatched_sizes=True
    )
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "m")
    toy.tokenizer().save_pretrained(tmp_path / "m")
    fields: dict[str, Any] = {
        "path": str(tmp_path / "m"),
        "dtype": "float32",
        "attributes": ["a", "b", "c"],
        "weights": {"a": 1.0, "c": -2.0},
    }
    section = CriticConfig(**fields, zero_stage=0, optimizer=OptimizerConfig(lr=1e-3))
    ranks = local.start_role(CriticWorker, WorkerSpec("critic", 0, 1, section, 0, 1, 60.0), Clock())
    assert isinstance(ranks.worker, CriticWorker)
    row = ranks.worker.model.score.weight  # type: ignore[union-attr]
    assert torch.allclose(row, model.score.weight[0] - 2 * model.score.weight[2], atol=1e-6)
