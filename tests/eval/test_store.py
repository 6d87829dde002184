"""Scoring that is cut short and goes on: nothing is asked twice, nothing is lost, nothing foreign is taken over."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console

from align.config import BenchmarkDataConfig
from align.data.chat import Dialogue
from align.errors import ConfigError, DataError, LockError, ModelError
from align.eval import benchmarks
from align.eval import store as scoring
from align.eval.items import Benchmark
from align.utils.atomic_write import write_atomic

MANIFEST = {"version": 1, "benchmark": "judgebench", "items": "i", "model": "m"}
QUIET = Console(quiet=True)


@pytest.fixture
def benchmark(judge_data: Path) -> Benchmark:
    return benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))


class Judge:
    """Gives each response the number of its characters, and breaks down when told."""

    def __init__(self, requests: int = 1000, broken: str = ""):
        self.left, self.broken, self.asked = requests, broken, []
        self.sizes: list[int] = []

    def __call__(self, dialogues: Sequence[Dialogue], groups: Sequence[int]) -> list[float]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.sizes += [len(list(group)) for _, group in groupby(groups)]
        self.asked += dialogues
        return [float("nan") if one.response == self.broken else float(len(one.response)) for one in dialogues]


def complete(folder: Path, benchmark: Benchmark, judge: Judge, most: int = 4) -> dict[str, list[float]]:
    with scoring.opened(folder, MANIFEST) as store:
        scoring.complete(benchmark, store, judge, most, QUIET)
        return dict(store.scores)


def expected(benchmark: Benchmark) -> dict[str, list[float]]:
    return {item.id: [float(len(one)) for one in item.responses] for item in benchmark.items}


def test_requests_are_filled_up_and_whole(benchmark: Benchmark):
    sizes = [[item.id for item in batch] for batch in scoring.requests(benchmark.items, 5)]
    assert sizes == [[f"pair-{n}", f"pair-{n + 1}"] for n in (0, 2, 4, 6)]
    assert [len(batch) for batch in scoring.requests(benchmark.items, 1)] == [1] * 8
    assert list(scoring.requests([], 4)) == []


def test_goes_on_after_a_kill_and_asks_for_nothing_twice(tmp_path: Path, benchmark: Benchmark):
    first, second = Judge(requests=2), Judge()
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, benchmark, first)
    assert complete(tmp_path, benchmark, second) == expected(benchmark)
    assert first.asked + second.asked == [one for item in benchmark.items for one in item.dialogues]
    assert first.sizes + second.sizes == [item.num_responses for item in benchmark.items]
    third = Judge()
    assert complete(tmp_path, benchmark, third) == expected(benchmark) and third.asked == []


def test_a_line_cut_in_half_is_asked_for_again(tmp_path: Path, benchmark: Benchmark):
    complete(tmp_path, benchmark, Judge())
    path = tmp_path / scoring.ITEMS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    judge = Judge()
    assert complete(tmp_path, benchmark, judge) == expected(benchmark)
    assert judge.asked == benchmark.items[-1].dialogues
    assert path.read_bytes() == whole


def test_items_without_a_finite_score_are_not_written(tmp_path: Path, benchmark: Benchmark):
    with pytest.raises(ModelError, match="1 of 8 items have no finite score") as caught:
        complete(tmp_path, benchmark, Judge(broken="answer 3"))
    assert "the same command asks for these again" in str(caught.value)
    assert len((tmp_path / scoring.ITEMS).read_text().splitlines()) == 7
    judge = Judge()
    assert complete(tmp_path, benchmark, judge) == expected(benchmark)
    assert judge.asked == benchmark.items[3].dialogues


@pytest.mark.parametrize("name", ["model", "items"])
def test_another_model_and_other_items_are_refused(tmp_path: Path, benchmark: Benchmark, name: str):
    complete(tmp_path, benchmark, Judge())
    with (
        pytest.raises(ConfigError, match=f"scores of another {name}: '{name[0]}', not 'x'"),
        scoring.opened(tmp_path, MANIFEST | {name: "x"}),
    ):
        pass
    assert complete(tmp_path, benchmark, Judge(requests=0)) == expected(benchmark)


def test_a_file_that_is_there_for_another_reason_is_left_alone(tmp_path: Path):
    (tmp_path / scoring.ITEMS).write_text("mine\n")
    with pytest.raises(ConfigError, match="has items.jsonl but no manifest.json"), scoring.opened(tmp_path, MANIFEST):
        pass
    assert (tmp_path / scoring.ITEMS).read_text() == "mine\n"


def test_one_process_at_a_time(tmp_path: Path):
    with (
        scoring.opened(tmp_path, MANIFEST),
        pytest.raises(LockError, match="another process writes here"),
        scoring.opened(tmp_path, MANIFEST),
    ):
        pass


@pytest.mark.parametrize("name", [scoring.ITEMS, scoring.MANIFEST])
def test_a_damaged_file_is_named(tmp_path: Path, benchmark: Benchmark, name: str):
    complete(tmp_path, benchmark, Judge())
    file = tmp_path / name
    file.write_text("{]\n" + file.read_text())
    with pytest.raises(DataError, match=f"{name}.*is damaged"), scoring.opened(tmp_path, MANIFEST):
        pass


def test_a_file_is_written_whole(tmp_path: Path):
    write_atomic(tmp_path / "x.json", "1")
    write_atomic(tmp_path / "x.json", "2")
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"] and (tmp_path / "x.json").read_text() == "2"


def test_about_ten_lines_where_there_is_no_terminal(tmp_path: Path, benchmark: Benchmark):
    console = Console(record=True, width=100)
    with scoring.opened(tmp_path, MANIFEST) as store:
        scoring.complete(benchmark, store, Judge(), 4, console)
    assert console.export_text().splitlines() == [f"judgebench: {n} of 8 items" for n in (2, 4, 6, 8)]


def test_lines_can_be_judged_again(tmp_path: Path, benchmark: Benchmark):
    complete(tmp_path, benchmark, Judge())
    row = json.loads((tmp_path / scoring.ITEMS).read_text().splitlines()[0])
    assert row["scores"] == [16.0, 8.0] and row["lengths"] == [16, 8] and row["tags"]["domain"] == "coding"
