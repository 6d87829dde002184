"""OpenAI's messages, as preferences and as ratings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest

from align.config import DataConfig
from align.data import dataset, openai
from align.data.chat import Message
from align.data.rows import Preference, Rating

CAT = (Message("user", "cat"),)


def load(folder: Path, reads: Any, train: list[Any], validation: list[Any], **options: Any) -> Any:
    layouts.write(folder, "openai", train, validation)
    return dataset.load_dataset(DataConfig(path=str(folder), format="openai", **options), reads)


@pytest.mark.parametrize(
    "row",
    [
        layouts.chosen(),
        layouts.chosen(chosen="cat dog") | {"prompt": "cat"},
        layouts.chosen(rejected=[{"role": "assistant", "content": "cat pig"}]),
    ],
)
def test_forms_of_a_pair(tmp_path: Path, row: dict[str, Any]):
    read = load(tmp_path, "preferences", [row], [layouts.chosen("v")])
    assert read.train == [Preference(CAT, "cat dog", "cat pig", -2, "", "")]


@pytest.mark.parametrize(
    ("strength", "mark"), [({}, -1), ({"strength": None}, -1), ({"strength": 3}, -3), ({"strength": 0}, 0)]
)
def test_strength(tmp_path: Path, strength: dict[str, Any], mark: int):
    row = {name: value for name, value in layouts.chosen().items() if name != "strength"} | strength
    assert load(tmp_path, "preferences", [row], [layouts.chosen("v")]).train[0].preference == mark


def test_ratings(tmp_path: Path):
    several = layouts.messages(helpfulness=3, clarity=9.5, humor=None, verbosity=-100) | layouts.PLACE
    several["messages"] = [{"role": "system", "content": "s"}, *several["messages"]]
    bare = {"messages": layouts.messages("dog")["messages"]}
    read = load(tmp_path, "ratings", [several, bare], [layouts.messages("v")], domains=[])
    system = (Message("system", "s"), *CAT)
    assert read.train == [
        Rating(system, "cat dog", {"helpfulness": 3.0, "clarity": 9.5}, "code", "python"),
        Rating((Message("user", "dog"),), "cat dog", {}, "", ""),
    ]


def test_domains_can_be_chosen(tmp_path: Path):
    read = load(
        tmp_path,
        "preferences",
        [layouts.chosen(), layouts.chosen("dog", domain="stem")],
        [layouts.chosen("v", domain="stem")],
        domains=["stem"],
    )
    assert (read.counts["train"].kept, read.counts["train"].other_domain) == (1, 1)


def test_what_is_written_is_read_back_equal():
    context = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c\u2028"))
    pair = Preference(context, "x", "", -3, "code", "python")
    rated = Rating(context, "", {"helpfulness": 10 / 3, "own": -1.0}, "", "")
    [pair_object], [rated_object] = openai.preference_to_json(pair), openai.rating_to_json(rated)
    assert openai.parse_preference(json.dumps(pair_object).encode()) == [pair]
    assert openai.parse_rating(json.dumps(rated_object).encode()) == [rated]
    assert (pair_object["strength"], pair_object["margin"]) == (3, 3.0)


def test_the_chosen_response_is_written_first():
    [written] = openai.preference_to_json(Preference(CAT, "worse", "better", 2, "", ""))
    assert (written["chosen"][0]["content"], written["rejected"][0]["content"]) == ("better", "worse")
    [read] = openai.parse_preference(written)
    assert (read.chosen, read.rejected, read.strength, read.preference) == ("better", "worse", 2, -2)
