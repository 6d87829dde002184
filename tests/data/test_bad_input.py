"""What a user reads when data is wrong: for each format, the row that is bad, its place, and what to do.

Rows of HelpSteer3-Preference and of the pairs of HelpSteer2 are in test_helpsteer.py and test_helpsteer2.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import layouts
import pytest

from align.config import DataConfig
from align.data import dataset
from align.errors import ConfigError, DataError


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def user(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": one} for one in contents], "ratings": {}}


def said(label: Any, **changes: Any) -> dict[str, Any]:
    return layouts.nemo(label=label) | changes


TEXT = layouts.nemo_text(helpfulness=3)

BAD: dict[str, list[tuple[Any, str, str]]] = {
    "feedback": [
        (without(layouts.feedback(), "feedback2"), "feedback2 is missing", ""),
        (layouts.feedback(feedback1="good"), "feedback1 is not a list of texts", "'good'"),
        (layouts.feedback(feedback2=[]), "feedback2 is not a list of texts", "[]"),
        (layouts.feedback(feedback1=["a", None]), "feedback1 is NoneType, not text", ""),
        (layouts.feedback(context=[]), "context is neither text nor a list of turns", "[]"),
    ],
    "edit": [
        (without(layouts.edit(), "change_summary"), "change_summary is missing", ""),
        (layouts.edit(edited_response=" \n"), "edited_response is empty", "' \\n'"),
        (layouts.edit(original_response=3), "original_response is int, not text", "3"),
    ],
    "principle": [
        (layouts.principle(fulfilment="yes"), "fulfilment is neither Yes nor No", "'yes'"),
        (layouts.principle(fulfilment=True), "fulfilment is neither Yes nor No", "True"),
        (layouts.principle(fulfilment=["Yes"]), "fulfilment is neither Yes nor No", "['Yes']"),
        (layouts.principle(principle=" "), "principle is empty", "' '"),
    ],
    "helpsteer3_edit_quality": [
        (
            layouts.edit_quality(good_edited_response=""),
            "good_edited_response is the preferred response but is empty",
            "''",
        ),
        (layouts.edit_quality(bad_edited_response=None), "bad_edited_response is NoneType, not text", ""),
        (layouts.edit_quality(domain=None), "domain is NoneType, not text", ""),
    ],
    "helpsteer2": [
        (layouts.rated(verbosity=5), "verbosity is outside 0 to 4", "5"),
        (layouts.rated(verbosity=-100), "verbosity is outside 0 to 4", "-100"),
        (layouts.rated(helpfulness=2.5), "helpfulness is not an integer", "2.5"),
        (layouts.rated(helpfulness=[3, 4]), "helpfulness is not an integer", "[3, 4]"),
        (without(layouts.rated(), "correctness"), "correctness is missing", ""),
        (
            layouts.rated("a\n<extra_id_1>User\nb"),
            "prompt roles do not alternate between user and assistant, or the last is not user",
            "user",
        ),
    ],
    "disagreements": [
        (layouts.disagreement(helpfulness=3), "helpfulness is not a list of ratings", "3"),
        (layouts.disagreement(complexity=[]), "complexity is not a list of ratings", "[]"),
        (layouts.disagreement(verbosity=[1, None]), "verbosity is not an integer", ""),
        (layouts.disagreement(coherence=[4, 5]), "coherence is outside 0 to 4", "5"),
    ],
    "openai pairs": [
        (without(layouts.chosen(), "rejected"), "rejected is missing", ""),
        (layouts.chosen(strength=4), "strength is outside 0 to 3", "4"),
        (layouts.chosen(strength=1.5), "strength is not an integer", "1.5"),
        (layouts.chosen(chosen=""), "chosen is the preferred response but is empty", "''"),
        (layouts.chosen(chosen=layouts.turns("x")), "chosen is neither text nor one turn of the assistant", "['user']"),
        (
            layouts.chosen() | {"prompt": [{"role": "tool", "content": "x"}]},
            "prompt roles do not alternate",
            "['tool']",
        ),
        (layouts.chosen(rejected={"role": "assistant"}), "rejected is dict, not text", "assistant"),
    ],
    "openai ratings": [
        (user("a"), "messages does not end with an answer of the assistant", "'user'"),
        ({"messages": layouts.messages()["messages"][1:]}, "messages does not end with an answer of", "'assistant'"),
        (layouts.messages() | {"ratings": [3]}, "ratings is not an object of numbers", "[3]"),
        (layouts.messages(helpfulness="3"), "ratings.helpfulness is not a number", "'3'"),
        (layouts.messages(helpfulness=True), "ratings.helpfulness is not a number", "True"),
        (layouts.messages(helpfulness=float("nan")), "ratings.helpfulness is not a number", "nan"),
        (layouts.messages(helpfulness=10**400), "ratings.helpfulness is not a number", "1000"),
        (layouts.messages(**{"\ud83d": 1}), "ratings has an unpaired surrogate", "ud83d"),
        (layouts.messages() | {"messages": "hello"}, "messages does not end with an answer of the assistant", "'user'"),
    ],
    "nemo": [
        (without(TEXT, "label"), "label is missing", ""),
        (TEXT | {"label": [1.0] * 5}, "label is neither text nor 9 numbers", "[1.0"),
        (layouts.nemo_text(quality=-2), "label quality is outside 0 to 4", "-2"),  # a file of comparisons
        (TEXT | {"text": TEXT["text"].removesuffix("<extra_id_2>")}, "text has no NeMo turn markers", "<extra_id_0>"),
        (TEXT | {"text": TEXT["text"].replace("Assistant\n", "Bot\n")}, "text has no turn of the assistant", ""),
        (layouts.nemo_text("a", "<extra_id_1>User"), "text has a turn marker in the response", "<extra_id_1>User"),
        (said(None), "conversations has no answer with a label", ""),
        (said("helpfulness"), "label helpfulness is not a number", "''"),
        (said("helpfulness:3,helpfulness:4"), "label has two values for one attribute", "helpfulness:3"),
        (said("helpfulness:3", conversations=[]), "conversations is not a list of turns", "[]"),
        (said("x", conversations=[{"from": "User"}]), "conversations has a turn without from and value", "User"),
        (said("helpfulness:3", mask="human"), "conversations roles do not alternate", ""),
    ],
}
HOW: dict[str, tuple[str, Any, str, Any]] = {
    "feedback": ("helpsteer3", "feedback", "feedback", layouts.feedback),
    "edit": ("helpsteer3", "edits", "edit", layouts.edit),
    "principle": ("helpsteer3", "principles", "principle", layouts.principle),
    "helpsteer3_edit_quality": (
        "helpsteer3_edit_quality",
        "preferences",
        "helpsteer3_edit_quality",
        layouts.edit_quality,
    ),
    "helpsteer2": ("helpsteer2", "ratings", "helpsteer2", layouts.rated),
    "disagreements": ("helpsteer2_disagreements", "ratings", "", layouts.disagreement),
    "openai pairs": ("openai", "preferences", "openai", layouts.chosen),
    "openai ratings": ("openai", "ratings", "openai", layouts.messages),
    "nemo": ("nemo", "ratings", "nemo", layouts.nemo),
}
"""The format, what it is read as, the layout of its folder and a sound row."""


def folder_of(path: Path, name: str, rows: list[Any]) -> tuple[DataConfig, str]:
    """The data section of a folder with ``rows`` and a held-out row; where the rows are."""
    form, _, layout, sound = HOW[name]
    data = DataConfig(path=str(path), format=form)  # type: ignore[arg-type]
    if layout:
        layouts.write(path, layout, rows, [sound("held out 4")])
        return data, layouts.FILES[layout][0]
    layouts.put(path / "disagreements/disagreements.jsonl.gz", [*rows, sound("held out 4")])  # its hash holds it out
    return data, "disagreements/disagreements.jsonl.gz"


@pytest.mark.parametrize(
    ("name", "bad", "reason", "shown"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_bad_row_stops_with_its_place_and_is_skipped_where_asked(
    tmp_path: Path, name: str, bad: Any, reason: str, shown: str
):
    sound = HOW[name][3]
    data, file = folder_of(tmp_path, name, [sound("a"), bad])
    with pytest.raises(DataError) as error:
        dataset.load_dataset(data, HOW[name][1])
    assert error.value.where == f"{tmp_path}/{file}:2"
    assert error.value.message.startswith(reason) and shown in error.value.message
    assert error.value.remedy is not None and "data.bad_rows=skip" in error.value.remedy
    assert len(error.value.message) < 150
    skipping = DataConfig(path=data.path, format=data.format, bad_rows="skip")
    [(found, count)] = dataset.load_dataset(skipping, HOW[name][1]).counts["train"].bad.items()
    assert found.startswith(reason) and count == 1


NEMO_PAIRS = [
    (
        [layouts.nemo_text("a", "x", quality=1), layouts.nemo_text("b", "y", quality=1)],
        2,
        "prompt differs from the previous row",
    ),
    ([layouts.nemo_text("a", "x", quality=1), layouts.nemo_text("a", "y", quality=2)], 2, "label quality differs from"),
    ([layouts.nemo_text("a", "x", helpfulness=1), layouts.nemo_text("a", "y")], 1, "label quality is not an integer"),
    ([layouts.nemo_text("a", "x", quality=0.5)] * 2, 1, "label quality is not an integer: 0.5"),
    ([layouts.nemo_text("a", "x", quality=4)] * 2, 1, "label quality is outside -3 to 3: 4"),
    (
        [layouts.nemo_text("a", "", quality=-1), layouts.nemo_text("a", "y", quality=-1)],
        1,
        "response is the preferred response but",
    ),
    ([layouts.nemo_text("a", "x", quality=1)], 1, "row is the last row and has no second response"),
]


@pytest.mark.parametrize(("rows", "line", "reason"), NEMO_PAIRS)
def test_pairs_of_nemo(tmp_path: Path, rows: list[Any], line: int, reason: str):
    layouts.write(tmp_path, "nemo", rows, [layouts.nemo_text("v", one, quality=0) for one in ("x", "y")])
    with pytest.raises(DataError, match=rf"train\.jsonl:{line}: {reason}"):
        dataset.load_dataset(DataConfig(path=str(tmp_path), format="nemo"))


@pytest.mark.parametrize(
    ("form", "reads", "holds"),
    [
        ("helpsteer3_edit_quality", "ratings", "holds preferences, not ratings"),
        ("helpsteer2_disagreements", "preferences", "holds ratings, not preferences"),
        ("openai", "principles", "holds preferences and ratings, not principles"),
    ],
)
def test_a_format_read_as_what_it_is_not(tmp_path: Path, form: Any, reads: Any, holds: str):
    with pytest.raises(ConfigError, match=holds) as error:
        dataset.load_dataset(DataConfig(path=str(tmp_path), format=form), reads)
    assert "Formats that hold them: data.format=" in str(error.value)
    assert error.value.exit_status == 78


@pytest.mark.parametrize(
    ("form", "reads", "file"),
    [
        ("nemo", "ratings", "train.jsonl"),
        ("openai", "ratings", "train.jsonl"),
        ("helpsteer3", "principles", "principle/train.jsonl"),
        ("helpsteer2_disagreements", "ratings", "disagreements/disagreements.jsonl"),
    ],
)
def test_a_folder_without_the_files(tmp_path: Path, form: Any, reads: Any, file: str):
    layouts.put(tmp_path / ("val.jsonl" if file == "train.jsonl" else "preference/train.jsonl"), [layouts.nemo()])
    with pytest.raises(DataError, match="no file for split") as error:
        dataset.load_dataset(DataConfig(path=str(tmp_path), format=form), reads)
    assert f"{tmp_path}/{file}" in error.value.message
    assert error.value.remedy is not None and f"data.format={form}" in error.value.remedy


def test_a_hub_that_stops_giving_rows(monkeypatch: pytest.MonkeyPatch):
    def rows() -> Any:
        yield layouts.rated("a")
        raise ConnectionError("reset by peer\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": [], "validation": rows()})
    with pytest.raises(
        DataError, match="^nvidia/HelpSteer2/validation:1: reading from the hub failed.*: reset by peer\n"
    ) as error:
        dataset.load_dataset(DataConfig(path="nvidia/HelpSteer2", format="helpsteer2", streaming=True), "ratings")
    assert "data.streaming=false" in str(error.value)
