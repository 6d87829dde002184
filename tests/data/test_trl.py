"""Rows in TRL's layouts against ``trl.data_utils``: the same prompt and the same answers."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import datasets
import pytest
from trl.data_utils import maybe_extract_prompt, unpair_preference_dataset

from align.data import trl
from align.data.rows import BadRow


def conversation(rng: random.Random, turns: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"text {rng.randrange(3)}"} for i in range(turns)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pairs() -> dict[str, list[dict[str, Any]]]:
    """Pairs in each layout, by its name: the same conversations in all of them."""
    rng = random.Random(0)
    layouts: dict[str, list[dict[str, Any]]] = {"implicit": [], "explicit": [], "text": []}
    for number in range(20):
        prompt = conversation(rng, 2 * rng.randrange(3) + 1)
        chosen, rejected = answer(f"yes {number}"), answer(f"no {number}")
        layouts["implicit"].append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        layouts["explicit"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        text = {"chosen": f"yes {number}", "rejected": f"no {number}"}
        layouts["text"].append({"prompt": prompt[-1]["content"], **text})
    return layouts


def contents(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [turn["content"] for turn in value]


@pytest.mark.parametrize("layout", ["implicit", "explicit", "text"])
class TestPairs:
    def test_prompt_and_answers_are_those_of_trl(self, layout: str):
        for row in pairs()[layout]:
            (pair,), expected = trl.parse_preference(row), maybe_extract_prompt(row)
            assert [turn.content for turn in pair.context] == contents(expected["prompt"])
            assert ([pair.chosen], [pair.rejected]) == (contents(expected["chosen"]), contents(expected["rejected"]))

    def test_the_demonstration_is_the_completion_that_trl_labels_true(self, layout: str):
        rows = [maybe_extract_prompt(row) for row in pairs()[layout]]
        unpaired = unpair_preference_dataset(datasets.Dataset.from_list(rows))
        expected = [contents(row["completion"]) for row in unpaired if row["label"]]
        assert [[pair.chosen] for row in pairs()[layout] for pair in trl.parse_demonstration(row)] == expected

    def test_the_prompt_alone_is_that_of_trl(self, layout: str):
        for row in pairs()[layout]:
            (prompt,) = trl.parse_prompt(row)
            assert [turn.content for turn in prompt.context] == contents(maybe_extract_prompt(row)["prompt"])


@pytest.mark.parametrize("turns", [1, 3])
def test_what_trl_takes_for_a_longer_answer_is_a_bad_row(turns: int):
    """TRL ends the prompt at the first difference; here the answers have to be one turn each."""
    rng = random.Random(1)
    before = conversation(rng, turns)
    row = {
        "chosen": [*before, *answer("a"), *conversation(rng, 1), *answer("b")],
        "rejected": [*before, *answer("c"), *conversation(rng, 1), *answer("d")],
    }
    assert len(maybe_extract_prompt(row)["chosen"]) == 3
    with pytest.raises(BadRow, match="differs from chosen before the last turn"):
        trl.parse_preference(row)


def test_trl_is_not_imported_before_a_row_of_its_layouts_is_read():
    code = "import sys, align.data.dataset; assert not any(name.split('.')[0] == 'trl' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
