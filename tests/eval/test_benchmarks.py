"""Benchmarks in the files of their authors."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from benchmark_rows import judge_row, lines, reward2_row, reward_row, rm_row

from align.config import BenchmarkDataConfig, DataConfig
from align.data import dataset, toy
from align.errors import DataError
from align.eval import benchmarks


def test_rm_bench_takes_the_domain_from_the_name_of_the_file(tmp_path: Path):
    (tmp_path / "chat_filtered.json").write_text(json.dumps([rm_row(0), rm_row(1)]))
    (tmp_path / "safety-refuse_filtered.json").write_text(json.dumps([rm_row(0)]))
    found = benchmarks.load("rm-bench", BenchmarkDataConfig(str(tmp_path)))
    assert [one.id for one in found.items] == ["chat/0", "chat/1", "safety-refuse/0"]
    first = found.items[0]
    assert first.responses == ("good0", "good0good0", "good0good0good0", "bad0", "bad0bad0", "bad0bad0bad0")
    assert (first.num_right, first.num_responses, first.lengths) == (3, 6, (5, 10, 15, 4, 8, 12))
    assert first.dialogues[3].response == "bad0" and first.context[0] == ("user", "question 0?")
    assert found.notes == ["without domain code, math: averages are over the others"]


def test_rm_bench_has_the_domain_in_one_file_of_all(tmp_path: Path):
    file = tmp_path / "total_dataset.json"
    file.write_text(json.dumps([rm_row(0, domain="math"), rm_row(0, domain="code")]))
    found = benchmarks.load("rm-bench", BenchmarkDataConfig(str(file)))
    assert [one.tags["domain"] for one in found.items] == ["math", "code"]


def test_judgebench_puts_the_right_response_first(judge_data: Path):
    found = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))
    assert found.items[0].responses == ("another answer 0", "answer 0")  # B>A
    assert found.items[1].responses == ("answer 1", "another answer 1")
    assert Counter(one.tags["domain"] for one in found.items) == {"knowledge": 4, "coding": 4}


def test_the_split_picks_files_by_their_name(judge_data: Path):
    lines(judge_data / "claude-3.jsonl", [judge_row(100)])
    lines(judge_data / "scores.jsonl", [{"pair_id": "x"}])
    assert len(benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data))).items) == 8
    other = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data), split="claude"))
    assert [one.id for one in other.items] == ["pair-100"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_items(tmp_path: Path, suffix: str):
    rows, file = [reward_row(n) for n in range(3)], tmp_path / f"filtered.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = benchmarks.load("rewardbench", BenchmarkDataConfig(str(tmp_path)))
    assert [one.id for one in found.items] == ["alpacaeval-easy/0", "hep-go/1", "alpacaeval-easy/2"]
    assert [one.tags["domain"] for one in found.items] == ["chat", "reasoning", "chat"]


def test_rewardbench_2_keeps_the_two_items_of_a_tie_together(tmp_path: Path):
    rows = [
        reward2_row(0),
        reward2_row(1, id="tied:7", subset="ties", chosen=["a", "b"], rejected=["c"], num_correct=2),
        reward2_row(2, id="ref:7", subset="Ties", chosen=["a"], rejected=["c", "d"]),
    ]
    found = benchmarks.load("rewardbench2", BenchmarkDataConfig(str(lines(tmp_path / "test.jsonl", rows)))).items
    assert [(one.num_right, one.num_responses, one.tags["subset"]) for one in found] == [
        (1, 4, "Math"),
        (2, 3, "Ties"),
        (1, 3, "Ties"),
    ]
    assert found[1].prompt == found[2].prompt != found[0].prompt


def test_the_hub_is_asked_for_the_split_that_the_authors_report(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(path: str, **more: object) -> datasets.Dataset:
        asked.append((path, more))
        return datasets.Dataset.from_list([judge_row(0)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = benchmarks.load("judgebench", BenchmarkDataConfig(revision="abc"))
    assert asked == [("ScalerLab/JudgeBench", {"split": "gpt", "revision": "abc"})]
    assert found.source == "ScalerLab/JudgeBench" and len(found.items) == 1


def test_heldout_pairs_have_their_strength_and_lose_ties(tmp_path: Path):
    folder = toy.write_toy(tmp_path / "toy", 40, 30, seed=0)
    found = benchmarks.load("heldout", BenchmarkDataConfig(str(folder)))
    assert {one.strength for one in found.items} <= {1, 2, 3} and found.items[0].tags["domain"]
    assert len({one.id for one in found.items}) == len(found.items)
    train = benchmarks.load("heldout", BenchmarkDataConfig(str(folder), split="train", max_items=5))
    assert len(train.items) == 5 and "only the first 5 items" in train.notes


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", [reward_row(0), reward_row(1, subset="none"), reward_row(2)])
    found = benchmarks.load("rewardbench", BenchmarkDataConfig(str(file), bad_rows="skip"))
    assert len(found.items) == 2 and found.notes[0] == "1 rows left out: subset is none of RewardBench"


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path):
    def fingerprint(*rows: dict) -> str:
        return benchmarks.load(
            "judgebench", BenchmarkDataConfig(str(lines(tmp_path / "x.jsonl", list(rows))))
        ).fingerprint

    one = fingerprint(judge_row(0), judge_row(1))
    assert one == fingerprint(judge_row(0), judge_row(1))
    assert one != fingerprint(judge_row(1), judge_row(0))
    assert one != fingerprint(judge_row(0), judge_row(1, response_A="Answer 1"))


class TestRealData:
    def test_rm_bench_has_the_items_that_the_papers_count(self, shared: Path):
        found = benchmarks.load("rm-bench", BenchmarkDataConfig(str(shared / "rm-bench")))
        counts = Counter(one.tags["domain"] for one in found.items)
        assert counts == {"chat": 129, "code": 228, "safety-refuse": 284, "safety-response": 157}

    def test_judgebench_has_the_pairs_that_the_papers_count(self, shared: Path):
        found = benchmarks.load("judgebench", BenchmarkDataConfig(str(shared / "judgebench")))
        counts = Counter(one.tags["domain"] for one in found.items)
        assert counts == {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42} and not found.notes

    def test_stored_scores_beside_the_data_are_not_taken_for_it(self, shared: Path):
        with pytest.raises(DataError, match="question is missing"):
            benchmarks.load("judgebench", BenchmarkDataConfig(str(shared / "judgebench"), split="scores"))


def test_what_a_recipe_holds_out_is_read_alone(tmp_path: Path):
    """Its own part of the prompts, with its own columns; a bad row of train stops nothing."""
    rows = [{"question": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    file = lines(tmp_path / "own.jsonl", rows) or tmp_path / "own.jsonl"
    with file.open("a") as stream:
        stream.write("{\n")
    data = DataConfig(path=str(file), columns={"prompt": "question"}, validation=0.3)
    found = benchmarks.held_out(data)
    held_out, _ = dataset.load_validation(data)
    assert [item.context for item in found.items] == [row.context for row in held_out] and len(held_out) > 3
