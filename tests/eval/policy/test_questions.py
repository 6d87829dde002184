"""Questions and answers as their authors publish them, and rows that cannot be used."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from question_rows import arena_answer, arena_row, lines, mt_row, old_arena_row, reference_row, wild_row

from align.config import QuestionDataConfig
from align.data.chat import Message
from align.errors import DataError
from align.eval.policy import metrics, questions
from align.eval.policy.questions import PolicyAnswer


def load(name: str, path: Path, **more: Any) -> questions.Questions:
    return questions.load(name, QuestionDataConfig(str(path), **more))


def test_both_versions_of_arena_hard(tmp_path: Path):
    """Answers in the folder are no questions."""
    lines(tmp_path / "v2" / "model_answer" / "m.jsonl", [arena_answer(0, "x")])
    lines(tmp_path / "v2" / "question.jsonl", [arena_row(n) for n in range(3)])
    new = load("arena-hard", tmp_path / "v2")
    old = load("arena-hard", lines(tmp_path / "v1.jsonl", [old_arena_row(n) for n in range(3)]))
    assert [one.id for one in new.items] == [one.id for one in old.items] == ["u0", "u1", "u2"]
    assert [one.context for one in new.items] == [one.context for one in old.items]
    assert [one.category for one in new.items] == ["creative_writing", "hard_prompt", "hard_prompt"]


def test_two_turns_of_mt_bench_and_their_references(tmp_path: Path):
    lines(tmp_path / "question.jsonl", [mt_row(0), mt_row(1, reference=["own", "own too"]), mt_row(3)])
    lines(tmp_path / "reference_answer" / "gpt-4.jsonl", [reference_row(1)])
    found = load("mt-bench", tmp_path).items
    assert [one.references for one in found] == [(), ("right 1", "right again 1"), ()]  # the file wins
    assert found[0].conversation(["first"]) == (
        Message("user", "question 0?"),
        Message("assistant", "first"),
        Message("user", "and 0 again?"),
    )
    assert found[0].conversation([]) == (Message("user", "question 0?"),)
    with pytest.raises(DataError, match="1 questions of math, reasoning, coding have no reference answer: 84"):
        questions.require_references(found)
    hub = [{"prompt": ["a", "b"], "prompt_id": 7, "category": "math", "reference": ["c", "d"]}]
    (one,) = load("mt-bench", lines(tmp_path / "hub.jsonl", hub)).items
    assert (one.id, one.follow_ups, one.references) == ("7", ("b",), ("c", "d"))


def test_wildbench_groups_its_tags(tmp_path: Path):
    found = load("wildbench", lines(tmp_path / "w.jsonl", [wild_row(0), wild_row(1)])).items
    assert found[0].tasks == ("Math & Data Analysis", "Planning & Reasoning")  # Math and Data Analysis count once
    assert found[1].category == "Creative Tasks" and len(found[1].context) == 3
    assert found[0].checklist == ("Is it right?", "Is it short?")
    assert set(questions.TASKS.values()) == set(metrics.TASK_WEIGHTS)


def test_prompts_of_ones_own(tmp_path: Path):
    given = [
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": "b"}], "id": 9},
        {"context": "c", "category": "d"},
    ]
    found = load("prompts", lines(tmp_path / "p.jsonl", given)).items
    assert [(one.id, one.category, one.context[0].content) for one in found] == [
        ("0", "all", "a"),
        ("9", "all", "b"),
        ("2", "d", "c"),
    ]


def test_categories_and_first_questions(tmp_path: Path):
    file = lines(tmp_path / "q.jsonl", [arena_row(n) for n in range(7)])
    found = load("arena-hard", file, categories=["hard_prompt"], max_items=2)
    assert [one.id for one in found.items] == ["u1", "u2"]
    assert found.notes == ["1 questions of other categories left out", "only the first 2 questions"]
    with pytest.raises(DataError, match="no questions are left, 7 are of other categories"):
        load("arena-hard", file, categories=["x"])
    assert found.fingerprint != load("arena-hard", file).fingerprint


def test_the_hub_is_asked_for_the_config_and_split(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(path: str, **more: object) -> datasets.Dataset:
        asked.append((path, more))
        return datasets.Dataset.from_list([wild_row(0)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(questions.load("wildbench", QuestionDataConfig(revision="abc")).items) == 1
    assert asked == [("allenai/WildBench", {"name": "v2", "split": "test", "revision": "abc"})]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("arena-hard", arena_row(0, prompt=" "), "ends with an empty user turn"),
        ("arena-hard", arena_row(0, uid=None), "uid or question_id is neither text nor a number"),
        ("arena-hard", {"uid": "a", "category": "c", "turns": []}, "turns is not a list of turns"),
        ("arena-hard", {"uid": "a", "category": "c", "turns": [{"content": "a"}, {"content": "b"}]}, "is not one turn"),
        ("arena-hard", {"uid": "a", "prompt": "p"}, "category is missing"),
        ("mt-bench", mt_row(0, turns=["a"]), "turns are not two"),
        ("mt-bench", mt_row(0, reference=["a"]), "reference is neither none nor two"),
        ("wildbench", wild_row(0, primary_tag="Maths"), "is none of Information seeking"),
        ("wildbench", wild_row(0, checklist=[]), "checklist is not a list of texts"),
        (
            "wildbench",
            wild_row(0, conversation_input=[{"role": "assistant", "content": "a"}]),
            "roles do not alternate",
        ),
        ("prompts", {"question": "a"}, "prompt is missing"),
        ("prompts", {"prompt": 3}, "prompt is neither text nor a list of turns"),
    ],
)
def test_a_row_that_breaks_the_schema_is_named(tmp_path: Path, name: str, row: dict[str, Any], problem: str):
    file = lines(tmp_path / "q.jsonl", [row])
    with pytest.raises(DataError) as caught:
        load(name, file)
    assert problem in str(caught.value) and f"{file}:1" in str(caught.value)


def test_a_question_twice_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r":2: id 'u0' occurs twice"):
        load("arena-hard", lines(tmp_path / "q.jsonl", [arena_row(0), arena_row(0)]))


def test_two_files_of_references_are_one_too_many(tmp_path: Path):
    lines(tmp_path / "question.jsonl", [mt_row(1)])
    for name in "ab":
        lines(tmp_path / "reference_answer" / f"{name}.jsonl", [reference_row(1)])
    with pytest.raises(DataError, match="data.references"):
        load("mt-bench", tmp_path)
    found = load("mt-bench", tmp_path, references=str(tmp_path / "reference_answer" / "a.jsonl"))
    assert found.items[0].references[0] == "right 1"


class TestAnswers:
    @pytest.mark.parametrize(
        ("row", "id", "texts"),
        [
            ({"id": "a", "answers": ["x", "y"], "tokens": [1, 2], "finished": [True, False]}, "a", ("x", "y")),
            ({"question_id": 81, "choices": [{"turns": ["x", "y"]}]}, "81", ("x", "y")),
            ({"question_id": "q", "choices": [{"turns": [{"content": "x"}]}]}, "q", ("x",)),
            (arena_answer(1, "x"), "u1", ("x",)),
            ({"uid": "u", "messages": [{"role": "assistant", "content": "x"}]}, "u", ("x",)),
            ({"session_id": "s", "output": ["x"]}, "s", ("x",)),
        ],
    )
    def test_every_layout(self, tmp_path: Path, row: dict[str, Any], id: str, texts: tuple[str, ...]):
        (found,) = questions.stored(lines(tmp_path / "a.jsonl", [row])).items()
        assert (found[0], found[1].texts) == (id, texts)

    def test_a_json_list(self, tmp_path: Path):
        (tmp_path / "m.json").write_text(json.dumps([{"session_id": "s", "output": ["x"]}]))
        assert questions.stored(tmp_path / "m.json") == {"s": PolicyAnswer(("x",))}

    @pytest.mark.parametrize(
        "row",
        [
            {"id": "a"},
            {"answers": ["x"]},
            {"id": "a", "answers": []},
            {"id": "a", "choices": []},
            {"id": "a", "choices": [{"turns": [3]}]},
            {"id": "a", "messages": [{"role": "user", "content": "x"}]},
            {"id": True, "answers": ["x"]},
            {"id": "a", "answers": ["x"], "tokens": 5},
            {"id": "a", "answers": ["x"], "tokens": [5, 6]},
            {"id": "a", "answers": ["x"], "finished": ["no"]},
        ],
    )
    def test_rows_that_hold_none(self, tmp_path: Path, row: dict[str, Any]):
        file = lines(tmp_path / "a.jsonl", [row])
        with pytest.raises(DataError) as caught:
            questions.stored(file)
        assert f"{file}:1" in str(caught.value)

    def test_lacking_and_doubled_ones(self, tmp_path: Path):
        items = load("mt-bench", lines(tmp_path / "q.jsonl", [mt_row(0), mt_row(2)])).items
        with pytest.raises(DataError, match="1 of 2 questions have no answer, the first is '83'"):
            questions.matched(items, {"81": PolicyAnswer(("x", "y"))}, "f")
        with pytest.raises(DataError, match="question '83' has 2 turns and 1 answers"):
            questions.matched(items, {"81": PolicyAnswer(("x", "y")), "83": PolicyAnswer(("x",))}, "f")
        row = {"id": "a", "answers": ["x"]}
        with pytest.raises(DataError, match="question 'a' is answered twice"):
            questions.stored(lines(tmp_path / "a.jsonl", [row, row]))
        with pytest.raises(DataError, match="there is no such file"):
            questions.stored(tmp_path / "none.jsonl")

    def test_reasoning_is_not_shown(self):
        assert PolicyAnswer(("<think>a</think>b", "c", "<think>d")).shown == ("b", "c", "")
