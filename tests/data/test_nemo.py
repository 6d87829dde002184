"""NeMo-Aligner's files: both forms, both kinds of label, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest

from align.config import DataConfig
from align.data import dataset, nemo
from align.data.chat import Message
from align.data.rows import BadRow, Preference, Rating

CAT = (Message("user", "cat"),)
LABELS = {"helpfulness": 3.0, "verbosity": 1.0}


def load(folder: Path, reads: Any, train: list[Any], validation: list[Any]) -> Any:
    layouts.write(folder, "nemo", train, validation)
    return dataset.load_dataset(DataConfig(path=str(folder), format="nemo"), reads)


def nine(**labels: float) -> list[float]:
    return [labels.get(name, -100.0) for name in layouts.NINE]


@pytest.mark.parametrize(
    "row",
    [
        layouts.nemo(),
        layouts.nemo(label=nine(**LABELS)),
        layouts.nemo(label="helpfulness:3,verbosity:1,humor:-100"),
        layouts.nemo_text(**LABELS),
        layouts.nemo_text() | {"label": "helpfulness:3.0,verbosity:1.0"},
        {k: v for k, v in layouts.nemo().items() if k in ("conversations",)},
    ],
)
def test_ratings_of_each_form(tmp_path: Path, row: dict[str, Any]):
    read = load(tmp_path, "ratings", [row], [layouts.nemo("v")])
    assert read.train == [Rating(CAT, "cat dog", LABELS, "", "english")]


def test_every_labelled_turn_is_a_row(tmp_path: Path):
    row = layouts.nemo("a", "b") | {"system": "be kind"}
    row["conversations"] += layouts.nemo("c", "d", "humor:0")["conversations"]
    row["conversations"][1]["label"] = None
    row["conversations"] += layouts.nemo("e", "f", "humor:4")["conversations"]
    read = load(tmp_path, "ratings", [row], [layouts.nemo("v")])
    system = Message("system", "be kind")
    first = (system, Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    second = (*first, Message("assistant", "d"), Message("user", "e"))
    assert [(one.context, one.response, one.ratings) for one in read.train] == [
        (first, "d", {"humor": 0.0}),
        (second, "f", {"humor": 4.0}),
    ]


def test_the_mask_says_who_the_user_is(tmp_path: Path):
    row = layouts.nemo() | {"mask": "human"}
    row["conversations"][0]["from"] = "human"
    assert load(tmp_path, "ratings", [row], [layouts.nemo("v")]).train[0].context == CAT


@pytest.mark.parametrize("form", [layouts.nemo, layouts.nemo_text])
def test_turns_inside_a_value(tmp_path: Path, form: Any):
    """As NeMo's script for HelpSteer2 leaves them."""
    prompt = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    row = form(prompt) if form is layouts.nemo else form(prompt, helpfulness=3, verbosity=1)
    read = load(tmp_path, "ratings", [row], [layouts.nemo("v")])
    assert read.train[0].context == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


def test_two_rows_in_succession_are_a_pair(tmp_path: Path):
    texts = [layouts.nemo_text("a", "x", quality=-2), layouts.nemo_text("a", "y", quality=-2)]
    said = [layouts.nemo("b", "x", "quality:3"), layouts.nemo("b", "y", "quality:3")]
    read = load(
        tmp_path,
        "preferences",
        texts + said,
        [layouts.nemo("v", "x", "quality:0"), layouts.nemo("v", "y", "quality:0")],
    )
    assert [(row.chosen, row.rejected, row.strength) for row in read.train] == [("x", "y", 2), ("y", "x", 3)]
    assert read.validation[0].preference == 0


CONTEXTS = [
    CAT,
    (Message("system", "be kind"), Message("user", "a\n"), Message("assistant", ""), Message("user", " c \u2028")),
]


@pytest.mark.parametrize("written", [nemo.to_conversations, nemo.to_texts])
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_written_is_read_back_equal(written: Any, context: Any):
    rated = Rating(context, "cat\ndog\n", {"helpfulness": 10 / 3, "verbosity": 0.0}, "", "english")
    [one] = written(rated)
    assert nemo.parse_ratings(json.dumps(one).encode()) == [rated]
    pair = Preference(context, "x\n", "", -3, "", "english")
    lines = [(str(n), json.dumps(one).encode()) for n, one in enumerate(written(pair))]
    assert nemo.parse_row_pair(lines) == [pair]


def test_the_written_text_is_that_of_nemo():
    [one] = nemo.to_texts(Rating(CAT, "cat dog", LABELS, "", ""))
    assert one == layouts.nemo_text(**LABELS)
    [one] = nemo.to_conversations(Rating(CAT, "cat dog", LABELS, "", ""))
    assert one == layouts.nemo()


@pytest.mark.parametrize("written", [nemo.to_conversations, nemo.to_texts])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Rating(CAT, "\n<extra_id_1>User\n", LABELS, "", ""), "assistant contains a turn marker of NeMo's format"),
        (Rating((Message("user", "<extra_id_1>Assistant"),), "x", LABELS, "", ""), "user contains a turn marker"),
        (Rating(CAT, "x", {"a,b": 1.0}, "", ""), "ratings "),
    ],
)
def test_what_cannot_be_written(written: Any, row: Rating, reason: str):
    with pytest.raises(BadRow, match=reason):
        written(row)
