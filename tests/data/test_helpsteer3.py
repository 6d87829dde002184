"""HelpSteer3's configs beside ``preference``: feedback, edits, their quality, principles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import datasets
import layouts
import pytest

from align.config import DataConfig
from align.config.base import DataFormat
from align.data import dataset
from align.data.chat import Message
from align.data.dataset import SplitCounts
from align.data.rows import Comparison, Edit, Feedback, Preference, Principle
from align.errors import ConfigError, DataError

CAT = (Message("user", "cat"),)


def load(folder: Path, reads: Any, **options: Any) -> Any:
    return dataset.load_dataset(DataConfig(path=str(folder), **options), reads)


def test_feedback_is_of_one_response(tmp_path: Path):
    layouts.write(tmp_path, "feedback", [layouts.feedback(), layouts.feedback()], [layouts.feedback("held out")])
    read = load(tmp_path, "feedback")
    assert read.train == [
        Feedback(CAT, "cat dog", ("The response is mostly helpful.",), "code", "python"),
        Feedback(CAT, "cat pig", ("It errs.", "It is short."), "code", "python"),
    ]
    assert read.counts["train"] == SplitCounts(read=4, bad={}, other_domain=0, duplicates=2, in_validation=0, kept=2)


def reasons(*told: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"score": score, "reasoning": text} for score, text in told]


def helpful(*words: str) -> list[str]:
    return [f"The response is {word} helpful. And more." for word in words]


def test_comparisons_have_reasons_and_the_helpfulness_of_both_responses(tmp_path: Path):
    told = {"individual_preference": reasons((-2, "cat dog is right"), (1, ""))}
    rows = [layouts.preference(**told), layouts.preference("dog"), layouts.preference("pig"), layouts.preference("cat")]
    layouts.write(tmp_path, "helpsteer3", rows, [layouts.preference("v", individual_preference=None)])
    feedback = [
        layouts.feedback(feedback1=helpful("mostly", "not", "Partially"), feedback2=helpful("slightly", "perfectly")),
        layouts.feedback(feedback1=helpful("not"), feedback2=helpful("not")),  # said before
        layouts.feedback("dog", feedback1=helpful("mostly")),  # and nothing of the other
    ]
    held_out = [layouts.feedback("pig", feedback1=helpful("not"), feedback2=helpful("not"))]  # of the other split
    read = load(layouts.write(tmp_path, "feedback", feedback, held_out), "comparisons", max_rows=3)
    place = {"domain": "code", "language": "python"}
    assert read.train == [
        Comparison(CAT, "cat dog", "cat pig", -2, ((-2, "cat dog is right"), (1, "")), (3.0, 2.0), **place),
        Comparison((Message("user", "dog"),), "cat dog", "cat pig", -2, ((-2, ""),), None, **place),
        Comparison((Message("user", "pig"),), "cat dog", "cat pig", -2, ((-2, ""),), (1.0, 1.0), **place),
    ]
    assert read.validation[0].reasons == ()


def test_comparisons_need_no_feedback(tmp_path: Path):
    layouts.write(tmp_path, "helpsteer3", [layouts.preference()], [layouts.preference("v")])
    assert load(tmp_path, "comparisons").train[0].helpfulness is None
    layouts.put(tmp_path / "feedback" / "validation.jsonl", [layouts.feedback()])
    with pytest.raises(DataError, match="no file for split train"):
        load(tmp_path, "comparisons")


@pytest.mark.parametrize("told", ["text", [{"score": 1}], [{"score": 4, "reasoning": ""}], reasons((1, 5))])
def test_a_malformed_reason_is_named(tmp_path: Path, told: Any):
    rows = [layouts.preference(), layouts.preference("dog", individual_preference=told)]
    layouts.write(tmp_path, "helpsteer3", rows, [layouts.preference("v")])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:2: individual_preference"):
        load(tmp_path, "comparisons")
    assert len(load(tmp_path, "preferences").train) == 2  # which do not read it
    assert len(load(tmp_path, "comparisons", bad_rows="skip").train) == 1


def test_malformed_feedback_of_a_comparison_is_named(tmp_path: Path):
    layouts.write(tmp_path, "helpsteer3", [layouts.preference()], [layouts.preference("v")])
    layouts.write(tmp_path, "feedback", [layouts.feedback(feedback1="text")], [layouts.feedback("v")])
    with pytest.raises(DataError, match=r"feedback/train\.jsonl\.gz:1: feedback1"):
        load(tmp_path, "comparisons")
    assert load(tmp_path, "comparisons", bad_rows="skip").train[0].helpfulness is None


def test_edits(tmp_path: Path):
    rows = [layouts.edit(), layouts.edit("v"), layouts.edit(edited_response="cat sun")]
    read = load(layouts.write(tmp_path, "edit", rows, [layouts.edit("v")]), "edits")
    assert read.train[0] == Edit(CAT, "cat pig", "cat dog", ("a", "b", "c"), "pig became dog", "code", "python")
    assert [row.edited for row in read.train] == ["cat dog", "cat sun"]
    assert read.counts["train"].in_validation == 1


def test_principles(tmp_path: Path):
    rows = [layouts.principle(), layouts.principle(fulfilment="No"), layouts.principle(principle="depth")]
    read = load(layouts.write(tmp_path, "principle", rows, [layouts.principle("v", fulfilment="No")]), "principles")
    assert read.train[0] == Principle(CAT, "cat dog", "accuracy of the answer", True, "code", "python")
    assert [row.principle for row in read.train] == ["accuracy of the answer", "depth"]
    assert read.counts["train"].duplicates == 1
    assert [row.fulfilled for row in read.validation] == [False]


def test_a_row_of_edit_quality_is_two_pairs(tmp_path: Path):
    rows = [layouts.edit_quality(), layouts.edit_quality(domain="stem")]
    layouts.write(tmp_path, "helpsteer3_edit_quality", rows, [layouts.edit_quality("v")])
    read = load(tmp_path, "preferences", format="helpsteer3_edit_quality", domains=["code"])
    assert read.train == [
        Preference(CAT, "cat dog", "cat pig", -1, "code", "python"),
        Preference(CAT, "cat dog", "cat", -1, "code", "python"),
    ]
    assert [(row.chosen, row.rejected, row.strength) for row in read.train] == [
        ("cat dog", "cat pig", 1),
        ("cat dog", "cat", 1),
    ]
    assert read.counts["train"] == SplitCounts(4, {}, other_domain=2, duplicates=0, in_validation=0, kept=2)


@pytest.mark.parametrize(
    ("layout", "reads"),
    [("feedback", "feedback"), ("edit", "edits"), ("principle", "principles"), ("helpsteer3", "preferences")],
)
def test_a_context_may_be_text(tmp_path: Path, layout: str, reads: str):
    row = getattr(layouts, "preference" if layout == "helpsteer3" else layout)
    layouts.write(tmp_path, layout, [row(context="cat")], [row("v")])
    assert load(tmp_path, reads).train[0].context == CAT


@pytest.mark.parametrize("reads", ["feedback", "edits", "principles"])
def test_every_kind_has_a_fingerprint_of_its_content(tmp_path: Path, reads: str):
    layout = reads.removesuffix("s")
    row = getattr(layouts, layout)
    changes = {
        "feedback": {"feedback2": ["other"]},
        "edit": {"change_summary": "other"},
        "principle": {"fulfilment": "No"},
    }
    found = {
        load(layouts.write(tmp_path / str(n), layout, [one], [row("v")]), reads).fingerprint
        for n, one in enumerate([row(), row(), row(**changes[layout]), row(language="java")])
    }
    assert len(found) == 3


def stand_in_for_the_hub(
    folder: Path, configs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """A folder with a card: `load_dataset` treats both alike. Returns the options of each call, as they come."""
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n"
            f"  - split: train\n    path: {name}/train.jsonl.gz\n"
            f"  - split: validation\n    path: {name}/validation.jsonl.gz\n"
            for name in configs
        )
        + "---\n"
    )
    load_dataset, asked = datasets.load_dataset, []

    def stand_in(path: str, name: str, revision: str | None, **options: Any) -> Any:
        asked.append(options)
        return load_dataset(str(folder), name, cache_dir=str(folder / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return asked


@pytest.mark.parametrize("told", [True, False])
def test_comparisons_from_the_hub_with_feedback_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
):
    layouts.write(tmp_path, "helpsteer3", [layouts.preference()], [layouts.preference("v")])
    layouts.write(tmp_path, "feedback", [layouts.feedback(feedback2=helpful("not"))], [layouts.feedback("v")])
    stand_in_for_the_hub(tmp_path, ("preference", "feedback") if told else ("preference",), monkeypatch)
    read = load(Path("nvidia/HelpSteer3"), "comparisons")
    assert [row.helpfulness for row in read.train] == [(4.0, 1.0) if told else None]


@pytest.mark.parametrize("streaming", [False, True])
def test_from_the_hub_cached_or_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    layouts.write(tmp_path, "principle", [layouts.principle(), layouts.principle("dog")], [layouts.principle("v")])
    layouts.write(tmp_path, "edit", [layouts.edit()], [layouts.edit("v")])
    asked = stand_in_for_the_hub(tmp_path, ("edit", "principle"), monkeypatch)
    read = load(Path("nvidia/HelpSteer3"), "principles", streaming=streaming)
    assert asked == [{"streaming": True} if streaming else {}]
    assert [row.context[0].content for row in read.train] == ["cat", "dog"]
    assert read.fingerprint == load(tmp_path, "principles").fingerprint
    assert bool(list((tmp_path / "cache").rglob("*.arrow"))) != streaming


def test_fingerprints_are_pinned(tmp_path: Path):
    """A checkpoint says which rows it learned from: no version may call the same rows otherwise."""
    layouts.write(
        tmp_path, "helpsteer3", [layouts.preference("a"), layouts.preference("b", 0)], [layouts.preference("v")]
    )
    assert (
        load(tmp_path, "preferences").fingerprint == "f72076a2c6666e9dea7621d0a105cf670cf07b5cfa0167f8e9cbd4f3ee861d36"
    )
    layouts.write(tmp_path, "helpsteer2", [layouts.rated("a")], [layouts.rated("v")])
    read = load(tmp_path, "ratings", format="helpsteer2")
    assert read.fingerprint == "cf4e6c239e8be1b851668b949fa4d07f067a7695cccde6be423f6d9c590cdcf0"


def test_every_format_of_a_recipe_can_be_read():
    assert {"auto", *dataset.FORMATS} == set(get_args(DataFormat))


def test_a_format_that_does_not_hold_what_is_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "ratings", format="helpsteer3")
    assert (
        error.value.message
        == "data.format=helpsteer3 holds preferences and comparisons and feedback and edits and principles, not ratings"
    )
    assert error.value.remedy is not None
    assert error.value.remedy.endswith("helpsteer, helpsteer2, helpsteer2_disagreements, nemo, openai")
