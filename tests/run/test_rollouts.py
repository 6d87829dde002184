"""In which order a run samples and learns, what a round begins with, and which policy is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from align.config import CheckpointRewardConfig, OnPolicyConfig, RunConfig, SamplingConfig
from align.data.prompts import PromptStream
from align.roles import CompletedFuture
from align.run import Run
from align.types import Packed, Prompts


def started(folder: Path, steps: int = 3, rounds: int = 1, progress: str = "none") -> Run:
    section = RunConfig(dir=str(folder), steps=steps, trackers=[], progress=progress)  # type: ignore[arg-type]
    reward = CheckpointRewardConfig(path="r")
    return Run(OnPolicyConfig(algorithm="rloo", run=section, reward=reward, rounds=rounds), str)


# Rollouts


class Actor:
    """A policy that notes in which order it is asked; a rollout is the step and the number of updates before it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.version = 0

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> CompletedFuture[tuple[int, int]]:
        self.events.append(f"generate {prompts.step}")
        return CompletedFuture((prompts.step, self.version))

    def update(self) -> None:
        self.version += 1
        self.events.append(f"update {self.version}")


PROMPTS = PromptStream(Packed.from_lists([[1], [2], [3]]), batch_size=2, seed=0, stop_ids=(6,))


def learn(run: Run, actor: Actor, max_off_policy_steps: int) -> list[tuple[int, int, int]]:
    """Each step, the version that sampled its rollout, and the one that learns from it."""
    seen = []
    for step, (sampled_for, version) in run.rollouts(PROMPTS, actor, SamplingConfig(), max_off_policy_steps):  # type: ignore[arg-type,misc]
        assert sampled_for == step
        seen.append((step, version, actor.version))
        actor.update()
    return seen


def test_on_policy_each_rollout_comes_from_the_weights_that_learn_from_it(tmp_path: Path):
    actor = Actor()
    with started(tmp_path) as run:
        seen = learn(run, actor, 0)
    assert seen == [(1, 0, 0), (2, 1, 1), (3, 2, 2)]
    assert actor.events == ["generate 1", "update 1", "generate 2", "update 2", "generate 3", "update 3"]


def test_with_a_lag_of_one_the_next_rollout_is_asked_for_before_a_step_trains(tmp_path: Path):
    actor = Actor()
    # Those of step 1 and 2 both come from the start; that of step 4 from after step 2, and meets the weights of step 3.
    with started(tmp_path, steps=4) as run:
        seen = learn(run, actor, 1)
    assert seen == [(1, 0, 0), (2, 0, 1), (3, 1, 2), (4, 2, 3)]
    assert actor.events == [
        "generate 1", "generate 2", "update 1", "generate 3", "update 2", "generate 4", "update 3", "update 4"
    ]  # fmt: skip


def test_with_a_lag_of_three(tmp_path: Path):
    actor = Actor()
    with started(tmp_path, steps=6) as run:
        seen = learn(run, actor, 3)
    assert seen == [
        (1, 0, 0), (2, 0, 1), (3, 0, 2), (4, 0, 3), (5, 1, 4), (6, 2, 5)
    ]  # fmt: skip
    assert actor.events[:5] == ["generate 1", "generate 2", "generate 3", "generate 4", "update 1"]
    assert actor.events[-4:] == ["update 3", "update 4", "update 5", "update 6"]  # nothing is sampled for later steps


@pytest.mark.parametrize("max_off_policy_steps", [0, 1, 3, 99])
def test_every_step_is_sampled_once_and_no_rollout_is_older_than_the_lag(tmp_path: Path, max_off_policy_steps: int):
    actor = Actor()
    with started(tmp_path, steps=5) as run:
        seen = learn(run, actor, max_off_policy_steps)
    assert [event for event in actor.events if event.startswith("generate")] == [f"generate {n}" for n in range(1, 6)]
    assert [now - version for _, version, now in seen] == [min(step - 1, max_off_policy_steps) for step in range(1, 6)]


# Rounds


def test_steps_go_on_counting_through_rounds(tmp_path: Path):
    actor = Actor()
    with started(tmp_path, 2, 3) as run:
        seen = []
        for number in (1, 2, 3):
            run.begin_round(number)
            assert run.first_step == 2 * number - 1
            for step, version, now in learn(run, actor, 1):
                seen.append((step, now - version))
                run.log(step, {"reward": float(step)})
                assert run.is_last(step) == (step % 2 == 0)
    assert seen == [(1, 0), (2, 1), (3, 0), (4, 1), (5, 0), (6, 1)]  # a round begins with rollouts of its own
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [1, 2, 3, 4, 5, 6]


def test_each_round_has_its_folders_and_starts_without_memory(tmp_path: Path):
    with started(tmp_path, 2, 2) as run:
        run.begin_round(1)
        run.state.update(kl_coef=0.5, best_step=1.0)
        run.tensors["heldout/start/greedy/reward"] = torch.zeros(1)
        best = tmp_path / "round-1" / "best" / "step-000001"
        assert (run.final, run.best) == (tmp_path / "round-1" / "final", best)
        assert run.start_of(2) == best  # where none was kept, the last
        run.begin_round(2, best)
        assert (run.state, run.tensors, run.best) == ({}, {}, None)
        assert run.final == tmp_path / "final"  # the last round's model is the run's
        assert run.start_of(2) == best
    with started(tmp_path / "alone") as alone:
        alone.begin_round(1)
        assert alone.final == tmp_path / "alone" / "final"


def test_the_display_counts_the_steps_of_all_rounds(tmp_path: Path, capsys):
    with started(tmp_path, 2, 2, "plain") as run:
        for number in (1, 2):
            run.begin_round(number)
            for step in run.steps():
                run.log(step, {})
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["1/4", "2/4", "3/4", "4/4"]


class Writer:
    """A policy that writes a file, and looks at what was there before it."""

    def __init__(self, fails_at: int = 99):
        self.fails_at = fails_at
        self.beside: list[list[str]] = []

    def export(self, folder: Path, extra: object) -> CompletedFuture[None]:
        self.beside.append(sorted(path.name for path in folder.parent.iterdir()))
        if len(self.beside) == self.fails_at:
            raise OSError("disk full")
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        return CompletedFuture(None)


def test_a_better_policy_replaces_the_one_before_when_no_checkpoint_speaks_of_it(tmp_path: Path):
    policy = Writer()
    with started(tmp_path, steps=40) as run:
        assert run.best is None
        for step in run.steps():
            if step in (10, 15, 25, 30):  # checkpoints are taken after 20 and 40
                run.keep_best(step, policy)  # type: ignore[arg-type]
                assert run.best == tmp_path / "best" / f"step-{step:06d}"
                assert (run.best / "model.safetensors").is_file()
    # The checkpoint after 20 speaks of 15 and is published before 25 comes; nothing speaks of 10, 25 any more.
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["step-000015", "step-000030"]
    assert policy.beside[-1] == ["step-000015", "step-000025"]  # the one before was there while this was written


def test_a_better_policy_that_could_not_be_written_leaves_the_one_before(tmp_path: Path):
    policy = Writer(fails_at=2)
    with started(tmp_path) as run:
        run.keep_best(1, policy)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="disk full"):
            run.keep_best(2, policy)  # type: ignore[arg-type]
        assert run.best == tmp_path / "best" / "step-000001"
        assert (run.best / "model.safetensors").read_text() == "weights"
