"""Drafts, feedback, edits and the choice among them: what is asked when, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from align import cli
from align.config import SamplingConfig, ScaleConfig, ScalePromptsConfig
from align.config.load import build_config
from align.data import toy
from align.data.chat import Dialogue, Message
from align.errors import ConfigError, DataError
from align.generators.base import Completion, Request
from align.generators.functions import FunctionGenerator
from align.roles import CompletedFuture
from align.scale import main, pipeline, sweep
from align.scale.pipeline import STRIDE, PromptPipeline, RoleQueue, run_event_loop
from align.scale.sweep import SweepSetting

SPEAKERS = Path(__file__).with_name("speakers.py")
PROMPTS = ["repeat the words : ant bag cat", "sort the words : pig fox owl", "reverse the words : sun key jam"]
ROLES = [
    f"{name}.kind=function {name}.function={SPEAKERS}:{function}"
    for name, function in {"policy": "draft", "feedback": "feedback", "edit": "edit", "select": "scores"}.items()
]
COUNTS = ["drafts=4", "feedbacks=6", "edits=5", "max_best_of=40", "prompts_at_once=2", "batch_size=5"]
SWEEP = "sweep={drafts: [1, 2], feedbacks: [1, 3], edits: [1, 2]}"


def recipe(folder: Path, *overrides: str) -> ScaleConfig:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    given = [pair for role in ROLES for pair in role.split()]
    own = [f"prompts.path={folder}/prompts.jsonl", f"out={folder}/out"]
    return build_config(ScaleConfig, None, [*given, *COUNTS, *own, *overrides]).config


def run(section: ScaleConfig) -> dict[str, Any]:
    return main.scale(section, Console(quiet=True))


def records(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["id"])


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in records(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScaleConfig, dict[str, Any]]:
    """A finished command with a sweep."""
    folder = tmp_path_factory.mktemp("whole")
    section = recipe(folder, SWEEP)
    return folder, section, run(section)


class TestTheWholeWay:
    def test_every_stage_reads_what_the_one_before_wrote(self, whole: tuple[Path, ScaleConfig, dict[str, Any]]):
        folder, _, _ = whole
        row = records(folder)[0]
        assert [one["text"] for one in row["samples"][:3]] == [
            "moon bag cat",
            "ant okay bag cat",
            "moon okay well bag cat",
        ]
        assert row["kept"] == [0, 1, 2, 3]
        told = [one["text"] for one in row["feedback"]["0"]]
        assert told[3] == "The response is perfectly helpful. All words are right."  # of sample 3
        for one in row["edits"]:
            texts = [row["feedback"][str(one["draft"])][j]["text"] for j in one["feedback"]]
            assert 1 <= len(texts) <= 3 and not any("perfectly" in text for text in texts)
            assert (one["text"] == "ant bag cat") == any("Remark 1." in text for text in texts)
        first = [tuple(one["feedback"]) for one in row["edits"] if one["draft"] == 0]
        assert len(first) == len(set(first)) > 3

    def test_the_best_is_chosen_and_the_numbers_say_so(self, whole: tuple[Path, ScaleConfig, dict[str, Any]]):
        results = whole[2]
        assert results["whole"]["feedback_edit"]["ground_truth"] == 4.0
        assert results["whole"]["feedback_edit"]["edited"] == 1.0
        assert results["whole"]["feedback_edit"]["select"] == pytest.approx(4 - 0.03)
        # Draft 1 has the first word right and a filler word after it: of three words one is in its place.
        assert results["one_draft"]["ground_truth"] == pytest.approx(2.0)
        assert results["whole"]["best_of_n"]["ground_truth"] == 4.0  # sample 5
        assert results["drafts_alone"]["ground_truth"] < 4.0

    def test_the_budget_adds_up(self, whole: tuple[Path, ScaleConfig, dict[str, Any]]):
        folder, _, results = whole
        rows = {row["stage"]: row for row in results["budget"]}
        parts = [rows[name] for name in ("drafts", "feedback", "edits", "select")]
        for key in ("calls", "prompt_tokens", "tokens", "seconds"):
            assert rows["total"][key] == pytest.approx(sum(row[key] for row in parts))
        assert (rows["drafts"]["calls"], rows["feedback"]["calls"], rows["select"]["calls"]) == (12, 72, 3)
        found = records(folder)
        assert rows["drafts"]["tokens"] == sum(len(one["text"].split()) for row in found for one in row["samples"][:4])
        told = [one["text"] for row in found for said in row["feedback"].values() for one in said]
        assert rows["feedback"]["tokens"] == sum(len(text.split()) for text in told)
        everything = sum(one["tokens"] for row in found for one in row["edits"])
        assert rows["edits"]["tokens"] + rows["sweep_edits"]["tokens"] == everything
        one = rows["drafts"]["tokens"] / 12 * 3
        assert rows["total"]["relative_tokens"] == pytest.approx(rows["total"]["tokens"] / one)
        assert rows["total"]["tokens"] == pytest.approx(3 * results["whole"]["feedback_edit"]["tokens"])

    def test_best_of_n_has_as_many_tokens_and_no_more(self, whole: tuple[Path, ScaleConfig, dict[str, Any]]):
        folder, section, _ = whole
        for row in records(folder):
            spent = sweep.chosen(section, row, SweepSetting(4, 6, 5)).tokens
            other = sweep.best_of(row, spent)
            lengths = [one["tokens"] for one in row["samples"]]
            assert other is not None and other.tokens == sum(lengths[: other.candidates]) <= spent
            assert len(lengths) == 40 or sum(lengths[: other.candidates + 1]) > spent
            assert other.score == max(row["scores"]["best_of_select"][: other.candidates])


@pytest.mark.parametrize("setting", [(1, 6, 5), (2, 6, 5), (4, 1, 5), (4, 3, 5), (4, 6, 1), (4, 6, 2)])
def test_a_smaller_setting_is_what_a_run_of_its_own_gives(
    setting: tuple[int, int, int], whole: tuple[Path, ScaleConfig, dict[str, Any]], tmp_path: Path
):
    numbers = dict(zip(("drafts", "feedbacks", "edits"), setting, strict=True))
    alone = run(recipe(tmp_path, *(f"{name}={value}" for name, value in numbers.items())))
    points = [point for axis in whole[2]["sweep"].values() for point in axis]
    point = next(point for point in points if numbers.items() <= point.items())
    assert point["feedback_edit"] == alone["whole"]["feedback_edit"]


def test_drafts_are_chosen_from_more_samples(tmp_path: Path):
    section = recipe(tmp_path, "draft_samples=6", "drafts=2", "max_best_of=0")
    results = run(section)
    row = records(tmp_path)[0]
    assert len(row["samples"]) == 6 and row["kept"][0] == 5  # the right one
    assert row["kept"] == sweep.ranked(row["scores"]["draft_select"])[:2]
    assert set(row["feedback"]) == {str(k) for k in row["kept"]}
    assert results["whole"]["best_of_n"] is None
    spent = sum(one["tokens"] for one in row["samples"])
    assert sweep.tokens(section, row, SweepSetting(2, 6, 0)) == spent


def test_a_smaller_setting_keeps_the_best_also_of_as_many_samples_as_drafts(tmp_path: Path):
    """Sample 5 is right. A smaller number of drafts has it, as in a run of its own."""
    (tmp_path / "alone").mkdir()
    found = run(recipe(tmp_path, "draft_samples=6", "drafts=6", "sweep={drafts: [2]}", "max_best_of=0"))
    alone = run(recipe(tmp_path / "alone", "draft_samples=6", "drafts=2", "max_best_of=0"))
    assert records(tmp_path)[0]["kept"][0] == 5 and len(records(tmp_path)[0]["kept"]) == 6
    assert found["sweep"]["drafts"][0]["feedback_edit"] == alone["whole"]["feedback_edit"]


def test_best_of_n_has_no_more_samples_than_its_bound(tmp_path: Path):
    """Sample 5 is right, and among the first two none."""
    results = run(recipe(tmp_path, "drafts=8", "max_best_of=2"))
    (row, *_), best = records(tmp_path), results["whole"]["best_of_n"]
    assert len(row["samples"]) == 8 and len(row["scores"]["best_of_select"]) == 2
    assert best["candidates"] <= 2 and best["ground_truth"] < 4.0


def test_without_counts_of_tokens_there_is_no_best_of_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Feedback on one of the prompts has none, as from a server that counts for some requests alone."""
    answer = FunctionGenerator._answer

    def uncounted(self: FunctionGenerator, request: Request) -> Completion:
        told = self.name.endswith(":feedback") and request.messages[0].content == PROMPTS[1]
        return answer(self, request)._replace(**({"tokens": 0} if told else {}))

    monkeypatch.setattr(FunctionGenerator, "_answer", uncounted)
    console = Console(record=True, width=160)
    results = main.scale(recipe(tmp_path, SWEEP), console)
    points = [results["whole"], *(point for axis in results["sweep"].values() for point in axis)]
    assert all(point["best_of_n"] is None for point in points)
    assert ["best_of_select" in row["scores"] for row in records(tmp_path)] == [True, False, True]
    assert results["uncounted"] == {"drafts": 0, "feedback": 24, "edits": 0}
    note = "best-of-n is left out, for tokens are not counted everywhere: feedback"
    assert note in console.export_text() and note in (tmp_path / "out" / "report.html").read_text()


def test_a_draft_that_nobody_would_change_stays_as_it_is(tmp_path: Path):
    section = recipe(tmp_path, "editing.perfect=The response")
    results = run(section)
    row = records(tmp_path)[0]
    assert row["edits"] == [] and results["whole"]["feedback_edit"]["edited"] == 0.0
    assert results["whole"]["feedback_edit"]["candidates"] == 4.0


def test_a_command_goes_on_where_it_was_cut(tmp_path: Path, whole: tuple[Path, ScaleConfig, dict[str, Any]]):
    section = recipe(tmp_path, SWEEP)
    run(section)
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[1] + lines[0][: len(lines[0]) // 2])  # the second prompt, and a half line
    assert run(section)["whole"] == whole[2]["whole"]
    assert file.read_bytes().startswith(lines[1]) and untimed(tmp_path) == untimed(whole[0])
    for changed, value in (("feedbacks_kept", 2), ("edit_sampling", SamplingConfig(max_tokens=3)), ("seed", 1)):
        with pytest.raises(ConfigError, match=f"another {changed}"):
            run(replace(section, **{changed: value}))
    with pytest.raises(ConfigError, match="another policy.function"):  # of the same file
        run(recipe(tmp_path, SWEEP, f"policy.function={SPEAKERS}:edit"))
    run(recipe(tmp_path, "prompts_at_once=1", "sweep={drafts: [3], feedbacks: [3, 1]}"))  # nothing is asked again
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "sort the words : ant"}\n')
    with pytest.raises(ConfigError, match="another prompts"):
        run(section)


def test_a_first_call_that_fails_does_not_bind_its_folder(tmp_path: Path):
    (tmp_path / "bad.py").write_text("def f(messages, sample): return 1 / 0\n")
    with pytest.raises(DataError, match="ZeroDivisionError"):
        run(recipe(tmp_path, f"policy.function={tmp_path}/bad.py:f", "seed=7"))
    run(recipe(tmp_path))


class Slow:
    """An answer that is there after so many looks."""

    def __init__(self, value: Any, looks: int):
        self.value, self.looks = value, looks

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def result(self) -> Any:
        return self.value


class FakeRole:
    """Notes what it is asked; its calls last as many looks as ``looks`` says."""

    def __init__(self, name: str, log: list[tuple[str, int]], looks: Sequence[int]):
        self.name, self.log, self.looks, self.calls = name, log, looks, 0

    def _answered(self, value: Any, count: int) -> Slow:
        self.log.append((self.name, count))
        self.calls += 1
        return Slow(value, self.looks[self.calls % len(self.looks)])

    def complete(self, requests: Sequence[Request], sampling: SamplingConfig) -> Slow:
        answers = []
        for one in requests:
            j = one.sample % STRIDE
            text = {"policy": f"draft {one.sample}", "feedback": f"Remark {j}.", "edit": one.messages[-1].content}
            answers.append(Completion(text[self.name], True, 1, 2))
        return self._answered(answers, len(requests))

    def score_dialogues(self, dialogues: Sequence[Dialogue]) -> Slow:
        scores: Tensor = torch.tensor([float(len(one.response) % 13) for one in dialogues])
        return self._answered(scores, len(dialogues))


def flows(
    section: ScaleConfig, looks: Mapping[str, Sequence[int]]
) -> tuple[list[tuple[str, int]], list[dict[str, Any]]]:
    log: list[tuple[str, int]] = []
    found: list[dict[str, Any]] = []
    roles = {name: FakeRole(name, log, looks.get(name, [0])) for name in ("policy", "feedback", "edit", "select")}
    role_queues = pipeline.role_queues(section, roles)
    for number, text in enumerate(PROMPTS):
        PromptPipeline(section, role_queues, number, (Message("user", text),), found.append).advance()
    run_event_loop(role_queues.values())
    return log, [{k: v for k, v in one.items() if k != "seconds"} for one in sorted(found, key=lambda one: one["id"])]


def test_an_edit_is_asked_for_before_the_last_feedback_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "POLL_S", 0.0)
    section = recipe(tmp_path, "batch_size=6", "max_best_of=0")
    log, _ = flows(section, {"feedback": [3]})
    names = [name for name, _ in log]
    last = len(names) - 1 - names[::-1].index("feedback")
    assert names.count("feedback") == 12  # of three prompts four drafts, six texts each
    assert names.index("edit") < names.index("feedback") + 4
    assert names[:last].count("edit") >= 9 and "select" in names[:last]


def test_what_comes_of_it_does_not_depend_on_who_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "POLL_S", 0.0)
    section = recipe(tmp_path, "draft_samples=7", SWEEP)
    orders, results = zip(
        *(flows(section, looks) for looks in ({}, {"policy": [9, 0, 4]}, {"edit": [5, 0], "select": [0, 7]})),
        strict=True,
    )
    assert orders[0] != orders[1] != orders[2]
    assert results[0] == results[1] == results[2]


def test_a_desk_takes_what_waits_up_to_its_size():
    asked: list[list[Any]] = []
    desk = RoleQueue(lambda groups: asked.append(groups) or CompletedFuture(groups), 5, len)
    for group in ([1] * 3, [2] * 2, [3] * 9, [4]):
        desk.ask(group, lambda answer, seconds: None)
    run_event_loop([desk])
    assert [[len(group) for group in groups] for groups in asked] == [[3, 2], [9], [1]]


class TestPrompts:
    def read(self, folder: Path, *rows: str, **more: Any) -> list[Any]:
        (folder / "p.jsonl").write_text("".join(row + "\n" for row in rows))
        return main.read_prompts(ScalePromptsConfig(str(folder / "p.jsonl"), **more))

    def test_rows_of_all_kinds_each_once(self, tmp_path: Path):
        turn = '[{"role": "user", "content": "a"}]'
        rows = ('{"prompt": "a"}', f'{{"messages": {turn}}}', f'{{"context": {turn}}}', '{"prompt": "b"}')
        assert [context[0].content for context in self.read(tmp_path, *rows)] == ["a", "b"]
        assert len(self.read(tmp_path, *rows, max_prompts=1)) == 1

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{}", "none of prompt, messages, context"),
            ('{"prompt": ""}', "empty user turn"),
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "alternate"),
            ("{", "not JSON"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: str, message: str):
        with pytest.raises(DataError, match=message) as caught:
            self.read(tmp_path, '{"prompt": "a"}', row)
        assert caught.value.where == f"{tmp_path}/p.jsonl:2"

    def test_a_data_folder_gives_the_conversations_of_a_split(self, toy_data: Path):
        found = main.read_prompts(ScalePromptsConfig(str(toy_data), max_prompts=3))
        assert len(found) == 3 and toy.ground_truth(found, ["", "", ""]) is not None

    def test_no_prompts_are_refused(self, tmp_path: Path):
        with pytest.raises(DataError, match="no prompts"):
            self.read(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe(tmp_path)
    (tmp_path / "r.yaml").write_text("{drafts: 2, feedbacks: 4, edits: 2, sweep: {drafts: [1]}}\n")
    given = [pair for role in ROLES for pair in role.split()]
    own = [f"prompts.path={tmp_path}/prompts.jsonl", f"out={tmp_path}/out"]
    assert cli.main(["scale", str(tmp_path / "r.yaml"), *given, *own]) == 0
    printed = capsys.readouterr().out
    assert "feedback-edit" in printed and "best-of-n, as many tokens" in printed and "total" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Ground truth against number of drafts" in page and page.count("<polyline") == 2
    assert json.loads((tmp_path / "out" / "scaling.json").read_text())["prompts"] == 3
    assert cli.main(["scale", str(tmp_path / "r.yaml"), *given, *own, "select.function=no.py:f"]) == 78
    assert "no.py" in capsys.readouterr().err
