"""What a user reads when an evaluation cannot be: each case with its place, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import judge_row, lines, reward2_row, reward_row, rm_row

from align import cli
from align.config import BenchmarkDataConfig, RewardEvaluationConfig
from align.config.load import build_config
from align.errors import AlignError, ConfigError, DataError
from align.eval import benchmarks, stored_scores
from align.eval.reward import planned

ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rm two chosen": ("rm-bench", rm_row(0, domain="chat", chosen=["a", "b"]), "chosen has not three responses: ['a'"),
    "rm domain": ("rm-bench", rm_row(0, domain="poetry"), "domain begins with none of chat, math, code, safety: 'poet"),
    "rm file name": ("rm-bench", rm_row(0), "domain begins with none of chat, math, code, safety: 'rows'"),
    "judge label": ("judgebench", judge_row(0, label="A=B"), "label is neither A>B nor B>A: 'A=B'"),
    "judge source": ("judgebench", judge_row(0, source="mmlu"), "source begins with none of mmlu-pro, livebench-reas"),
    "judge text": ("judgebench", judge_row(0, response_A=None), "response_A is NoneType, not text"),
    "judge scores": ("judgebench", {"pair_id": "1", "source": "mmlu-pro", "label": "A>B"}, "question is missing"),
    "reward subset": ("rewardbench", reward_row(0, subset="chat"), "subset is none of RewardBench: 'chat'"),
    "reward prompt": ("rewardbench", reward_row(0, prompt=""), "prompt ends with an empty user turn: ''"),
    "reward2 chosen": ("rewardbench2", reward2_row(0, chosen="yes"), "chosen is not a list of texts: 'yes'"),
    "reward2 four": ("rewardbench2", reward2_row(0, rejected=["a"]), "chosen and rejected are not one and three respo"),
    "reward2 count": ("rewardbench2", reward2_row(0, num_correct=2), "num_correct is outside 1 to 1: 2"),
    "reward2 tie": ("rewardbench2", reward2_row(0, subset="Ties"), "id of a tie is neither ref:n nor tied:n: '0'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_breaks_the_schema(case: str, tmp_path: Path):
    name, row, message = ROWS[case]
    file = lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as caught:
        benchmarks.load(name, BenchmarkDataConfig(str(file)))
    assert str(caught.value).startswith(f"{file}:1: {message}")
    assert f"remedy: give the files of {name}, or leave such rows out" in str(caught.value)


def test_an_id_twice(tmp_path: Path):
    file = lines(tmp_path / "rows.jsonl", [judge_row(0), judge_row(1), judge_row(0)])
    with pytest.raises(DataError, match=r":3: id 'pair-0' occurs twice\n  remedy: give each file once"):
        benchmarks.load("judgebench", BenchmarkDataConfig(str(file)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "there is no such file or folder"),
        (lambda folder: folder, "no .jsonl, .jsonl.gz, .json, .parquet file in this folder"),
        (lambda folder: lines(folder / "x.jsonl", []), "no items are left"),
        (lambda folder: _written(folder / "x.json", "{}"), "is not a JSON list of items"),
        (lambda folder: _written(folder / "x.json", "[{"), "is not JSON: Expecting property name"),
        (lambda folder: _written(folder / "x.jsonl", "[1]"), ":1: row is not a JSON object: [1]"),
    ],
)
def test_a_source_that_cannot_be_used(make: Callable[[Path], Path], message: str, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        benchmarks.load("rm-bench", BenchmarkDataConfig(str(make(tmp_path))))
    assert message in str(caught.value) and "remedy:" in str(caught.value)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GOOD = [{"id": f"pair-{n}", "scores": [1.0, 0.0]} for n in range(8)]
SCORES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "missing": (GOOD[:5], "3 of 8 ids have no scores, the first is 'pair-5'"),
    "twice": ([*GOOD, GOOD[2]], "1 of 8 ids occur twice, the first is 'pair-2'"),
    "unknown": ([*GOOD, {"id": "x", "scores": [1, 0]}], "1 of 9 ids are not in"),
    "too many": ([*GOOD[:7], {"id": "pair-7", "scores": [1, 0, 2]}], "1 of 8 ids have another number of scores than"),
    "nan": ([*GOOD[:7], {"id": "pair-7", "scores": [float("nan"), 0]}], "1 of 8 ids have a score that is not a finit"),
    "text": ([{"id": "pair-0", "scores": ["1", 0]}], ":1: scores is not a list of numbers: ['1', 0]"),
    "no scores": ([{"id": "pair-0"}], ":1: scores is missing"),
    "games": ([judge_row(0, judgments=[{}, {}, {}])], ":1: judgments are not one or two games"),
    "neither": ([judge_row(0)], ":1: scores is missing, and judgments too"),
    "label": ([judge_row(0, label="C", scores=[1, 2])], ":1: label is neither A>B nor B>A: 'C'"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_do_not_belong_to_the_items(case: str, tmp_path: Path, judge_data: Path):
    rows, message = SCORES[case]
    file = lines(tmp_path / "scores.jsonl", rows)
    benchmark = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))
    with pytest.raises(DataError) as caught:
        stored_scores.read(file, "judgebench", benchmark)
    assert message in str(caught.value) and str(caught.value).startswith(str(file)) and "remedy:" in str(caught.value)


def test_scores_alone_must_describe_their_items(tmp_path: Path):
    with pytest.raises(DataError, match="8 lines with scores, which do not describe their items"):
        stored_scores.read(lines(tmp_path / "scores.jsonl", GOOD), "judgebench", None)


def test_scores_of_another_benchmark(tmp_path: Path, judge_data: Path):
    items = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data))).items
    file = lines(tmp_path / "items.jsonl", [one.record() | {"scores": [1, 0]} for one in items])
    with pytest.raises(DataError, match=":1: id is of no item of rm-bench: 'pair-0'"):
        stored_scores.read(file, "rm-bench", None)
    with pytest.raises(DataError, match=":1: pair_id is a field of JudgeBench, not of rewardbench"):
        stored_scores.read(lines(tmp_path / "x.jsonl", [judge_row(0, scores=[1, 2])]), "rewardbench", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark=judgebench"], "benchmark judgebench needs either reward.path or scores: scores ''"),
        (
            ["benchmark=judgebench", "reward.path=m", "scores=s"],
            "benchmark judgebench needs either reward.path or scores: scores 's'",
        ),
        (["benchmark=heldout", "reward.path=m"], "benchmark heldout has no hub id and needs data.path: ''"),
        (["benchmark=heldout", "reward.path=m", "data.path=d", "data.split=test"], "data.split is validation or train"),
        (["benchmark=rm-bench", "reward.path=m", "prior_sets=true"], "prior_sets belongs to benchmark rewardbench"),
        (["benchmark=rm-bench", "reward.path=m", "confidence=95"], "confidence lies in (0, 1): 1000, 95.0"),
        (["benchmark=rm-bench", "reward.path=m", "resamples=-1"], "resamples must not be negative"),
        (["benchmark=rm-bench", "reward.path=m", "data.max_items=0"], "max_items must be positive: 0"),
        (["benchmark=mt-bench", "reward.path=m"], "'mt-bench'"),
        (["reward.path=m"], "benchmark: has no value"),
        (["benchmark=rm-bench", "model=m"], "model"),
    ],
)
def test_a_configuration_that_cannot_be(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        build_config(RewardEvaluationConfig, None, overrides)
    assert message in str(caught.value) and str(caught.value).startswith("command line")


def test_the_command_ends_with_the_status_of_the_error(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["eval", "reward", "--benchmark", "rm-bench", "--model", "m", "--data", "no-such-folder"]) == 78
    assert "data.path=no-such-folder: there is no such file or folder" in capsys.readouterr().err


def test_benchmarks_of_a_recipe_are_looked_at_before_it_starts(tmp_path: Path, judge_data: Path):
    class Recipe:
        def __init__(self, **found: str):
            self.found = found

        def evaluations(self) -> dict[str, str]:
            return self.found

    with pytest.raises(AlignError, match="benchmarks: 'mmlu' is no benchmark\n  remedy: known: rm-bench, judgebench"):
        planned(Recipe(mmlu=str(judge_data)))
