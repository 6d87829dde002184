"""Trackers: what they get, and what happens where one fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align.config import CheckpointConfig, RecipeConfig, RunConfig, TrackerName
from align.errors import ConfigError
from align.run import Run, tracking
from align.types import Packed, Rollouts, Sequences


def recipe(folder: Path, trackers: list[str], steps: int = 3) -> RecipeConfig:
    run = RunConfig(dir=str(folder), steps=steps, trackers=trackers, progress="none", logged_samples=1)  # type: ignore[arg-type]
    return RecipeConfig(algorithm="rloo", run=run, checkpoint=CheckpointConfig(every=1, overlap=False))


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def rollouts() -> Rollouts:
    sequences = Sequences(Packed.from_lists([[1, 2]]), Packed.from_lists([[4, 5]]), torch.tensor([0]))
    return Rollouts(sequences, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([True]), 1.0, 1)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class ListTracker:
    """A second tracker, which keeps its calls."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def open(self, recipe: Mapping[str, Any], folder: Path, step: int) -> None:
        self.calls.append(("open", recipe["algorithm"], recipe["run.steps"], folder, step))

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append(("log", step, metrics["loss"], [sample["response"] for sample in samples]))

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append(("log_evaluation", step, dict(metrics), list(answers)))

    def close(self) -> None:
        self.calls.append(("close",))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of the second tracker, which is plugged in under the name ``list``."""
    monkeypatch.setitem(tracking.TRACKERS, "list", ListTracker)
    monkeypatch.setattr(ListTracker, "calls", [])
    return ListTracker.calls


def train(settings: RecipeConfig, last: int = 3) -> None:
    with Run(settings, decode) as run:
        run.attach(SimpleNamespace(), {})
        if run.progress.step == 0:
            run.log_evaluation(0, {"heldout/greedy/reward": 0.25}, [{"prompt": "p", "answer": "a"}])
        for step in run.steps():
            heldout = {"heldout/greedy/reward": float(step)} if step == 2 else {}
            if heldout:
                run.log_evaluation(step, heldout, [{"prompt": "p", "answer": "b"}])
            run.log(step, {"loss": 1.0 / step, **heldout}, rollouts())
            if step > last:
                raise RuntimeError("killed before the checkpoint of the step before was published")


def test_every_tracker_is_a_value_of_the_key():
    assert get_args(TrackerName) == tuple(tracking.TRACKERS)


def test_a_second_tracker_gets_recipe_metrics_samples_and_evaluations(tmp_path: Path, calls: list[tuple[Any, ...]]):
    train(recipe(tmp_path, ["list"], steps=2))
    assert calls == [
        ("open", "rloo", 2, tmp_path, 0),
        ("log_evaluation", 0, {"heldout/greedy/reward": 0.25}, [{"prompt": "p", "answer": "a"}]),
        ("log", 1, 1.0, ["4 5"]),
        ("log_evaluation", 2, {"heldout/greedy/reward": 2.0}, [{"prompt": "p", "answer": "b"}]),
        ("log", 2, 0.5, ["4 5"]),
        ("close",),
    ]


def test_a_resumed_run_opens_its_trackers_at_the_step_of_the_checkpoint(tmp_path: Path, calls: list[tuple[Any, ...]]):
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe(tmp_path, ["list", "tensorboard"]), last=2)
    calls.clear()
    train(recipe(tmp_path, ["list", "tensorboard"]))
    assert calls[0] == ("open", "rloo", 3, tmp_path, 1)
    assert [call[1] for call in calls if call[0] == "log"] == [2, 3]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]  # steps 2 and 3 count once


def test_tensorboard_gets_the_same_numbers_and_the_starting_evaluation(tmp_path: Path):
    train(recipe(tmp_path, ["tensorboard"]))
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars(tmp_path, "heldout/greedy/reward") == [(0, 0.25), (2, 2.0)]


def test_without_trackers_there_is_no_such_folder(tmp_path: Path):
    train(recipe(tmp_path, []))
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("method", ["open", "log", "log_evaluation", "close"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no such project")])
def test_a_tracker_that_fails_is_dropped_and_the_run_continues(
    tmp_path: Path,
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    error: Exception,
):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(ListTracker, method, refuse)
    train(recipe(tmp_path, ["list", "tensorboard"]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2, 3]
    assert capsys.readouterr().err.count("nothing more is written there, see metrics.jsonl") == 1


def test_settings_that_cannot_work_end_the_run(tmp_path: Path, calls: object, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ConfigError("no such project")

    monkeypatch.setattr(ListTracker, "open", refuse)
    with pytest.raises(ConfigError, match="no such project"):
        train(recipe(tmp_path, ["list"]))
