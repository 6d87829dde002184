"""What a run keeps in a checkpoint beside the weights, and how a checkpoint is taken while the next step runs.

    begin(step)    every role copies its state and begins to write; the driver writes its own
    settle()       waits for the writers, then publishes; called before the next checkpoint, the export, and a stop

A checkpoint is taken between two steps, so there is no half-used rollout batch and no position within its minibatches.
Rollouts that were sampled ahead (``max_off_policy_steps``) are part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from align.checkpoint import SCHEMA, CheckpointStore, FileRecord, Manifest, SavedCheckpoint, write_json, write_tensors
from align.errors import ConfigError, SaveError
from align.roles import StatefulRole, wait_for_all
from align.types import Packed, Rollouts, Sequences

FAILURES = 3
"""Checkpoints in a row that may fail before the run stops: it could not go on from anywhere near."""
SMALL = 1 << 20
"""Bytes of what the driver writes beside tensors, generously."""


@dataclass
class Progress:
    """Where a run is, and the numbers that its driver carries from step to step."""

    step: int = 0
    """The last step that is done."""
    round: int = 1
    starts: dict[str, str] = field(default_factory=dict)
    """By number of the round: the model it starts from."""
    state: dict[str, float] = field(default_factory=dict)
    """KL coefficient, moments of rewards, best score, ...; see `Run.state`."""
    totals: dict[str, float] = field(default_factory=dict)
    """Tokens, rollouts and seconds since the first step."""
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the driver's side of each role counts."""
    ends: dict[str, int] = field(default_factory=dict)
    """Lengths of the files that grow, bytes."""
    not_finite: int = 0
    """Optimizer steps in a row that were left out because a number was not finite."""
    waiting: int = 0
    """Rollout batches that were sampled ahead."""


@dataclass(frozen=True)
class Content:
    """The driver's part of a checkpoint."""

    progress: Progress
    tensors: Mapping[str, Tensor]
    waiting: Sequence[Rollouts]


def _as_tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    sequences = rollouts.sequences
    return {
        "prompt_ids_N": sequences.prompts.ids_N,
        "prompt_offsets_B1": sequences.prompts.offsets_B1,
        "response_ids_N": sequences.responses.ids_N,
        "response_offsets_B1": sequences.responses.offsets_B1,
        "prompt_B": sequences.prompt_B,
        "logprob_BT": rollouts.logprob_BT,
        "untempered_logprob_BT": rollouts.untempered_logprob_BT,
        "finished_B": rollouts.finished_B,
        "temperature": torch.tensor(rollouts.temperature, dtype=torch.float64),
        "step": torch.tensor(rollouts.step),
    }


def write_rollouts(folder: Path, name: str, rollouts: Rollouts) -> FileRecord:
    """Write a rollout batch as safetensors."""
    return write_tensors(folder, name, _as_tensors(rollouts))


def read_rollouts(path: Path) -> Rollouts:
    """Read what `write_rollouts` wrote."""
    found = load_file(path)
    return Rollouts(
        Sequences(
            Packed(found["prompt_ids_N"], found["prompt_offsets_B1"]),
            Packed(found["response_ids_N"], found["response_offsets_B1"]),
            found["prompt_B"],
        ),
        found["logprob_BT"],
        found["untempered_logprob_BT"],
        found["finished_B"],
        float(found["temperature"]),
        int(found["step"]),
    )


def read_content(checkpoint: SavedCheckpoint) -> Content:
    """The driver's part of a checkpoint whose hashes have been verified."""
    progress = Progress(**json.loads(checkpoint.path("driver.json").read_text()))
    return Content(
        progress,
        load_file(checkpoint.path("driver.safetensors")),
        [read_rollouts(checkpoint.path(f"rollouts-{i}.safetensors")) for i in range(progress.waiting)],
    )


class Saver:
    """Takes checkpoints of the roles that have state, and brings these back."""

    def __init__(self, checkpoints: CheckpointStore, facts: Mapping[str, Any], overlap: bool):
        """``facts`` is what every manifest says beside its files."""
        self.checkpoints, self.facts, self.overlap = checkpoints, facts, overlap
        self.roles: dict[str, StatefulRole] = {}
        self._pending: tuple[Path, Content, list[FileRecord], dict[str, float], bool] | None = None
        self._failures = 0

    def begin(self, content: Content, metrics: Mapping[str, float], must: bool) -> None:
        """Take a checkpoint after ``content.progress.step``; ``metrics`` are that step's, for retention.

        Where the disk does not take it, the run goes on and says so; raises `SaveError` when it ``must`` be taken, or
        after three failures in a row.
        """
        self.wait_for_save()
        step, partial = content.progress.step, None
        try:
            size = sum(wait_for_all(*(role.state_bytes() for role in self.roles.values())))
            size += sum(x.nbytes for x in content.tensors.values())
            size += sum(x.nbytes for rollouts in content.waiting for x in _as_tensors(rollouts).values())
            partial = self.checkpoints.begin(step, size + SMALL)
            asked = [role.save(partial, self.overlap) for role in self.roles.values()]
            records = [
                write_json(partial, "driver.json", asdict(content.progress)),
                write_tensors(partial, "driver.safetensors", content.tensors),
                *(write_rollouts(partial, f"rollouts-{i}.safetensors", one) for i, one in enumerate(content.waiting)),
            ]
            records += [record for written in wait_for_all(*asked) for record in written]
        except SaveError as error:
            self.failed(error, must, partial)
            return
        self._pending = partial, content, records, dict(metrics), must

    def wait_for_save(self) -> None:
        """Publish what was begun. Errors as in `begin`."""
        if self._pending is None:
            return
        partial, content, records, metrics, must = self._pending
        self._pending = None
        try:
            if self.overlap:
                found = wait_for_all(*(role.saved() for role in self.roles.values()))
                records = records + [record for written in found for record in written]
            progress = content.progress
            manifest = Manifest(
                SCHEMA, progress.step, progress.round, self.checkpoints.epoch, tuple(records), dict(self.facts), metrics
            )
            self.checkpoints.publish(partial, manifest)
        except SaveError as error:
            self.failed(error, must, partial)
            return
        self._failures = 0

    def abandon(self) -> None:
        """Drop what was begun: a role that writes it is gone."""
        if self._pending is not None:
            self.checkpoints.abandon(self._pending[0])
            self._pending = None

    def failed(self, error: SaveError, must: bool, partial: Path | None = None) -> None:
        """A checkpoint could not be taken: say so and go on, or raise ``error``; see `begin`."""
        if partial is not None:
            for role in self.roles.values():
                with suppress(SaveError):
                    role.saved().result()  # no one may write there any more
            self.checkpoints.abandon(partial)
        self._failures += 1
        if must or self._failures == FAILURES:
            raise error
        self.checkpoints.report(f"no checkpoint was taken: {error}; the run goes on, the last checkpoint is untouched")

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        """Bring every role with state back to a checkpoint."""
        roles = checkpoint.manifest.facts["roles"]
        if missing := sorted(self.roles.keys() - roles):
            raise ConfigError(f"the checkpoint has no {', '.join(missing)}", where=str(checkpoint.folder))
        wait_for_all(*(role.restore(checkpoint.folder) for role in self.roles.values()))
