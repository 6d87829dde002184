"""What a run writes and shows, number by number."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from align.config import RecipeConfig, RunConfig
from align.errors import ConfigError
from align.run import Clock, Run, display
from align.run import identity as surroundings
from align.run import run as module
from align.types import Packed, Rollouts, Sequences

WORDS = {1: "two", 2: "plus", 3: "three", 4: "five", 5: "fünf", 6: "?"}


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def recipe(folder: Path, **section: object) -> RecipeConfig:
    values = {"dir": str(folder), "steps": 3, "trackers": [], "progress": "none", **section}
    return RecipeConfig(algorithm="rloo", run=RunConfig(**values))


def rollouts() -> Rollouts:
    sequences = Sequences(
        Packed.from_lists([[1, 2], [3]]), Packed.from_lists([[4], [5, 6], [4, 4, 4]]), torch.tensor([0, 0, 1])
    )
    return Rollouts(sequences, torch.zeros(3, 3), torch.zeros(3, 3), torch.tensor([True, False, True]), 1.0, 1)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


# Folder


def test_a_new_folder_holds_what_is_known_before_the_start(tmp_path: Path):
    folder = tmp_path / "runs" / "first"
    run = Run(recipe(folder, seed=7), decode)
    assert not folder.exists()
    with run:
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.yaml", "environment.json", "evaluations.jsonl", "identity.json", "lock", "metrics.jsonl",
            "samples.jsonl", "starts.jsonl",
        ]  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["algorithm"], config["run"]["seed"], config["run"]["steps"]) == ("rloo", 7, 3)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (run.folder, run.final, run.logs) == (folder, folder / "final", folder / "logs")


def test_the_environment(tmp_path: Path):
    with Run(recipe(tmp_path), decode):
        pass
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(environment["packages"]) == set(surroundings.PACKAGES)
    assert set(environment["machine"]) == {"node", "system", "cores"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", environment["started"])


def test_the_revision_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = str(Path(surroundings.__file__).parents[1])

    def git(command: list[str], **_: object) -> SimpleNamespace:
        assert command == ["git", "-C", source, "rev-parse", "HEAD"]
        return SimpleNamespace(stdout="0123abc\n")

    monkeypatch.setattr(subprocess, "run", git)
    assert surroundings.environment()["git_revision"] == "0123abc"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))  # not a repository
    assert surroundings.environment()["git_revision"] is None


def test_the_revision_that_a_launcher_noted_beside_its_copy_of_the_code(tmp_path: Path):
    (tmp_path / "align").mkdir()
    (tmp_path / "revision.json").write_text('{"git_revision": "45cafe", "changed": true}')
    assert surroundings._revision(tmp_path / "align") == "45cafe"


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert surroundings.environment()["git_revision"] is None


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("old\n")
    with pytest.raises(ConfigError, match="is not empty") as caught, Run(recipe(tmp_path), decode):
        pass
    assert str(tmp_path) in str(caught.value)
    assert "another run.dir" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "old\n"


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"file.* cannot be made"), Run(recipe(place), decode):
            pass


# Metrics


def test_metrics_by_hand(tmp_path: Path, time: SimpleNamespace):
    with Run(recipe(tmp_path), decode) as run:
        steps = run.steps()
        assert next(steps) == 1
        run.clock.begin("generate")
        run.clock.record("generate", [(10.0, 12.0), (10.0, 11.0)])
        run.clock.record("update", [(12.5, 16.5)])
        run.clock.record("update", [(16.0, 17.0)])
        time.seconds = 108.0
        run.log(1, {"loss": 0.5, "trained_tokens": 20.0}, rollouts(), torch.tensor([1.0, -0.5, 2.0]))
        assert next(steps) == 2
        time.seconds = 109.5
        run.log(2, {"loss": math.nan, "grad_norm": math.inf, "trained_tokens": 8.0})
        assert list(steps) == [3]
    assert lines(tmp_path / "metrics.jsonl") == [
        {
            "step": 1,
            "loss": 0.5,
            "trained_tokens": 20.0,
            "seconds/generate": 2.0,
            "seconds/update": 5.0,
            "seconds/wait": 1.5,  # 8 less the union of the spans, 10 to 12 and 12.5 to 17
            "seconds/step": 8.0,
            "generated_tokens": 6.0,  # 1 + 2 + 3
            "tokens_per_second/generate": 3.0,  # 6 / 2
            "tokens_per_second/update": 4.0,  # 20 / 5
            "total/generated_tokens": 6.0,
            "total/trained_tokens": 20.0,
            "total/rollouts": 3.0,
            "seconds/total": 8.0,
        },
        {
            "step": 2,
            "loss": "nan",  # JSON has no such numbers
            "grad_norm": "inf",
            "trained_tokens": 8.0,
            "seconds/wait": 1.5,  # each step starts afresh, and nobody worked in this one
            "seconds/step": 1.5,
            "total/generated_tokens": 6.0,  # nothing was sampled in this one
            "total/trained_tokens": 28.0,
            "total/rollouts": 3.0,
            "seconds/total": 9.5,
        },
    ]


def test_a_line_is_on_disk_when_its_step_ends(tmp_path: Path):
    with Run(recipe(tmp_path), decode) as run:
        for step in run.steps():
            run.log(step, {}, rollouts())
            assert len(lines(tmp_path / "metrics.jsonl")) == step
            assert len(lines(tmp_path / "samples.jsonl")) == 3 * step
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_samples_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A machine whose locale is ASCII; the files are UTF-8 all the same.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    with Run(recipe(tmp_path, logged_samples=2), decode) as run:
        next(run.steps())
        run.log(1, {}, rollouts(), torch.tensor([1.5, -0.5, 2.0]))
        run.log(2, {}, rollouts())
        run.log(3, {})
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": "two plus", "response": "five", "finished": True, "score": 1.5},
        {"step": 1, "prompt": "two plus", "response": "fünf ?", "finished": False, "score": -0.5},
        {"step": 2, "prompt": "two plus", "response": "five", "finished": True, "score": None},
        {"step": 2, "prompt": "two plus", "response": "fünf ?", "finished": False, "score": None},
    ]
    assert "fünf" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped


@pytest.mark.parametrize(("logged", "written"), [(0, 0), (99, 3)])
def test_number_of_samples(tmp_path: Path, logged: int, written: int):
    with Run(recipe(tmp_path, logged_samples=logged), decode) as run:
        next(run.steps())
        run.log(1, {}, rollouts())
    responses = [sample["response"] for sample in lines(tmp_path / "samples.jsonl")]
    assert responses == ["five", "fünf ?", "five five five"][:written]


# Display

METRICS = {
    "reward": 1.23456,
    "kl": -0.5,
    "loss": 0.125,
    "seconds/step": 2.0,
    "tokens_per_second/generate": 1234.5678,
    "tokens_per_second/update": 99.4,
    "grad_norm": 3.0,
}


def test_summary_shows_what_is_there_in_order():
    shown = "reward 1.235  KL -0.500  loss 0.1250  gen 1235 tok/s  train 99 tok/s"
    assert display.summary(METRICS) == shown
    assert display.summary(dict(reversed(METRICS.items()))) == shown
    assert display.summary({"validation/accuracy": 0.75, "accuracy": 0.5}) == "accuracy 0.500  validation 0.750"
    assert display.summary({"grad_norm": 1.0}) == ""


def test_plain_prints_one_line_a_step_with_the_time_left(tmp_path: Path, time: SimpleNamespace, capsys):
    with Run(recipe(tmp_path, progress="plain"), decode) as run:
        for step in run.steps():
            run.clock.begin("update")
            time.seconds += 2.0
            run.log(step, {"loss": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "rloo 1/3  loss 0.2500  about 4 s left",  # two steps of 2 s
        "rloo 2/3  loss 0.2500  about 2 s left",
        "rloo 3/3  loss 0.2500  about 0 s left",
    ]


def test_plain_prints_about_a_hundred_lines_and_the_last_step(capsys):
    plain = display.PlainDisplay("dpo", 250)
    for step in range(1, 251):
        plain.step(step, {"seconds/step": 1.0})
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == list(range(2, 251, 2))
    odd = display.PlainDisplay("dpo", 301)
    for step in (299, 300, 301):
        odd.step(step, {"seconds/step": 1.0})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["300/301", "301/301"]


def test_none_prints_nothing(tmp_path: Path, capsys):
    with Run(recipe(tmp_path, progress="none"), decode) as run:
        for step in run.steps():
            run.clock.begin("update")
            run.log(step, METRICS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.fixture
def live() -> Iterator[tuple[display.LiveDisplay, io.StringIO]]:
    out = io.StringIO()
    bar = display.LiveDisplay("rloo", 3, Console(file=out, force_terminal=True, width=160))
    yield bar, out
    bar.close()


def test_live_shows_phase_count_and_numbers(live: tuple[display.LiveDisplay, io.StringIO]):
    bar, out = live
    bar.phase("generate")
    bar.progress.refresh()
    assert "generate" in out.getvalue()
    assert "0/3" in out.getvalue()
    bar.step(2, {"loss": 0.25})
    bar.close()
    assert "2/3" in out.getvalue()
    assert "loss 0.2500" in out.getvalue()


@pytest.mark.parametrize(
    ("kind", "terminal", "expected"),
    [
        ("auto", True, display.LiveDisplay),
        ("auto", False, display.PlainDisplay),
        ("live", False, display.LiveDisplay),
        ("plain", True, display.PlainDisplay),
        ("none", True, display.Display),
    ],
)
def test_the_kind_of_display(kind, terminal: bool, expected: type, monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda: Console(file=out, force_terminal=terminal))
    made = display.make_display(kind, "rloo", 3)
    made.close()
    assert type(made) is expected


# Clock


def test_the_clock_tells_phases_and_drains():
    told: list[str] = []
    clock = Clock(told.append)
    clock.begin("generate")
    clock.record("generate", [(0.0, 1.0), (0.0, 0.25)])  # the slowest rank counts
    clock.record("score", [(2.0, 4.0)])
    clock.record("reference", [(3.0, 3.5)])  # meanwhile
    clock.record("generate", [(3.5, 4.5)])
    assert told == ["generate"]
    assert clock.drain(6.0) == {"generate": 2.0, "score": 2.0, "reference": 0.5, "wait": 2.5, "step": 6.0}
    assert clock.drain(0.5) == {"wait": 0.5, "step": 0.5}
