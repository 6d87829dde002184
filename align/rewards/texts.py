"""Conversations as token ids of a reward model's own tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.data import chat
from align.data.chat import Dialogue, Message, Renderer
from align.errors import ModelError
from align.types import Packed, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.config import RewardConfig
    from align.rewards.checkpoint_format import Reading

QUESTION = (
    "Evaluate the response to the previous prompt in terms of whether it satisfies this principle: {principle}. Only "
    "answer Yes or No."
)
"""Asked of Llama-3.3-Nemotron-70B-Reward-Principle (its model card)."""

Block = tuple[list[int], list[list[int]]]
"""A prompt, and what follows it in each of its sequences."""


class Text:
    """How one reward model reads conversations.

    A model that was trained here reads the prompt and the answer up to its end-of-turn token, as it did in training; a
    public checkpoint reads all that its template writes, as its model card does (Qwen's ends with a newline more); a
    ``yes_no`` model reads a further user turn, the question, and stands where its own answer would begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading, section: RewardConfig):
        """Raises `DataError` where the template cannot be used, `ModelError` where no answer could be read."""
        if reading.chat_template is not None:
            tokenizer.chat_template = reading.chat_template
        self.renderer = Renderer(tokenizer, date=reading.date, section="reward")
        self.by_align = reading.by_align
        self.question: str | None = None
        if reading.kind == "yes_no":
            yes_and_no(tokenizer)
            self.question = question_of(section.principle, section.question)

    def sequences(self, dialogues: Sequence[Dialogue]) -> tuple[Sequences, Tensor]:
        """Token ids, in which those of one context are neighbours that share its prompt, and the dialogue that each
        row belongs to."""
        by_context: dict[tuple[Message, ...], list[int]] = {}
        for i, dialogue in enumerate(dialogues):
            by_context.setdefault(dialogue.context, []).append(i)
        blocks = [
            block
            for context, rows in by_context.items()
            for block in self._blocks(context, [dialogues[i].response for i in rows])
        ]
        prompt_B = torch.arange(len(blocks)).repeat_interleave(
            torch.tensor([len(rows) for _, rows in blocks], dtype=torch.int64)
        )
        order = [i for rows in by_context.values() for i in rows]
        prompts = Packed.from_lists([prompt for prompt, _ in blocks])
        responses = Packed.from_lists([row for _, rows in blocks for row in rows])
        return Sequences(prompts, responses, prompt_B), torch.tensor(order, dtype=torch.int64)

    def _blocks(self, context: tuple[Message, ...], responses: list[str]) -> list[Block]:
        if self.by_align and self.question is None:
            return [self.renderer.dialogue_ids(context, responses)]
        prompt = self.renderer.prompt_ids(context)
        wholes = [self._whole(context, response) for response in responses]
        if all(whole[: len(prompt)] == prompt for whole in wholes):
            return [(prompt, [whole[len(prompt) :] for whole in wholes])]
        return [(whole, [[]]) for whole in wholes]

    def _whole(self, context: tuple[Message, ...], response: str) -> list[int]:
        turns = [*context, Message("assistant", response)]
        if self.question is not None:
            return self.renderer.prompt_ids([*turns, Message("user", self.question)])
        return self.renderer.conversation_ids(turns)


def question_of(principle: str, question: str = "") -> str:
    """What is asked after a response; empty takes the model card's question."""
    return (question or QUESTION).replace("{principle}", principle)


def yes_and_no(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of Yes and No, each of which must be one token (9642 and 2822 in Llama 3). Raises `ModelError`."""
    found = [tokenizer.encode(word, add_special_tokens=False) for word in ("Yes", "No")]
    for word, ids in zip(("Yes", "No"), found, strict=True):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ModelError(
                f"{tokenizer.name_or_path}: kind yes_no needs {word} as one token, its tokenizer gives {ids}",
                remedy="give a checkpoint that was trained to answer Yes or No, or another reward.kind",
            )
    return found[0][0], found[1][0]


def why_text(reading: Reading, tokenizer: PreTrainedTokenizerBase, run: Renderer) -> str | None:
    """Why a model cannot read the policy's token ids as they are; None where it can.

    It can where its vocabulary is the policy's and the ids are what it would read of the same conversation.
    """
    if reading.kind == "yes_no":
        return "it asks a question after each response"
    if not chat.same_vocabulary(run.tokenizer, tokenizer):
        return "its tokenizer is not the policy's"
    if reading.own_template:
        if reading.chat_template is not None:
            tokenizer.chat_template = reading.chat_template
        own = Renderer(tokenizer, date=reading.date, section="reward")
        if (own.template, own.date) != (run.template, run.date):
            return "its chat template or date is not the run's"
    probe = [Message("user", "question")]
    prompt, (answer,) = run.dialogue_ids(probe, ["answer"])
    same = reading.by_align or prompt + answer == run.conversation_ids([*probe, Message("assistant", "answer")])
    return None if same else "its template writes more after an answer than the policy samples"
