"""The bundled task: rules, files and the tokenizer."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from align.config import DataConfig
from align.data import toy
from align.data.chat import Message, Renderer, load_tokenizer
from align.data.dataset import load_dataset, tokenize_demonstrations
from align.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_toy(tmp_path_factory.mktemp("toy"), num_train=600, num_validation=60, seed=1)


@pytest.mark.parametrize(
    ("request_text", "right"),
    [
        ("repeat the words", "cat dog ant"),
        ("reverse the words", "ant dog cat"),
        ("sort the words", "ant cat dog"),
        ("say the first word", "cat"),
        ("say the last word", "ant"),
        ("drop the first word", "dog ant"),
    ],
)
def test_right_answers(request_text: str, right: str):
    instruction = f"{request_text} : cat dog ant"
    assert " ".join(toy.answer(instruction)) == right
    assert toy.score(instruction, right) == 4


def test_every_operation_is_tested():
    assert len(toy.OPERATIONS) == 6


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("sun dog cat", 4),
        ("  sun dog\ncat ", 4),  # white space is no word
        ("sun dog cat okay", 3),
        ("sun dog cat okay hello thanks okay well hello", 3),
        ("okay sun dog cat", 0),  # filler in front moves every word
        ("sun dog cat pig", 1),  # a word too many that is no filler
        ("sun dog pig", 2),
        ("sun pig hen", 1),  # one of three
        ("sun", 1),
        ("sun dog", 1),  # a missing word is not a substitution
        ("pig hen owl", 0),
        ("cat dog sun", 1),  # the input itself: its middle word is right
        ("sun pig hen owl", 0),  # one of four words
        ("sun dog cat " + "pig " * 7, 0),  # right words do not pay for length
        ("sun sun sun sun sun sun", 0),
        ("", 0),
        ("</s> \ud800 ???", 0),
    ],
)
def test_score(response: str, expected: int):
    assert toy.score("reverse the words : cat dog sun", response) == expected


def test_score_of_short_answers():
    assert toy.score("say the first word : cat dog", "dog") == 0  # any word would be one substitution away
    assert toy.score("say the first word : cat dog", "cat dog") == 1
    assert toy.score("repeat the words : cat dog", "cat sun") == 2


@pytest.mark.parametrize("instruction", ["", "hello", "reverse the words :", "cook the words : cat", "cat : dog"])
def test_score_refuses_other_instructions(instruction: str):
    with pytest.raises(DataError, match="not an instruction"):
        toy.score(instruction, "cat")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # helpfulness, correctness, coherence, complexity, verbosity
        ("sun dog cat", [4, 4, 4, 2, 2]),
        ("sun dog cat okay okay okay", [3, 2, 4, 3, 4]),
        ("sun dog pig", [2, 2, 2, 2, 2]),
        ("pig", [0, 0, 0, 0, 0]),
        ("", [0, 0, 0, 0, 0]),
    ],
)
def test_attributes(response: str, expected: list[int]):
    found = toy.attributes("reverse the words : cat dog sun", response)
    assert list(found) == ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    assert list(found.values()) == expected


def test_rows_follow_the_schema_and_the_score(folder: Path):
    lines = gzip.decompress((folder / "preference" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 600
    for line in lines:
        row = json.loads(line)
        instruction = row["context"][0]["content"]
        difference = toy.score(instruction, row["response2"]) - toy.score(instruction, row["response1"])
        assert row["overall_preference"] == max(-3, min(3, difference))
        marks = [one["score"] for one in row["individual_preference"]]
        assert len(marks) == 3 and all(abs(mark - row["overall_preference"]) <= 1 and -3 <= mark <= 3 for mark in marks)
        assert row["domain"] == "general" and row["language"] == "english"


def test_the_same_responses_are_rated_one_by_one_in_the_layout_of_helpsteer2(folder: Path):
    compared, rated = (
        [json.loads(line) for line in gzip.decompress((folder / name).read_bytes()).splitlines()]
        for name in ("preference/train.jsonl.gz", "train.jsonl.gz")
    )
    labels = {name: float(rated[0][name]) for name in toy.attributes("say the first word : cat", "")}
    assert len(rated) == 2 * len(compared) == 1200
    for pair, first, second in zip(compared, rated[::2], rated[1::2], strict=True):
        prompt = pair["context"][-1]["content"]
        for row, response in ((first, pair["response1"]), (second, pair["response2"])):
            assert (row.pop("prompt"), row.pop("response")) == (prompt, response)
            assert row == toy.attributes(prompt, response)
    found = load_dataset(DataConfig(path=str(folder), format="helpsteer2"), "ratings")
    assert found.counts["validation"].read == 120
    assert found.train[0].ratings == labels


def test_every_quality_and_few_ties(folder: Path):
    rows = load_dataset(DataConfig(path=str(folder))).train
    scores = Counter(
        toy.score(toy.instruction_of(row.context), text) for row in rows for text in (row.response1, row.response2)
    )
    assert set(scores) == {0, 1, 2, 3, 4} and min(scores.values()) > 60
    assert 0 < sum(row.preference == 0 for row in rows) < 60


def test_splits_share_no_prompt_and_no_prompt_repeats(folder: Path):
    data = load_dataset(DataConfig(path=str(folder)))
    train, validation = ({row.context for row in rows} for rows in (data.train, data.validation))
    assert (len(train), len(validation)) == (600, 60)
    assert not train & validation


def test_written_bytes_depend_on_the_seed_alone(tmp_path: Path):
    def contents(name: str, seed: int) -> dict[str, bytes]:
        root = toy.write_toy(tmp_path / name, 5, 5, seed)
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    first = contents("a", 3)
    assert first == contents("b", 3)
    assert first != contents("c", 4)
    assert "tokenizer/tokenizer.json" in first


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2"])
def test_tokenizer_round_trip_beside_a_model(folder: Path, model_type: str | None):
    config = folder / "tokenizer" / "config.json"
    if model_type:
        config.write_text(json.dumps({"model_type": model_type}))
    else:
        config.unlink(missing_ok=True)
    tokenizer = load_tokenizer(folder / "tokenizer")
    special = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special == (0, 1, 2, 3)
    renderer = Renderer(tokenizer)
    messages = [Message("user", "reverse the words : cat dog")]
    prompt = renderer.prompt_ids(messages)
    assert " ".join(tokenizer.convert_ids_to_tokens(prompt)) == "<s> <user> reverse the words : cat dog <assistant>"
    response = renderer.response_ids(messages, "dog cat")
    assert tokenizer.convert_ids_to_tokens(response) == ["dog", "cat", "</s>"]
    assert renderer.text(response) == "dog cat"
    assert renderer.stop_ids == (2,)


def test_no_word_is_unknown_to_the_tokenizer(folder: Path):
    renderer = Renderer(load_tokenizer(folder / "tokenizer"))
    sequences, counts = tokenize_demonstrations(
        load_dataset(DataConfig(path=str(folder))).train, renderer, "all", 99, 99
    )
    assert counts["kept"] == 1200
    assert renderer.tokenizer.unk_token_id not in sequences.responses.ids_N.tolist()
    assert renderer.tokenizer.unk_token_id not in sequences.prompts.ids_N.tolist()
