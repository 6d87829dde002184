"""Feedback and edits as prompts and demonstrations: filters, orders, words."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config import DataConfig, EditingConfig
from align.data import dataset, editing, toy_family
from align.data.chat import Message, Renderer
from align.data.rows import Edit, Feedback
from align.errors import DataError

ASKED = (Message("user", "repeat the words : cat pig"),)
WORDS = EditingConfig(question="feedback", instruction="edit\n{feedback}")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy_family.tokenizer())


def config(section: EditingConfig = WORDS, **limits: int) -> Any:
    return SimpleNamespace(data=DataConfig(path="d", **limits), editing=section)


def edit(feedback: tuple[str, ...], summary: str, original: str = "cat", edited: str = "cat pig") -> Edit:
    return Edit(ASKED, original, edited, feedback, summary, "general", "english")


def test_prompts_end_with_what_is_asked(renderer: Renderer):
    told = ["It should have 2 words.", "Word 2 should be pig."]
    messages = editing.edit_prompt(ASKED, "cat", told, WORDS)
    assert renderer.tokenizer.decode(renderer.prompt_ids(messages)) == (
        "<s><user>repeat the words : cat pig<assistant>cat</s>"
        "<user>edit\n1. It should have 2 words.\n2. Word 2 should be pig.<assistant>"
    )
    messages = editing.feedback_prompt(ASKED, "cat", WORDS)
    assert messages[1:] == (Message("assistant", "cat"), Message("user", "feedback"))
    assert editing.feedback_prompt(ASKED, "cat", EditingConfig())[-1].content.startswith(
        "Evaluate the response to the previous"
    )
    assert "\n1. a{feedback}\n" in editing.edit_prompt(ASKED, "cat", ["a{feedback}"], EditingConfig())[-1].content


def test_what_asks_for_no_change_is_left_out():
    told = ["Good.", "The response is Perfectly Helpful. x", " ", "Bad.", "Good. ", "The response is not perfect."]
    assert editing.change_requests(told, WORDS) == [0, 3, 5]
    assert editing.effective_feedback(told, WORDS) == ["Good.", "Bad.", "The response is not perfect."]
    assert editing.change_requests(told, EditingConfig(perfect="")) == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("feedback", "summary", "share"),
    [
        ("The response is mostly helpful. Word 2 should be pig.", "Now: Word 2 should be pig.", 1.0),
        ("Word 2 should be pig.", "It should have 2 words.", 1 / 3),  # of word, 2, pig: words has a stem of its own
        ("Adding examples would help.", "Added an example", 1 / 3),  # of addin, examp, help: added is not adding
        ("Explain the reasons", "Explained a reason", 1.0),  # expla, reaso
        ("The response is not helpful.", "The response is not helpful.", 0.0),  # words of grammar alone
        ("", "x", 0.0),
        ("CITE sources", "cites Source", 1 / 2),  # sourc; cite is a word of four letters
    ],
)
def test_share_of_words(feedback: str, summary: str, share: float):
    assert editing.word_overlap(feedback, summary) == pytest.approx(share)


def test_all_orders_each_once():
    assert [*editing.feedback_orders("abc", 6)] == [list(order) for order in itertools.permutations("abc")]
    assert [*editing.feedback_orders(["a"], 6)] == [["a"]]
    every = [list(order) for order in itertools.permutations("abcd")]
    assert [*editing.feedback_orders("abcd", 6)] == every[::4]
    assert len({*map(tuple, editing.feedback_orders(range(30), 50))}) == 50  # 30! are not listed


def test_edits_become_demonstrations_of_all_orders(renderer: Renderer):
    told = ("Word 2 should be pig.", "It should have 2 words.", "The response is perfectly helpful.", "improve")
    rows = [
        edit(told, "Now: Word 2 should be pig. It should have 2 words."),
        edit(("improve",), "Now: Word 2 should be pig."),
    ]
    found, counts = editing.edit_demonstrations(rows, renderer, config())
    prompts = [renderer.text(ids) for ids in found.prompts.lists()]
    asked = [prompt.partition("edit\n")[2] for prompt in prompts]
    assert asked == [f"1. {a}\n2. {b}" for a, b in (told[:2], told[1::-1])]
    assert [renderer.text(ids) for ids in found.responses.lists()] == ["cat pig"] * 2
    assert counts == {
        **{"rows": 2, "perfect": 1, "not_followed": 2, "no_feedback": 1},
        **{"empty": 0, "too_long": 0, "kept": 2},
    }
    _, counts = editing.edit_demonstrations(rows, renderer, config(EditingConfig(used_by="none", max_permutations=4)))
    assert (counts["not_followed"], counts["kept"]) == (0, 4 + 1)
    with pytest.raises(DataError, match="no demonstrations are left in the data: rows 1, perfect 1"):
        editing.edit_demonstrations([edit(told[2:3], "x")], renderer, config())


def test_every_text_of_feedback_is_a_demonstration(renderer: Renderer):
    told = ("The response is perfectly helpful. All words are right.", "improve improve improve")
    rows = [Feedback(ASKED, "cat pig", told, "general", "english")]
    found, counts = editing.feedback_demonstrations(rows, renderer, config())
    assert [renderer.text(ids) for ids in found.responses.lists()] == list(told) and len(found.prompts) == 1
    assert counts == {"rows": 1, "empty": 0, "too_long": 0, "kept": 2}
    _, counts = editing.feedback_demonstrations(rows, renderer, config(max_response_tokens=4))
    assert counts == {"rows": 1, "empty": 0, "too_long": 1, "kept": 1}


def test_prompts_of_edits_keep_rows_together(renderer: Renderer):
    rows = [
        edit(("Word 2 should be pig.",), "pig", original="cat"),
        edit(("improve",), "none"),
        edit(("Word 1 should be cat.",), "cat", original="fox pig"),
    ]
    found = editing.edit_prompts(rows, renderer, WORDS, 100)
    assert found.originals == ["cat", "fox pig"] and found.contexts == [ASKED, ASKED]
    assert found.judged.lists() == [renderer.prompt_ids(ASKED)] * 2
    for ids, original, told in zip(found.tokens.lists(), found.originals, ("pig.", "cat."), strict=True):
        assert f"<assistant>{original}</s>" in (text := renderer.tokenizer.decode(ids)) and f"{told}<assistant>" in text
    assert found.counts["kept"] == 2 and found.counts["no_feedback"] == 1
    with pytest.raises(DataError, match="no edit prompts are left"):
        editing.edit_prompts(rows, renderer, WORDS, 5)


def test_a_copy_differs_in_white_space_alone():
    edits = ["cat  pig\n", "cat pig okay", "Cat pig", ""]
    assert editing.unchanged_edits(["cat pig", "cat pig", "cat pig", ""], edits).tolist() == [True, False, False, True]


def test_the_family_data_loads_and_keeps_all_that_was_followed(tmp_path: Path, renderer: Renderer):
    source = dataset.load_dataset(DataConfig(path=str(toy_family.write_toy_family(tmp_path, 40, 5, seed=0))), "edits")
    _, counts = editing.edit_demonstrations(source.train, renderer, config())
    # Summaries of the bundled task repeat every remark that was followed.
    assert counts["rows"] == len(source.train) and counts["not_followed"] == counts["no_feedback"] == 0
