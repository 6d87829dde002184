"""The rest of the HelpSteer family for the bundled task: files, what is said in them, and the tokenizer."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from align.config import DataConfig
from align.data import dataset, genrm_prompts, helpsteer3, toy, toy_family
from align.data.chat import Message, Renderer, load_tokenizer
from align.data.genrm_prompts import Verdict

CONFIGS = ("preference", "feedback", "edit", "edit_quality", "principle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write_toy_family(tmp_path_factory.mktemp("family"), num_train=200, num_validation=20, seed=1)


def rows(folder: Path, config: str, split: str = "train") -> list[dict[str, Any]]:
    lines = gzip.decompress((folder / config / f"{split}.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


def instruction(row: dict[str, Any]) -> str:
    return row["context"][-1]["content"]


def true_score(text: str) -> int:
    """The score that the first sentence of a feedback names."""
    found = re.match(r"The response is (\w+) helpful\. ", text)
    assert found is not None
    return helpsteer3.PHRASES.index(found[1])


def is_true(remark: str, row: dict[str, Any], response: str) -> bool:
    """Whether a remark holds: a word that is wrong or missing, a number of words that is not met, or no fault."""
    right, words = toy.answer(instruction(row)), response.split()
    if remark == "All words are right.":
        return words == right
    if found := re.fullmatch(r"It should have (\d) words\.", remark):
        return int(found[1]) == len(right) != len(words)
    found = re.fullmatch(r"Word (\d) should be (\w+)\.", remark)
    assert found is not None, remark
    place = int(found[1]) - 1
    return right[place] == found[2] and words[place : place + 1] != [found[2]]


def said(value: Any) -> list[str]:
    """The texts in a value of a row."""
    if isinstance(value, list):
        return [text for one in value for text in said(one)]
    if isinstance(value, dict):
        return said([one for name, one in value.items() if name != "role"])
    return [value] if isinstance(value, str) else []


def test_all_configs_are_of_the_same_instructions(folder: Path):
    for split, count in (("train", 200), ("validation", 20)):
        asked = {config: [instruction(row) for row in rows(folder, config, split)] for config in CONFIGS}
        assert all(found == asked["preference"] for found in asked.values())
        assert len(set(asked["edit"])) == count
    assert not {instruction(row) for row in rows(folder, "edit")} & {
        instruction(row) for row in rows(folder, "edit", "validation")
    }


def test_feedback_is_true(folder: Path):
    pairs = {instruction(row): row for row in rows(folder, "preference")}
    for row in rows(folder, "feedback"):
        pair = pairs[instruction(row)]
        for i in (1, 2):
            response = row[f"response{i}"]
            assert response == pair[f"response{i}"]
            assert len(row[f"feedback{i}"]) == 3
            for text in row[f"feedback{i}"]:
                assert true_score(text) == toy.score(instruction(row), response)
                assert is_true(text.partition(". ")[2], row, response)


def test_reasons_name_the_right_answer(folder: Path):
    for row in rows(folder, "preference"):
        said = f"It should be {' '.join(toy.answer(instruction(row)))}."
        assert [one["reasoning"] for one in row["individual_preference"]] == [said] * 3


def test_edits_are_right_and_their_feedback_is_of_the_original(folder: Path):
    for config in ("edit", "edit_quality"):
        for row in rows(folder, config):
            right, original = " ".join(toy.answer(instruction(row))), row["original_response"]
            score = toy.score(instruction(row), original)
            assert score < 4
            assert row["edited_response" if config == "edit" else "good_edited_response"] == right
            assert all(true_score(text) == score for text in row["feedback"])
            assert all(is_true(text.partition(". ")[2], row, original) for text in row["feedback"])
            if config == "edit":
                assert all(text.partition(". ")[2] in row["change_summary"] for text in row["feedback"])
            else:
                assert toy.score(instruction(row), row["bad_edited_response"]) <= score


def test_principles_are_judged_by_their_rule(folder: Path):
    seen = set()
    for row in rows(folder, "principle"):
        right, words = toy.answer(instruction(row)), row["response"].split()
        fulfilled = {
            "says no word too much": len(words) <= len(right),
            "begins with the right word": words[:1] == right[:1],
        }[row["principle"]]
        assert row["fulfilment"] == ("Yes" if fulfilled else "No")
        seen.add((row["principle"], row["fulfilment"]))
    assert len(seen) == 4


@pytest.mark.parametrize("reads", ["preferences", "comparisons", "feedback", "edits", "principles"])
def test_every_config_can_be_read(folder: Path, reads: Any):
    assert len(dataset.load_dataset(DataConfig(path=str(folder)), reads).train) >= 200 - (reads == "principles")


def test_comparisons_are_labelled_by_the_score(folder: Path):
    for row in dataset.load_dataset(DataConfig(path=str(folder)), "comparisons").train:
        text = row.context[-1].content
        assert row.helpfulness == (1 + toy.score(text, row.response1), 1 + toy.score(text, row.response2))


def test_written_bytes_depend_on_the_seed_alone(tmp_path: Path):
    def contents(name: str, seed: int) -> dict[str, bytes]:
        root = toy_family.write_toy_family(tmp_path / name, 5, 5, seed)
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    first = contents("a", 3)
    assert first == contents("b", 3)
    assert first != contents("c", 4)
    assert {f"{config}/train.jsonl.gz" for config in CONFIGS} < first.keys()


def test_the_tokenizer_writes_every_text_back(folder: Path):
    renderer = Renderer(load_tokenizer(folder / "tokenizer"))
    texts = [
        genrm_prompts.format_verdict(Verdict(4, 2, 2), "helpsteer3", ("Response 1 is right.", "Response 2 is not.")),
        genrm_prompts.format_verdict(Verdict(4, 2, 2), "json"),
        "<think>\nWord 1 should be cat.\n</think>\nYes",
        "<extra_id_2>helpfulness:4,verbosity:1\n",
        *toy_family.PRINCIPLES,
    ]
    for config in CONFIGS:
        for row in rows(folder, config)[:50]:
            texts += [text for name, value in row.items() if name not in ("domain", "language") for text in said(value)]
    for text in texts:
        ids = renderer.tokenizer.encode(text, add_special_tokens=False)
        assert renderer.tokenizer.unk_token_id not in ids, text
        assert renderer.text(ids) == text


def test_the_template_knows_the_roles_of_a_judge():
    renderer = Renderer(toy_family.tokenizer())
    asked = genrm_prompts.judge_messages(
        (Message("user", "cat"),), ("dog", "pig"), "helpsteer3", True, "no word too much"
    )
    written = renderer.tokenizer.decode(renderer.prompt_ids(asked))
    assert written == "<s><user>cat<principle>no word too much<response_1>dog<response_2>pig<assistant>"
    assert renderer.stop_ids == (2,)


def test_feedback_of_every_score():
    text, rng = "reverse the words : cat dog sun", random.Random(0)
    for response, phrase in (("sun dog cat", "perfectly"), ("sun dog cat okay", "mostly"), ("pig", "not")):
        assert toy_family.feedback(text, response, rng).startswith(f"The response is {phrase} helpful. ")
