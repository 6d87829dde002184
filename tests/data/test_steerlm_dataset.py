"""Responses with labels as token ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.config import SteeringConfig
from align.data import openai, steerlm_dataset, toy_family
from align.data.chat import Message, Renderer
from align.data.rows import Preference, Rating
from align.data.steerlm import SteeringFormat
from align.errors import DataError
from align.types import Packed, Rollouts, Sequences

RENDERER = Renderer(toy_family.tokenizer())
FORM = SteeringFormat.of(SteeringConfig(attributes=["helpfulness", "verbosity"]))
A, B = ((Message("user", text),) for text in ("sort the words : pig ant", "repeat the words : owl"))


def rating(context: tuple[Message, ...], response: str, **ratings: float) -> Rating:
    return Rating(context, response, ratings, "", "")


def test_answers_of_pairs_each_once():
    rows = [
        Preference(A, "ant pig", "pig ant", -2, "general", "english"),
        Preference(A, "ant pig", "  ", -1, "general", "english"),
        rating(B, "owl", helpfulness=4),
        rating(B, "owl owl owl owl owl owl owl owl", helpfulness=1),
    ]
    found, counts = steerlm_dataset.distinct_responses(rows, RENDERER, 50, 6)
    assert [(row.context, row.response, dict(row.ratings)) for row in found] == [
        (A, "ant pig", {}),
        (A, "pig ant", {}),
        (B, "owl", {"helpfulness": 4}),
    ]
    assert counts == {"responses": 6, "empty": 1, "repeated": 1, "too_long": 1, "kept": 3}
    with pytest.raises(DataError, match="no responses are left"):
        steerlm_dataset.distinct_responses(rows, RENDERER, 2, 6)


def test_own_ratings_want_every_attribute():
    rows = [rating(A, "ant pig", helpfulness=3, verbosity=1, humor=0), rating(A, "ant", helpfulness=3)]
    kept, rating_BA = steerlm_dataset.human_ratings(rows, ["verbosity", "helpfulness"])
    assert kept == rows[:1] and rating_BA.tolist() == [[1, 3]]
    with pytest.raises(DataError, match="not rated by all of humor, verbosity 1"):
        steerlm_dataset.human_ratings(rows[1:], ["humor", "verbosity"])


ROWS = steerlm_dataset.with_labels(
    [rating(A, "ant pig"), rating(A, "pig"), rating(B, "owl owl")],
    torch.tensor([[2, 4], [1, 0], [3, 2]]),
    ["verbosity", "helpfulness"],
)


def read(sequences: Sequences) -> list[tuple[str, str]]:
    prompts, responses = sequences.prompts.lists(), sequences.responses.lists()
    return [
        (RENDERER.text(prompts[p]), RENDERER.text(r))
        for p, r in zip(sequences.prompt_B.tolist(), responses, strict=True)
    ]


def expected(rows: list[Rating]) -> list[tuple[str, str]]:
    told = ["helpfulness:4,verbosity:2", "helpfulness:0,verbosity:1", "helpfulness:2,verbosity:3"]
    said = zip(rows, told, strict=True)
    return [(f"{row.context[0].content}<extra_id_2>{text}\n", row.response) for row, text in said]


def test_each_response_follows_its_own_labels():
    sequences, counts = steerlm_dataset.steered_demonstrations(ROWS, RENDERER, FORM, 60, 10)
    assert read(sequences) == expected(ROWS)
    assert counts == {"too_long": 0, "kept": 3}
    moved = [*ROWS[1:], ROWS[0]]
    shifted = [Rating(row.context, row.response, other.ratings, "", "") for row, other in zip(ROWS, moved, strict=True)]
    assert read(steerlm_dataset.steered_demonstrations(shifted, RENDERER, FORM, 60, 10)[0]) != expected(ROWS)
    assert steerlm_dataset.steered_demonstrations(ROWS, RENDERER, FORM, 60, 2)[1] == {"too_long": 2, "kept": 1}


def test_written_rows_are_data_of_the_format_openai():
    lines = steerlm_dataset.ratings_to_jsonl(ROWS).splitlines()
    assert [row for line in lines for row in openai.parse_rating(line.encode())] == ROWS


def test_prompts_that_ask_for_attributes():
    wanted = [("", A, (4, 2)), ("", B, (1, 2)), ("", A, (4, 2)), ("", A, (0, 3))]
    asked = steerlm_dataset.steered_prompts(wanted, RENDERER, FORM, 60)
    assert asked.contexts == [A, B, A]
    assert asked.label_PA.tolist() == [[4, 2], [1, 2], [0, 3]]
    assert asked.plain.lists() == [RENDERER.prompt_ids(context) for context in (A, B, A)]
    assert [RENDERER.text(ids).split("<extra_id_2>")[1] for ids in asked.steered.lists()] == [
        "helpfulness:4,verbosity:2\n",
        "helpfulness:1,verbosity:2\n",
        "helpfulness:0,verbosity:3\n",
    ]
    assert asked.counts == {"asked": 4, "repeated": 1, "too_long": 0, "kept": 3}
    with pytest.raises(DataError, match="too_long 3"):
        steerlm_dataset.steered_prompts(wanted, RENDERER, FORM, 12)


def test_samples_without_an_end_or_a_word_are_left_out():
    ids = [RENDERER.response_ids(A, text) for text in ("ant", "pig", "")] + [RENDERER.response_ids(B, "owl")]
    packed = Packed.from_lists(ids)
    sequences = Sequences(Packed.from_lists([[1], [1]]), packed, torch.tensor([0, 0, 0, 1]))
    number_BT = torch.zeros(4, packed.mask().shape[1])
    rollouts = Rollouts(sequences, number_BT, number_BT, torch.tensor([True, False, True, True]), 1.0, 1)
    rows, counts = steerlm_dataset.sampled_responses([B, A], [(torch.tensor([1, 0]), rollouts)], RENDERER)
    assert [(row.context, row.response) for row in rows] == [(A, "ant"), (B, "owl")]
    assert counts == {"answers": 4, "truncated": 1, "empty": 1, "kept": 2}
    cut_off = replace(rollouts, finished_B=torch.zeros(4).bool())
    with pytest.raises(DataError, match="4 answers, 4 truncated, 0 empty, 0 kept") as caught:
        steerlm_dataset.sampled_responses([B, A], [(torch.tensor([1, 0]), cut_off)], RENDERER)
    assert caught.value.remedy == "raise sampling.max_tokens"
