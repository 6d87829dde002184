"""The command as a whole, with functions in place of models."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_judge
import pytest
from question_rows import arena_answer, arena_row, lines, mt_row, reference_row, wild_row

from align import cli, commands
from align.config import PolicyEvaluationConfig, SamplingConfig, VerdictConfig
from align.config.load import build_config
from align.data import toy
from align.data.chat import Message
from align.errors import ConfigError
from align.eval import arguments
from align.eval.policy import judge as judging
from align.eval.policy import main
from align.eval.policy.judge import JudgePromptBuilder
from align.eval.policy.questions import PolicyAnswer, Question
from align.eval.store import Rows, locked
from align.generators.base import Completion, Request
from align.report import policy as report
from align.rewards import genrm_card
from align.roles import CompletedFuture

HERE = Path(fake_judge.__file__)


def name(function: str) -> str:
    return f"{HERE}:{function}"


def run(out: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    """The results of a call, which must end with this status."""
    assert cli.main(["eval", "policy", *map(str, arguments), "--out", str(out)]) == status
    return json.loads((out / "policy.json").read_text()) if not status else {}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def values(results: dict[str, Any]) -> dict[str, float]:
    """All numbers by ``group/name``."""
    return {
        f"{group['name']}/{one}": found["value"]
        for group in results["groups"]
        for one, found in group["numbers"].items()
    }


@pytest.fixture
def arena(tmp_path: Path) -> tuple[Path, Path]:
    """Six questions, and a baseline that answers as long as 8 characters, but question 2 at great length."""
    folder = tmp_path / "arena-hard-v2.0"
    lines(folder / "question.jsonl", [arena_row(n) for n in range(6)])
    answers = [arena_answer(n, "x" * 200 if n == 2 else "12345678") for n in range(6)]
    return folder, lines(folder / "model_answer" / "o3-mini.jsonl", answers)


class TestArenaHard:
    def test_a_win_rate_by_hand(self, arena: tuple[Path, Path], tmp_path: Path):
        """Answers of 7 characters: against 8 lost weakly in both games, against 200 strongly: 0 of 16. The thorough
        policy (32 characters) wins 5 questions strongly and loses one strongly: 30 of 36."""
        command_line = ("--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("longer"))
        found = run(tmp_path / "short", *command_line, "--model", name("short"))
        assert values(found)["overall/win rate"] == 0 and found["judging"]["verdicts"] == {
            "A>>B": 1,
            "A>B": 5,
            "B>>A": 1,
            "B>A": 5,
        }
        found = run(tmp_path / "thorough", *command_line, "--model", name("thorough"))
        assert values(found)["overall/win rate"] == pytest.approx(100 * 30 / 36)
        assert values(found)["by category/creative_writing"] == 100  # 0 and 3
        assert values(found)["by category/hard_prompt"] == pytest.approx(75)
        assert found["judging"]["same winner in both orders"] == 1 and found["judging"]["won by the first"] == 0.5
        assert found["lengths"]["policy"]["characters"] == 32 and found["lengths"]["baseline"]["characters"] == 40

    def test_a_judge_with_a_favourite_place_says_nothing(self, arena: tuple[Path, Path], tmp_path: Path):
        command_line = ("--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("first"))
        found = run(tmp_path / "out", *command_line, "--model", name("short"))
        assert values(found)["overall/win rate"] == 50
        assert found["judging"]["same winner in both orders"] == 0 and found["judging"]["won by the first"] == 1

    def test_what_cannot_be_read_is_asked_again_and_left_out(self, arena: tuple[Path, Path], tmp_path: Path):
        command_line = ("--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("moody"))
        found = run(tmp_path / "out", *command_line, "--model", name("thorough"))
        assert found["sizes"] == {"questions": 6, "judged": 5, "games": 12}
        assert found["judging"]["unreadable"] == 2 and found["judging"]["asked again"] == 12
        assert values(found)["overall/win rate"] == pytest.approx(100 * 24 / 30)
        kept = rows(tmp_path / "out" / "verdicts.jsonl")
        assert {row["attempts"] for row in kept if row["id"] == "u1"} == {3}
        assert {row["attempts"] for row in kept if row["id"] != "u1"} == {2}
        assert "1 questions left out: a verdict on them cannot be read" in found["notes"]

    def test_a_judge_that_never_says_anything_gives_no_number(self, arena: tuple[Path, Path], tmp_path: Path, capsys):
        command_line = ("--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("short"))
        run(tmp_path / "out", *command_line, "--model", name("short"), status=78)
        assert "of none of 6 questions all verdicts can be read" in capsys.readouterr().err
        assert not (tmp_path / "out" / "policy.json").exists()

    def test_baselines_by_category(self, arena: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        other = lines(tmp_path / "other.jsonl", [arena_answer(n, "x" * 99) for n in range(6)])
        given = [f"baseline_answers.hard_prompt={arena[1]}", f"baseline_answers.creative_writing={other}"]
        command_line = ("--benchmark", "arena-hard", arena[0], "--judge", name("longer"), "--model", name("thorough"))
        found = run(tmp_path / "out", *given, *command_line)
        assert values(found)["by category/creative_writing"] == 0 and values(found)["by category/hard_prompt"] == 75
        run(tmp_path / "lacks", *given[:1], *command_line, status=78)
        assert "no answers for category 'creative_writing', only for hard_prompt" in capsys.readouterr().err

    def test_a_baseline_may_be_asked_too(self, arena: tuple[Path, Path], tmp_path: Path):
        command_line = ("--benchmark", "arena-hard", arena[0], "--judge", name("longer"))
        found = run(tmp_path / "out", *command_line, "--model", name("thorough"), "--baseline", name("short"))
        assert values(found)["overall/win rate"] == 100
        assert [row["answers"] for row in rows(tmp_path / "out" / "baseline.jsonl")] == [["short 1"]] * 6

    def test_a_generative_reward_model_may_judge(self, arena: tuple[Path, Path], tmp_path: Path):
        command_line = ("--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("boxed"))
        found = run(tmp_path / "out", "judge_form=helpsteer3", *command_line, "--model", name("thorough"))
        assert values(found)["overall/win rate"] == 100
        assert found["judging"]["verdicts"] == {"A>>B": 6, "B>>A": 6}
        found = run(tmp_path / "even", "judge_form=helpsteer3", *command_line, "--model", name("short"))
        assert values(found)["overall/win rate"] == 50 and found["judging"]["verdicts"] == {"A>B": 12}


class TestMarks:
    def test_mt_bench_means_and_references(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        lines(tmp_path / "mt" / "question.jsonl", [mt_row(n) for n in range(4)])
        command_line = ("--benchmark", "mt-bench", tmp_path / "mt", "--judge", name("longer"))
        run(tmp_path / "lacks", *command_line, "--model", name("short"), status=78)
        assert "2 questions of math, reasoning, coding have no reference answer: 82, 84" in capsys.readouterr().err
        lines(tmp_path / "mt" / "reference_answer" / "gpt-4.jsonl", [reference_row(n) for n in (1, 3)])
        given = [{"id": str(81 + n), "answers": ["thorough" if n else "bad", "thorough"[:n]]} for n in range(4)]
        answers = lines(tmp_path / "answers.jsonl", given)
        found = run(tmp_path / "stored", *command_line, "--answers", answers)
        assert values(found) == {  # marks 4 4, 9 4, 9 4, 9 4
            "overall/mark": pytest.approx((4 + 4 + 3 * 13) / 8),
            "by turn/first turn": pytest.approx(31 / 4),
            "by turn/second turn": 4,
            "by category/writing": pytest.approx((4 + 4 + 9 + 4) / 4),
            "by category/math": pytest.approx(6.5),
        }

    def test_the_second_turn_follows_the_first_answer_without_its_reasoning(self, tmp_path: Path):
        lines(tmp_path / "mt" / "question.jsonl", [mt_row(0)])
        command_line = ("--benchmark", "mt-bench", tmp_path / "mt", "--judge", name("longer"))
        run(tmp_path / "out", *command_line, "--model", name("thorough"))
        (row,) = rows(tmp_path / "out" / "items.jsonl")
        assert row["answers"][1] == "<think>hm</think>a thorough answer to and 0 again?"
        assert [one["verdict"] for one in row["verdicts"]] == [9, 9]

    def test_a_generative_reward_model_needs_no_reference(self, tmp_path: Path):
        lines(tmp_path / "mt" / "question.jsonl", [mt_row(n) for n in range(2)])
        command_line = ("judge_form=helpsteer3", "--benchmark", "mt-bench", tmp_path / "mt", "--judge", name("boxed"))
        found = run(tmp_path / "out", *command_line, "--model", name("short"))
        assert values(found)["overall/mark"] == 3.25  # a score of 2

    def test_wildbench(self, tmp_path: Path):
        """A thorough answer to all: mark 9, so 80."""
        file = lines(tmp_path / "wild.jsonl", [wild_row(n) for n in range(4)])
        command_line = ("--benchmark", "wildbench", file, "--judge", name("longer"), "--model", name("thorough"))
        found = run(tmp_path / "out", *command_line)
        assert values(found)["overall/WB-Score"] == values(found)["overall/WB-Score, tasks weighed"] == 80
        assert values(found)["marks/mark"] == 9 and values(found)["by task/Planning & Reasoning"] == 80

    def test_prompts_of_ones_own_with_and_without_baseline(self, tmp_path: Path):
        given = [{"prompt": "one?"}, {"context": [{"role": "user", "content": "two?"}], "category": "b"}]
        file = lines(tmp_path / "prompts.jsonl", given)
        command_line = ("--benchmark", "prompts", file, "--judge", name("longer"), "--model", name("thorough"))
        assert values(run(tmp_path / "marks", *command_line))["overall/mark"] == 9
        pairs = run(tmp_path / "pairs", *command_line, "--baseline", name("short"))
        assert values(pairs)["overall/win rate"] == 100


class TestFolder:
    def command_line(self, arena: tuple[Path, Path]) -> list[object]:
        return ["--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("longer")]

    def test_a_second_call_asks_for_nothing(self, arena: tuple[Path, Path], tmp_path: Path, monkeypatch):
        line = [*self.command_line(arena), "--model", name("short")]
        first = run(tmp_path / "out", *line)
        monkeypatch.setattr(main, "_company", None)
        assert run(tmp_path / "out", *line) == first

    def test_goes_on_after_a_kill_and_asks_for_nothing_twice(self, arena: tuple[Path, Path], tmp_path, monkeypatch):
        line, out = [*self.command_line(arena), "--model", name("short")], tmp_path / "out"
        whole = run(tmp_path / "whole", *line)
        monkeypatch.setattr(judging, "AT_ONCE", 2)
        asked: list[str] = []

        def killed(file, kept, calls, wanted=(judging.answer, judging.judge)):
            """Ends the call after so many writes to one of the files."""
            real, left = judging.Rows.write, [calls]

            def write(self, rows):
                asked.extend(f"{self.path.name} {row['id']} {row.get('swapped')}" for row in rows)
                real(self, rows)
                left[0] -= self.path.name == file
                if not left[0]:
                    raise KeyboardInterrupt

            monkeypatch.setattr(kept, "write", write)
            assert cli.main(["eval", "policy", *map(str, line), "--out", str(out)]) == 130
            monkeypatch.setattr(kept, "write", real)

        killed("answers.jsonl", judging.Rows, 2)
        killed("verdicts.jsonl", judging.Rows, 4)
        file = out / "verdicts.jsonl"
        file.write_bytes(file.read_bytes() + b'{"id": "u9", "tu')  # a line that was being written
        found = run(out, *line)
        assert found == whole and len(asked) == len(set(asked))
        assert (tmp_path / "whole" / "items.jsonl").read_bytes() == (out / "items.jsonl").read_bytes()

    def test_a_changed_key_is_refused_by_its_name(
        self, arena: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        line = [*self.command_line(arena), "--model", name("short")]
        run(tmp_path / "out", *line)
        changes = ("sampling.max_tokens=9", "judge_form=json", "attempts=9", "temperatures.hard_prompt=1")
        for change in changes:
            run(tmp_path / "out", change, *line, status=78)
            key = change.split("=")[0].removesuffix(".hard_prompt")
            assert f"holds answers and verdicts of another {key}:" in capsys.readouterr().err

    def test_other_functions_and_answers_are_refused(self, arena: tuple[Path, Path], tmp_path: Path, capsys):
        run(tmp_path / "out", *self.command_line(arena), "--model", name("short"))
        run(tmp_path / "out", *self.command_line(arena), "--model", name("thorough"), status=78)
        assert "of another policy.function" in capsys.readouterr().err
        run(tmp_path / "out", *self.command_line(arena), "--answers", arena[1], status=78)
        assert "of another" in capsys.readouterr().err

    def test_its_answers_may_be_judged_again(self, arena: tuple[Path, Path], tmp_path: Path):
        first = run(tmp_path / "out", *self.command_line(arena), "--model", name("thorough"))
        again = run(tmp_path / "again", *self.command_line(arena), "--answers", tmp_path / "out" / "answers.jsonl")
        assert values(again) == values(first)

    def test_intervals_and_resamples_may_change(self, arena: tuple[Path, Path], tmp_path: Path):
        line = [*self.command_line(arena), "--model", name("thorough")]
        first = run(tmp_path / "out", *line)
        wider = run(tmp_path / "out", "resamples=0", *line)
        assert values(first) == values(wider)
        assert all(one["low"] is None for group in wider["groups"] for one in group["numbers"].values())

    def test_every_verdict_stands_in_the_items_with_its_text(self, arena: tuple[Path, Path], tmp_path: Path):
        run(tmp_path / "out", *self.command_line(arena), "--model", name("short"))
        first = rows(tmp_path / "out" / "items.jsonl")[0]
        assert first["verdicts"] == [
            {"turn": 0, "swapped": False, "verdict": "A>B", "attempts": 1, "text": "[[A>B]]"},
            {"turn": 0, "swapped": True, "verdict": "B>A", "attempts": 1, "text": "[[B>A]]"},
        ]
        assert first["answers"] == ["short 1"] and first["baseline"] == ["12345678"]


def test_the_judge_is_asked_in_other_words(arena: tuple[Path, Path], tmp_path: Path, capsys):
    """Braces in an answer are no placeholders, and a file that lacks one is refused."""
    judge_file = tmp_path / "echo.py"
    judge_file.write_text("def f(messages, sample):\n    return str([m['content'] for m in messages]) + ' [[A=B]]'\n")
    words = tmp_path / "words.yaml"
    words.write_text("pair: {system: 'Judge {question}', user: 'A {answer_a} B {answer_b} {json}'}\n")
    answers = lines(tmp_path / "own.jsonl", [{"id": f"u{n}", "answers": ["{answer_b}"]} for n in range(6)])
    line = ["--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", f"{judge_file}:f"]
    run(tmp_path / "out", f"judge_prompt={words}", *line, "--answers", answers)
    text = rows(tmp_path / "out" / "verdicts.jsonl")[1]["text"]
    assert text == "['Judge question 0?', 'A {answer_b} B 12345678 {json}'] [[A=B]]"
    words.write_text("pair: {user: 'A {answer_a} {question}'}\n")
    run(tmp_path / "bad", f"judge_prompt={words}", *line, "--answers", answers, status=78)
    assert "pair: lacks {answer_b}" in capsys.readouterr().err


def configured(*words: object) -> PolicyEvaluationConfig:
    return arguments.policy(commands.build_parser().parse_args(["eval", "policy", *map(str, words)])).config


class TestOptions:
    """One word names a speaker, and what a recipe says of its own does not count for it."""

    def recipe(self, folder: Path, *rows: str) -> Path:
        file = folder / "r.yaml"
        file.write_text("".join(f"{row}\n" for row in ("benchmark: wildbench", *rows)))
        return file

    def test_another_kind(self, tmp_path: Path):
        policy = f"policy: {{path: {tmp_path}, trust_remote_code: true, init: {{a: 1}}, date: x, dtype: float32}}"
        judge = "judge: {kind: endpoint, url: 'http://h/v1', model: m, retries: 3}"
        recipe = self.recipe(tmp_path, policy, judge)
        found = configured(recipe, "--judge", "a/b.py:c", "--model", "https://h.org/v1#org/m")
        assert (found.judge.kind, found.judge.function) == ("function", "a/b.py:c")
        assert found.policy.kind == "endpoint"
        assert (found.policy.url, found.policy.model) == ("https://h.org/v1", "org/m")
        other = configured(recipe, "--judge", "http://o/v1#n", "--model", "org/model")
        assert (other.policy.path, other.policy.trust_remote_code, other.policy.dtype) == (
            "org/model",
            False,
            "float32",
        )
        assert other.judge.retries == 3

    def test_a_key_does_not_go_to_another_host(self, tmp_path: Path):
        """Nor do further fields; what the command line says of its own stays."""
        judge = "{kind: endpoint, url: 'http://h/v1', model: m, key_env: K, extra: {a: 1, b: 2}}"
        recipe = self.recipe(tmp_path, "policy: {path: p}", f"judge: {judge}")
        found = configured(recipe, "--judge", "http://other/v1#M").judge
        assert (found.url, found.model, found.key_env, found.extra) == ("http://other/v1", "M", "", {})
        words = ("judge.key_env=MINE", "judge.extra.c=3")
        found = configured(recipe, *words, "--judge", "http://other/v1#M").judge
        assert (found.key_env, found.extra) == ("MINE", {"c": 3})
        shipped = Path(__file__).parents[3] / "recipes" / "evaluation" / "arena-hard.yaml"
        found = configured(shipped, "baseline_answers.default=a.jsonl", "--judge", "http://other/v1#M")
        assert found.judge.key_env == ""

    def test_answers_stand_in_the_place_of_a_policy_and_a_policy_of_answers(self, tmp_path: Path):
        shipped = Path(__file__).parents[3] / "recipes" / "evaluation" / "arena-hard.yaml"
        for words in (("answers=a.jsonl",), ("--answers", "a.jsonl")):
            found = configured(shipped, "baseline_answers.default=b.jsonl", *words)
            assert found.answers == "a.jsonl" and found.policy is None
        recipe = self.recipe(tmp_path, "answers: a.jsonl", "judge: {path: j}")
        assert configured(recipe, "--model", "p").answers == ""
        with pytest.raises(ConfigError, match="give either policy"):
            configured(recipe, "--model", "p", "--answers", "a.jsonl")

    def test_a_baseline_of_one_form_stands_in_the_place_of_the_other(self, tmp_path: Path):
        file = lines(tmp_path / "answers.jsonl", [])
        more = ("benchmark=arena-hard", "policy.path=p", "judge.path=j")
        recipe = self.recipe(tmp_path, "baseline_answers: {one: x.jsonl, two: y.jsonl}")
        assert configured(recipe, *more, "--baseline", file).baseline_answers == {"default": str(file)}
        found = configured(recipe, *more, "--baseline", "org/model")
        assert (found.baseline.path, found.baseline_answers) == ("org/model", {})
        recipe = self.recipe(tmp_path, "baseline: {kind: endpoint, url: 'http://h/v1', model: m}")
        found = configured(recipe, *more, "--baseline", file)
        assert found.baseline is None and found.baseline_answers == {"default": str(file)}

    def test_a_second_file_is_refused(self):
        with pytest.raises(ConfigError, match="--benchmark prompts a b: more than one file"):
            configured("--benchmark", "prompts", "a", "b", "--model", "p", "--judge", "j")


def test_a_shipped_recipe_without_a_baseline(tmp_path: Path):
    """Its placement names one."""
    recipe = Path(__file__).parents[3] / "recipes" / "evaluation" / "prompts.yaml"
    file = lines(tmp_path / "prompts.jsonl", [{"prompt": "one?"}])
    own = (f"data.path={file}", "executor=local", "judge_custom_roles=false")
    found = run(tmp_path / "out", recipe, *own, "--model", name("short"), "--judge", name("boxed"))
    assert values(found)["overall/mark"] == 3.25


class TestBeforeAnythingIsWritten:
    """Mistakes are told in one line each, and leave no folder."""

    def line(self, folder: Path, **words: object) -> list[object]:
        given = {"benchmark": "prompts", "data": lines(folder / "p.jsonl", [{"prompt": "one?"}])}
        given |= {"model": name("short"), "judge": name("longer")}
        return [word for key, value in (given | words).items() for word in (f"--{key}", value)]

    @pytest.mark.parametrize(
        ("word", "judge", "message"),
        [
            ("seed=0", "time:sleep", "function=time:sleep does not "),  # by version of Python for another reason
            ("seed=0", "builtins:max", "function=builtins:max does not have a signature"),
            ("placement.referee=0", name("longer"), "placement: no role is called referee"),
            ("judge.key_env=NO_SUCH", "http://127.0.0.1:1/v1#m", "NO_SUCH is not set"),
        ],
    )
    def test_a_speaker_that_cannot_be(self, tmp_path: Path, word: str, judge: str, message: str, capsys):
        run(tmp_path / "out", word, *self.line(tmp_path, judge=judge), status=78)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_judge_that_learned_another_form(self, tmp_path: Path, tiny_policy: Path, capsys):
        folder = shutil.copytree(tiny_policy, tmp_path / "judge")
        for file, text in genrm_card.files(VerdictConfig(form="json"), None).items():
            (folder / file).write_text(text)
        line = self.line(tmp_path, judge=folder)
        run(tmp_path / "out", "judge_form=helpsteer3", "judge_custom_roles=false", *line, status=78)
        assert "set judge_form=json" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_template_that_leaves_out_the_responses(self, tmp_path: Path, tiny_policy: Path, capsys):
        template = tmp_path / "t.jinja"
        known = "in messages if message.role in ('user', 'assistant') %}"
        template.write_text(toy.CHAT_TEMPLATE.replace("in messages %}", known))
        line = self.line(tmp_path, judge=tiny_policy)
        own = ("judge_form=json", "judge_custom_roles=true", f"judge.chat_template={template}")
        run(tmp_path / "out", *own, *line, status=78)
        told = capsys.readouterr().err
        assert "drops turns of the role response_1" in told and "judge_custom_roles=false" in told
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_a_file(self, tmp_path: Path, capsys):
        (tmp_path / "out").write_text("")
        run(tmp_path / "out", *self.line(tmp_path), status=78)
        assert f"out={tmp_path}/out cannot be made" in capsys.readouterr().err


def test_a_first_call_that_fails_does_not_bind_its_folder(arena: tuple[Path, Path], tmp_path: Path, capsys):
    (tmp_path / "bad.py").write_text("def f(messages, sample): return 1 / 0\n")
    line = ["--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("longer")]
    run(tmp_path / "out", *line, "--model", f"{tmp_path / 'bad.py'}:f", status=78)
    assert "ZeroDivisionError" in capsys.readouterr().err
    run(tmp_path / "out", *line, "--model", name("short"))


def test_verdicts_whose_answers_are_gone_are_refused(arena: tuple[Path, Path], tmp_path: Path, capsys):
    line = ["--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("longer")]
    line += ["--model", name("short")]
    run(tmp_path / "out", *line)
    (tmp_path / "out" / "answers.jsonl").unlink()
    run(tmp_path / "out", *line, status=78)
    assert "6 of 6 answers of the policy are gone, the verdicts on them are not" in capsys.readouterr().err
    assert len(rows(tmp_path / "out" / "verdicts.jsonl")) == 12


class CutOff:
    """A judge whose first answer is not whole."""

    def __init__(self):
        self.said = iter([Completion("at first [[2]]", False, 1, 9), Completion("[[7]]", True, 1, 3)])

    def complete(self, requests: Sequence[Request], sampling: SamplingConfig) -> CompletedFuture[list[Completion]]:
        return CompletedFuture([next(self.said) for _ in requests])


def test_a_verdict_that_was_cut_off_is_none(tmp_path: Path):
    """A mark may be a thought of a judge that has not come to its end."""
    given = ["benchmark=prompts", "data.path=x", "answers=a.jsonl", "judge.path=j"]
    section = build_config(PolicyEvaluationConfig, None, given).config
    question = Question("q", "all", (Message("user", "one?"),))
    bench = JudgePromptBuilder(section, {"q": PolicyAnswer(("yes",))}, {}, {})
    with locked(tmp_path / "verdicts.jsonl") as file:
        kept = Rows(file, tmp_path / "verdicts.jsonl")
        judging.judge(bench.requests_of([question]), CutOff(), bench, kept, lambda count: None)
        assert judging.rulings_in(kept) == {("q", 0, False): judging.Judgment(7, 2, "[[7]]")}


def test_a_page_that_needs_nothing_else(arena: tuple[Path, Path], tmp_path: Path):
    line = ["--benchmark", "arena-hard", arena[0], "--baseline", arena[1], "--judge", name("longer")]
    found = run(tmp_path / "out", *line, "--model", name("thorough"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page)
    assert "<td>win rate</td><td>83.3</td>" in page and page.count("<svg") == 2
    found["judge"] = found["notes"][0] = "<script>"
    assert "<script" not in report.page(found)
