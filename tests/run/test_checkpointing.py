"""What the driver writes of rollouts sampled ahead, and which failures to save a checkpoint end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import SaveError
from align.run.checkpointing import MAX_FAILURES, Content, Progress, Saver, read_rollouts, write_rollouts
from align.types import Packed, Rollouts, Sequences


def test_rollouts_sampled_ahead_keep_temperature_step_and_both_logprobs(tmp_path: Path):
    sequences = Sequences(
        Packed.from_lists([[5, 6], [7]]), Packed.from_lists([[8], [9, 9], [8]]), torch.tensor([0, 0, 1])
    )
    logprob_BT, untempered_BT = -torch.rand(3, 2), -torch.rand(3, 2)
    finished_B = torch.tensor([True, False, True])
    write_rollouts(
        tmp_path, "rollouts-0.safetensors", Rollouts(sequences, logprob_BT, untempered_BT, finished_B, 0.3, 17)
    )
    again = read_rollouts(tmp_path / "rollouts-0.safetensors")
    assert (again.temperature, again.step) == (0.3, 17)  # a float64, as in the recipe
    assert again.logprob_BT.equal(logprob_BT)
    assert again.untempered_logprob_BT.equal(untempered_BT)
    assert again.finished_B.equal(finished_B)
    assert again.sequences.prompts.lists() == [[5, 6], [7]]
    assert again.sequences.responses.lists() == [[8], [9, 9], [8]]
    assert again.sequences.prompt_B.tolist() == [0, 0, 1]


class Disk:
    """Checkpoints on a disk that takes those of some steps only."""

    epoch = 1

    def __init__(self, folder: Path, taken: set[int]):
        self.folder, self.taken = folder, taken
        self.published: list[int] = []
        self.reported: list[str] = []

    def begin(self, step: int, size: int) -> Path:
        if step not in self.taken:
            raise SaveError("disk full")
        folder = self.folder / f"{step}"
        folder.mkdir()
        return folder

    def publish(self, partial: Path, manifest: Any) -> None:
        self.published.append(manifest.step)

    def report(self, line: str) -> None:
        self.reported.append(line)


def save(saver: Saver, step: int) -> None:
    saver.begin(Content(Progress(step=step), {}, []), {}, must=False)
    saver.wait_for_save()


def test_a_checkpoint_that_was_taken_makes_earlier_failures_forgotten(tmp_path: Path):
    disk = Disk(tmp_path, {MAX_FAILURES, 2 * MAX_FAILURES})
    saver = Saver(disk, {}, overlap=False)  # type: ignore[arg-type]
    for step in range(1, 2 * MAX_FAILURES + 1):  # MAX_FAILURES - 1 in a row fail, one is taken, and the same again
        save(saver, step)
    assert disk.published == [MAX_FAILURES, 2 * MAX_FAILURES]
    assert len(disk.reported) == 2 * (MAX_FAILURES - 1)
    for step in range(2 * MAX_FAILURES + 1, 3 * MAX_FAILURES):
        save(saver, step)
    with pytest.raises(SaveError, match="disk full"):
        save(saver, 3 * MAX_FAILURES)
