"""How reward models render conversations, and which of them read the policy's token ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from reward_models import DIALOGUES, TAIL, Save, opened, rendered_with, rows_of, section, words
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align.data import chat, toy
from align.data.chat import Renderer
from align.rewards import checkpoint_format, texts
from align.rewards.card import Card


def test_responses_of_one_prompt_share_its_tokens(save: Save):
    """Five conversations of two contexts: two prompts, also where a question follows each response."""
    for options in ({"head": "lm_head_row0"}, {"head": "yes_no", "principle": "be brief"}):
        judge = opened(save(AutoModelForCausalLM, tie_word_embeddings=False), **options)
        sequences, order = judge.text.sequences(DIALOGUES)
        assert len(sequences.prompts) == 2
        assert order.tolist() == [0, 2, 4, 1, 3]
        assert sequences.prompt_B.tolist() == [0, 0, 0, 1, 1]


def test_what_stands_after_the_end_of_turn(save: Save):
    """A public checkpoint reads it, as its card does; one that was trained here ends where its training did."""
    tokenizer = words()
    tokenizer.chat_template = TAIL
    whole, okay = [rendered_with(tokenizer, one) for one in DIALOGUES], tokenizer.get_vocab()["okay"]
    assert all(ids[-1] == okay for ids in whole)
    public = opened(save(AutoModelForSequenceClassification, tokenizer, num_labels=1, name="public"))
    trained = opened(
        save(
            AutoModelForSequenceClassification, tokenizer, num_labels=1, own=Card("sequence_classification", loss="bt")
        )
    )
    converted = opened(
        save(
            AutoModelForSequenceClassification,
            tokenizer,
            num_labels=1,
            own=Card("sequence_classification"),
            name="converted",
        )
    )
    rows = lambda judge: rows_of(judge.text.sequences(DIALOGUES))  # noqa: E731
    assert rows(public) == rows(converted) == whole
    assert rows(trained) == [ids[:-1] for ids in whole]


WHY = {
    "same": ({}, None, None),
    "card without template": ({}, Card("sequence_classification"), None),
    "card with the run's template": ({}, Card("sequence_classification", chat_template=toy.CHAT_TEMPLATE), None),
    "card with another template": (
        {},
        Card("sequence_classification", chat_template=TAIL),
        "its chat template or date",
    ),
    "another date": ({"date": "1 May 2025"}, None, "its chat template or date"),
    "question": ({"head": "yes_no", "principle": "x"}, None, "it reads a question"),
}


@pytest.mark.parametrize("name", WHY)
def test_who_reads_the_policys_ids(save: Save, name: str):
    options, own, why = WHY[name]
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    (read,) = checkpoint_format.head_specs(section(path, **options))
    found = texts.text_reason(read, chat.load_tokenizer(path), Renderer(words()))
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)


def test_other_tokenizers_and_longer_templates_read_text(save: Save, byte_tokenizer: Path):
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    other = save(AutoModelForSequenceClassification, own, num_labels=1)
    (read,) = checkpoint_format.head_specs(section(other))
    assert texts.text_reason(read, chat.load_tokenizer(other), Renderer(words())) == "its tokenizer is not the policy's"
    longer = words()
    longer.chat_template = TAIL
    assert "more after a response" in str(texts.text_reason(read, longer, Renderer(longer)))
    named = replace(read, chat_template=TAIL)  # that the run has it too gives the policy no tokens after the end
    assert "more after a response" in str(texts.text_reason(named, longer, Renderer(longer)))
    assert texts.text_reason(replace(read, by_align=True), longer, Renderer(longer)) is None
