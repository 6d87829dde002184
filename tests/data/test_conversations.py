"""From prompt ids back to what was said."""

from pathlib import Path

import pytest
import torch

from align.data import toy
from align.data.chat import Dialogue, Message, Renderer, load_tokenizer
from align.data.conversations import ConversationIndex
from align.errors import DataError
from align.types import Packed, Sequences

FIRST = (Message("user", "reverse the words : cat dog"),)
SECOND = (Message("system", "okay"), Message("user", "sort the words : pen ant"))


def sequences(renderer: Renderer, contexts: list[tuple[Message, ...]], rows: list[tuple[int, str]]) -> Sequences:
    prompts = Packed.from_lists([renderer.prompt_ids(context) for context in contexts])
    responses = Packed.from_lists([renderer.response_ids(contexts[i], text) for i, text in rows])
    return Sequences(prompts, responses, torch.tensor([i for i, _ in rows]))


def test_what_was_said_comes_back_in_order():
    renderer = Renderer(toy.tokenizer())
    known = ConversationIndex([SECOND, FIRST, SECOND], renderer)
    asked = sequences(renderer, [FIRST, SECOND], [(1, "ant pen"), (0, "dog cat"), (1, ""), (0, "cat")])
    assert known.dialogues(asked) == [
        Dialogue(SECOND, "ant pen"),
        Dialogue(FIRST, "dog cat"),
        Dialogue(SECOND, ""),
        Dialogue(FIRST, "cat"),
    ]
    assert known.dialogues(asked.select(torch.tensor([3, 0]))) == [Dialogue(FIRST, "cat"), Dialogue(SECOND, "ant pen")]


def test_a_response_that_was_cut_off_is_text_too():
    renderer = Renderer(toy.tokenizer())
    asked = sequences(renderer, [FIRST], [(0, "dog cat okay")])
    cut = Sequences(asked.prompts, Packed.from_lists([asked.responses.lists()[0][:2]]), asked.prompt_B)
    assert ConversationIndex([FIRST], renderer).dialogues(cut) == [Dialogue(FIRST, "dog cat")]


def test_any_text_survives_bytes(byte_tokenizer: Path):
    renderer = Renderer(load_tokenizer(byte_tokenizer))
    context = (Message("user", "caf\u00e9  \n\t\u4e2d\u6587 \U0001f600?"),)
    text = " two  spaces, \u00e9 and\n\na line \U0001f600"
    asked = sequences(renderer, [context], [(0, text)])
    assert ConversationIndex([context], renderer).dialogues(asked) == [Dialogue(context, text)]


def test_an_unknown_prompt_is_named():
    renderer = Renderer(toy.tokenizer())
    with pytest.raises(DataError, match="sort the words : pen ant"):
        ConversationIndex([FIRST], renderer).dialogues(sequences(renderer, [SECOND], [(0, "ant")]))
