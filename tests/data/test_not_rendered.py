"""Rows that the chat template refuses: refused with their place, or left out and counted, whatever is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config import DataConfig, EditingConfig, SteeringConfig, VerdictConfig
from align.data import conversations, dataset, editing, genrm, steerlm_dataset, toy_family
from align.data.chat import Message, Renderer
from align.data.rows import Comparison, Context, Edit, Feedback, Preference, Rating
from align.data.steerlm import SteeringFormat
from align.data.tokenize import tokenize_demonstrations, tokenize_pairs, tokenize_prompts, tokenize_ratings
from align.errors import DataError
from align.types import Packed

GOOD: Context = (Message("user", "sort the words : pig ant"),)
BAD: Context = (Message("system", "okay"), *GOOD)
FORM = SteeringFormat.of(SteeringConfig(attributes=["helpfulness"]))
CONFIG: Any = SimpleNamespace(data=DataConfig(path="x"), editing=EditingConfig(used_by="none"), verdict=VerdictConfig())

PREFERENCE = Preference(GOOD, "ant pig", "pig ant", -2, "", "", where="train.jsonl:1")
RATING = Rating(GOOD, "ant pig", {"helpfulness": 3.0}, "", "", where="train.jsonl:1")
COMPARISON = Comparison(GOOD, "ant pig", "pig", -2, ((-2, "Response 1 sorts"),), (4.0, 2.0), "", "", where="t:1")
FEEDBACK = Feedback(GOOD, "pig ant", ("sort the words",), "", "", where="train.jsonl:1")
EDIT = Edit(GOOD, "pig ant", "ant pig", ("sort the words",), "", "", "", where="train.jsonl:1")

MADE: dict[str, tuple[Any, Callable[[list[Any], Renderer], dict[str, int]]]] = {
    "prompts": (PREFERENCE, lambda rows, it: dict(tokenize_prompts(rows, it, 99).counts)),
    "pairs": (PREFERENCE, lambda rows, it: tokenize_pairs(rows, it, 99, 99)[1]),
    "demonstrations": (PREFERENCE, lambda rows, it: tokenize_demonstrations(rows, it, "all", 99, 99)[1]),
    "ratings": (RATING, lambda rows, it: tokenize_ratings(rows, it, ["helpfulness"], 99, 99)[1]),
    "responses to be labelled": (RATING, lambda rows, it: steerlm_dataset.distinct_responses(rows, it, 99, 99)[1]),
    "steered demonstrations": (
        RATING,
        lambda rows, it: steerlm_dataset.steered_demonstrations(rows, it, FORM, 99, 99)[1],
    ),
    "steered prompts": (
        RATING,
        lambda rows, it: dict(
            steerlm_dataset.steered_prompts([(r.where, r.context, (3,)) for r in rows], it, FORM, 99).counts
        ),
    ),
    "feedback": (FEEDBACK, lambda rows, it: editing.feedback_demonstrations(rows, it, CONFIG)[1]),
    "edits": (EDIT, lambda rows, it: editing.edit_demonstrations(rows, it, CONFIG)[1]),
    "edit prompts": (EDIT, lambda rows, it: editing.edit_prompts(rows, it, CONFIG.editing, 99).counts),
}


def renderer(tmp_path: Path, bad_rows: Any, raised: str = "raise_exception('no system role')") -> Renderer:
    tokenizer = toy_family.tokenizer()
    file = tmp_path / "template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ " + raised + " }}{% endif %}"
    file.write_text(refusal + str(tokenizer.chat_template))
    return Renderer(tokenizer, str(file), bad_rows=bad_rows)


@pytest.mark.parametrize("name", MADE)
def test_a_row_that_the_template_refuses(tmp_path: Path, name: str):
    row, make = MADE[name]
    rows = [row, replace(row, context=BAD, where="train.jsonl:6")]
    with pytest.raises(DataError, match=r"cannot render the row: the template fails: no system role") as caught:
        make(rows, renderer(tmp_path, "stop"))
    assert caught.value.where == "train.jsonl:6" and "data.bad_rows=skip" in str(caught.value)
    skipped, alone = (make(some, renderer(tmp_path, "skip")) for some in (rows, rows[:1]))
    assert (skipped.pop("not_rendered"), skipped["kept"]) == (1, alone["kept"])
    assert "not_rendered" not in alone


def test_prompts_of_a_judge(tmp_path: Path):
    """They quote a system turn, so the template must fail otherwise."""
    rows = [COMPARISON, replace(COMPARISON, response1="zebra", where="t:2")]
    tokenizer, file = toy_family.tokenizer(), tmp_path / "template.jinja"
    refusal = "{% if 'zebra' in messages[0].content %}{{ messages[7].content.x }}{% endif %}"
    file.write_text(refusal + str(tokenizer.chat_template))
    for make in (
        lambda it: genrm.judge_prompts(rows, it, VerdictConfig(), 9999).counts,
        lambda it: genrm.verdict_demonstrations(rows, it, CONFIG)[1],
    ):
        with pytest.raises(DataError) as caught:
            make(Renderer(tokenizer, str(file)))
        assert caught.value.where == "t:2"
        assert make(Renderer(tokenizer, str(file), bad_rows="skip"))["not_rendered"] >= 1


def test_a_prompt_without_tokens_is_refused_as_a_row(tmp_path: Path):
    tokenizer, file = toy_family.tokenizer(), tmp_path / "template.jinja"
    file.write_text("{% if messages[0].role != 'system' %}" + str(tokenizer.chat_template) + "{% endif %}")
    rows = [PREFERENCE, replace(PREFERENCE, context=BAD, where="t:2")]
    with pytest.raises(DataError, match="t:2: .* the prompt has no tokens"):
        tokenize_prompts(rows, Renderer(tokenizer, str(file)), 99)


def test_judges_that_read_text_know_the_other_prompts(tmp_path: Path):
    known = conversations.ConversationIndex([BAD, GOOD], renderer(tmp_path, "skip"))
    sequences: Any = SimpleNamespace(
        prompts=Packed.from_lists([known._renderer.prompt_ids(GOOD)]),
        responses=Packed.from_lists([[5]]),
        prompt_B=SimpleNamespace(tolist=lambda: [0]),
    )
    assert known.dialogues(sequences)[0].context == GOOD


def test_rows_that_the_template_of_a_reward_model_refuses(tmp_path: Path):
    """It would meet them in the middle of the run."""
    rows = [replace(PREFERENCE, context=BAD, where="train.jsonl:6"), PREFERENCE]
    corpus = dataset.DataSplits(rows, rows[1:], {}, "")
    lenient, strict = Renderer(toy_family.tokenizer()), renderer(tmp_path, "stop")
    assert dataset.renderable_rows(corpus, [], DataConfig(path="x")) == (corpus, {})
    assert dataset.renderable_rows(corpus, [lenient], DataConfig(path="x")) == (corpus, {})
    with pytest.raises(DataError, match=r"train\.jsonl:6: .* cannot render the row"):
        dataset.renderable_rows(corpus, [lenient, strict], DataConfig(path="x"))
    found, counts = dataset.renderable_rows(corpus, [lenient, strict], DataConfig(path="x", bad_rows="skip"))
    assert (found.train, found.validation, counts) == ([PREFERENCE], [PREFERENCE], {"not_rendered": 1})
