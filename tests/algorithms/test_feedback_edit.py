"""Edits are judged as answers, and copies come last."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from align.algorithms import feedback_edit
from align.config import CheckpointRewardConfig, EditingConfig, EvaluationConfig, PolicyConfig, SamplingConfig
from align.data import editing, toy_family
from align.data.chat import Message, Renderer
from align.data.dataset import DataSplits
from align.data.prompts import PromptStream
from align.data.rows import Edit
from align.roles import CompletedFuture
from align.types import Batch, Packed, Rollouts, Sequences

NAN = float("nan")


@pytest.mark.parametrize(
    ("score", "copy", "penalty", "expected"),
    [
        # The copy has the highest score and gets the lowest of the others less the penalty.
        ([3.0, 9.0, 1.0, 2.0], [0, 1, 0, 0], 0.0, [3.0, 1.0, 1.0, 2.0]),
        ([3.0, 9.0, 1.0, 2.0], [0, 1, 0, 0], 0.5, [3.0, 0.5, 1.0, 2.0]),
        # One that is the lowest already goes down by the penalty alone.
        ([3.0, -4.0, 1.0, 2.0], [0, 1, 0, 0], 0.5, [3.0, -4.5, 1.0, 2.0]),
        ([3.0, 9.0, 1.0, 2.0], [1, 1, 0, 0], 1.0, [0.0, 0.0, 1.0, 2.0]),
        # Copies alone keep their distances, nobody's score is infinite.
        ([3.0, 3.0, 3.0, 3.0], [1, 1, 1, 1], 1.0, [2.0, 2.0, 2.0, 2.0]),
        ([3.0, 9.0, 1.0, 2.0], [0, 0, 0, 0], 1.0, [3.0, 9.0, 1.0, 2.0]),
        ([NAN, 9.0, 1.0, 2.0], [0, 0, 1, 0], 0.0, [NAN, 9.0, NAN, 2.0]),
    ],
)
def test_copies_come_last(score: list[float], copy: list[int], penalty: float, expected: list[float]):
    score_PK, copy_PK = torch.tensor([score, score]), torch.tensor([copy, [0] * 4]).bool()
    found = feedback_edit.penalize_copies(score_PK, copy_PK, penalty)
    assert found[0].tolist() == pytest.approx(expected, nan_ok=True)
    assert found[1].tolist() == pytest.approx(score, nan_ok=True)  # another group's copies do not matter


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy_family.tokenizer())


ROWS = [
    Edit((Message("user", f"repeat the words : {a} {b}"),), a, f"{a} {b}", (f"Word 2 should be {b}.",), b, "x", "y")
    for a, b in (("cat", "pig"), ("owl", "fox"), ("sun", "key"))
]


def test_edits_are_judged_as_answers_to_the_conversation(renderer: Renderer):
    recipe: Any = SimpleNamespace(
        editing=EditingConfig(question="feedback", instruction="edit\n{feedback}"),
        data=SimpleNamespace(max_prompt_tokens=99),
        evaluation=EvaluationConfig(every=1, prompts=2),
        prompts_per_step=2,
        run=SimpleNamespace(seed=3),
    )
    train_data, counts = feedback_edit.load_data(recipe, DataSplits(ROWS, ROWS[::-1], {}, ""), renderer)
    assert counts["kept"] == 3
    prompts = train_data.prompts.batch(2)
    rows = train_data.prompts.order.indices(2).tolist()
    answers = [[f"{ROWS[row].original} okay", f"{ROWS[row].original}"] for row in rows]
    ids = [renderer.response_ids(ROWS[0].context, text) for texts in answers for text in texts]
    mask_BT = torch.zeros(4, max(map(len, ids)))
    sequences = Sequences(prompts.tokens, Packed.from_lists(ids), torch.tensor([0, 0, 1, 1]))
    rollouts = Rollouts(sequences, mask_BT, mask_BT, torch.ones(4).bool(), 1.0, 2)
    judged = train_data.for_reward_models(rollouts)
    assert judged.prompts.lists() == [renderer.prompt_ids(ROWS[row].context) for row in rows]
    assert judged.responses is sequences.responses
    for prompt, row in zip(prompts.tokens.lists(), rows, strict=True):
        told = editing.edit_prompt(ROWS[row].context, ROWS[row].original, ROWS[row].feedback, recipe.editing)
        assert prompt == renderer.prompt_ids(told)
    run = cast(Any, SimpleNamespace(decode=renderer.text))
    assert train_data.copies(rollouts, run).tolist() == [False, True, False, True]
    held_out = train_data.held_out
    assert held_out is not None and held_out.originals == ["sun", "owl"] and held_out.reward_prompts is not None
    assert held_out.reward_prompts.lists() == [renderer.prompt_ids(row.context) for row in ROWS[:0:-1]]
    assert held_out.messages == [row.context for row in ROWS[:0:-1]]


class Roles:
    """Policy, reference and reward in one. Two prompts get a copy, a short edit and a longer one; copies score best."""

    def __init__(self, renderer: Renderer, texts: list[str]):
        self.ids, self.texts, self.eval_reward = (
            [renderer.response_ids(ROWS[0].context, t) for t in texts],
            texts,
            None,
        )
        self.policy = self.reference = self.reward = self

    def rollouts(self, prompts: PromptStream, *_: Any) -> Iterator[tuple[int, Rollouts]]:
        tokens = prompts.batch(1).tokens
        sequences = Sequences(tokens, Packed.from_lists(self.ids), torch.arange(2).repeat_interleave(3))
        self.zero_BT = torch.zeros(sequences.mask_BT.shape)
        yield 1, Rollouts(sequences, self.zero_BT, self.zero_BT, torch.ones(6).bool(), 1.0, 1)

    def score(self, sequences: Sequences) -> CompletedFuture[torch.Tensor]:
        self.judged = sequences.prompts.lists()
        return CompletedFuture(torch.tensor([9.0, 1.0, 3.0] * 2))

    def logprobs(self, *_: Any) -> CompletedFuture[torch.Tensor]:
        return CompletedFuture(self.zero_BT)

    old_logprobs = logprobs

    def update(self, batch: Batch, loss: Any) -> CompletedFuture[dict[str, float]]:
        self.batch = batch
        return CompletedFuture({})

    def export(self, *_: Any) -> CompletedFuture[None]:
        return CompletedFuture(None)

    def log(self, step: int, metrics: dict[str, float], *_: Any) -> None:
        self.metrics = metrics


@pytest.mark.parametrize(("penalty", "copy"), [(0.0, -1.0), (None, 7.0)])
def test_a_step_against_copies(renderer: Renderer, penalty: float | None, copy: float):
    """A copy counts as the worst edit, 1 - (1 + 3) / 2; without the rule it is the best, 9 - (1 + 3) / 2."""
    recipe = feedback_edit.Config(
        policy=PolicyConfig(path="p"),
        reward=CheckpointRewardConfig(path="r"),
        sampling=SamplingConfig(num_samples=3),
        prompts_per_step=2,
        copy_penalty=penalty,
        editing=EditingConfig(instruction="edit\n{feedback}"),
    )
    train_data, _ = feedback_edit.load_data(recipe, DataSplits(ROWS, ROWS, {}, ""), renderer)
    asked = [ROWS[i] for i in train_data.prompts.order.indices(1).tolist()]
    made = Roles(renderer, [text for row in asked for text in (row.original, f"{row.edited} okay", row.edited)])
    run: Any = SimpleNamespace(
        rollouts=made.rollouts, decode=renderer.text, log=made.log, state={}, tensors={}, final=None
    )
    feedback_edit.train(recipe, train_data, made, run)  # type: ignore[arg-type]
    assert made.judged == [renderer.prompt_ids(row.context) for row in asked]  # not the edit prompts
    said = [renderer.text(ids) for ids in made.batch.sequences.responses.lists()]
    advantage = dict(zip(said, made.batch.columns["advantage_BT"][:, 0].tolist(), strict=True))
    assert [advantage[row.original] for row in asked] == pytest.approx([copy] * 2)
    assert made.metrics["copies"] == pytest.approx(1 / 3)
