"""Renders conversations with a reward model's own tokenizer and template."""

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

    from align.config import CheckpointRewardConfig
    from align.rewards.checkpoint_format import HeadSpec

QUESTION = (
    "Evaluate the response to the previous prompt in terms of whether it satisfies this principle: {principle}. Only "
    "answer Yes or No."
)
"""Question to Llama-3.3-Nemotron-70B-Reward-Principle, from its model card."""

Block = tuple[list[int], list[list[int]]]
"""Token ids of a prompt, and of each continuation."""


class Text:
    """Renders conversations for one reward model.

    A model trained by align reads the prompt and the response up to the end-of-turn token, as in its training. A public
    checkpoint reads everything that its template writes, as on its model card (Qwen's adds a newline). A ``yes_no``
    model reads another user turn, the question, up to where its own answer would begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, head_spec: HeadSpec, config: CheckpointRewardConfig):
        """Raises `DataError` if the template cannot be used, `ModelError` if Yes and No are not single tokens."""
        if head_spec.chat_template is not None:
            tokenizer.chat_template = head_spec.chat_template
        self.renderer = Renderer(tokenizer, date=head_spec.date, section="reward")
        self.by_align = head_spec.by_align
        self.question: str | None = None
        if head_spec.kind == "yes_no":
            yes_no_ids(tokenizer)
            self.question = question_of(config.principle, config.question)

    def sequences(self, dialogues: Sequence[Dialogue]) -> tuple[Sequences, Tensor]:
        """Token ids, and the index of the dialogue of each row. Dialogues of one context are neighbors and share its
        prompt."""
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
    """The question after a response; an empty ``question`` is the model card's."""
    return (question or QUESTION).replace("{principle}", principle)


def yes_no_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of Yes and No, which must be single tokens (9642 and 2822 in Llama 3). Raises `ModelError`."""
    token_ids = []
    for word in ("Yes", "No"):
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ModelError(
                f"{tokenizer.name_or_path}: kind yes_no needs {word} as one token, but its tokenizer gives {ids}",
                remedy="use a checkpoint that was trained to answer Yes or No, or another reward.head",
            )
        token_ids += ids
    return token_ids[0], token_ids[1]


def text_reason(head_spec: HeadSpec, tokenizer: PreTrainedTokenizerBase, run: Renderer) -> str | None:
    """Why a model cannot read the policy's token ids; None if it can: its vocabulary is the policy's, and it would
    render the same conversation to the same ids."""
    if head_spec.kind == "yes_no":
        return "it reads a question after each response"
    if not chat.same_vocabulary(run.tokenizer, tokenizer):
        return "its tokenizer is not the policy's"
    if head_spec.chat_template is not None:
        tokenizer.chat_template = head_spec.chat_template
    if head_spec.chat_template is not None or head_spec.date is not None:
        renderer = Renderer(tokenizer, date=head_spec.date, section="reward")
        if (renderer.template, renderer.date) != (run.template, run.date):
            return "its chat template or date is not the run's"
    probe = [Message("user", "question")]
    prompt, (answer,) = run.dialogue_ids(probe, ["answer"])
    same = head_spec.by_align or prompt + answer == run.conversation_ids([*probe, Message("assistant", "answer")])
    return None if same else "its template writes more after a response than the policy samples"
