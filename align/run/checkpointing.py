"""What a checkpoint holds beside the weights, and how one is saved while the next step runs.

    begin(step)        every role copies its state and starts to write; the driver writes its own state
    wait_for_save()    waits for the writers, then publishes; called before the next checkpoint, the export, and a stop

A checkpoint is taken between two steps, so it holds no half-used rollout batch and no position within minibatches.
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

MAX_FAILURES = 3
"""Failed checkpoints in a row that stop the run: a resume would lose too many steps."""
DRIVER_BYTES = 1 << 20
"""Upper estimate of what the driver writes beside tensors."""


@dataclass
class Progress:
    """Where a run is, and the numbers that its driver carries from step to step: ``driver.json`` of a checkpoint."""

    step: int = 0
    """The last step that is done."""
    round: int = 1
    start_models: dict[str, str] = field(default_factory=dict)
    """By number of the round: the model that it starts from."""
    state: dict[str, float] = field(default_factory=dict)
    """KL coefficient, reward moments, best score, ...; see `Run.state`."""
    totals: dict[str, float] = field(default_factory=dict)
    """Tokens, rollouts and seconds since the first step."""
    role_counters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Counters of the driver side of each role."""
    file_sizes: dict[str, int] = field(default_factory=dict)
    """Lengths of the files that grow, in bytes."""
    non_finite: int = 0
    """Consecutive optimizer steps that were skipped because a loss or gradient was not finite."""
    rollouts_ahead: int = 0
    """Number of rollout batches that were sampled ahead."""


@dataclass(frozen=True)
class Content:
    """The driver's part of a checkpoint."""

    progress: Progress
    tensors: Mapping[str, Tensor]
    rollouts_ahead: Sequence[Rollouts]


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
    tensors = load_file(path)
    return Rollouts(
        Sequences(
            Packed(tensors["prompt_ids_N"], tensors["prompt_offsets_B1"]),
            Packed(tensors["response_ids_N"], tensors["response_offsets_B1"]),
            tensors["prompt_B"],
        ),
        tensors["logprob_BT"],
        tensors["untempered_logprob_BT"],
        tensors["finished_B"],
        float(tensors["temperature"]),
        int(tensors["step"]),
    )


def read_content(checkpoint: SavedCheckpoint) -> Content:
    """The driver's part of a checkpoint whose hashes have been verified."""
    progress = Progress(**json.loads(checkpoint.path("driver.json").read_text()))
    return Content(
        progress,
        load_file(checkpoint.path("driver.safetensors")),
        [read_rollouts(checkpoint.path(f"rollouts-{i}.safetensors")) for i in range(progress.rollouts_ahead)],
    )


class Saver:
    """Saves checkpoints of the roles that have state, and restores them."""

    def __init__(self, checkpoints: CheckpointStore, facts: Mapping[str, Any], overlap: bool):
        """``facts`` goes into every manifest."""
        self.checkpoints, self.facts, self.overlap = checkpoints, facts, overlap
        self.roles: dict[str, StatefulRole] = {}
        self._pending: tuple[Path, Content, list[FileRecord], dict[str, float], bool] | None = None
        self._failures = 0

    def begin(self, content: Content, metrics: Mapping[str, float], must: bool) -> None:
        """Start to save a checkpoint after ``content.progress.step``; ``metrics`` are that step's, for retention.

        If the disk refuses, the run reports it and continues. Raises `SaveError` if the checkpoint is required
        (``must``), or after `MAX_FAILURES` failures in a row.
        """
        self.wait_for_save()
        step, partial = content.progress.step, None
        try:
            size = sum(wait_for_all(*(role.state_bytes() for role in self.roles.values())))
            size += sum(x.nbytes for x in content.tensors.values())
            size += sum(x.nbytes for rollouts in content.rollouts_ahead for x in _as_tensors(rollouts).values())
            partial = self.checkpoints.begin(step, size + DRIVER_BYTES)
            futures = [role.save(partial, self.overlap) for role in self.roles.values()]
            records = [
                write_json(partial, "driver.json", asdict(content.progress)),
                write_tensors(partial, "driver.safetensors", content.tensors),
            ]
            for i, rollouts in enumerate(content.rollouts_ahead):
                records.append(write_rollouts(partial, f"rollouts-{i}.safetensors", rollouts))
            records += [record for written in wait_for_all(*futures) for record in written]
        except SaveError as error:
            self.failed(error, must, partial)
            return
        self._pending = partial, content, records, dict(metrics), must

    def wait_for_save(self) -> None:
        """Wait for the writers of the checkpoint that was begun, and publish it. Errors as in `begin`."""
        if self._pending is None:
            return
        partial, content, records, metrics, must = self._pending
        self._pending = None
        try:
            if self.overlap:
                parts = wait_for_all(*(role.saved() for role in self.roles.values()))
                records = records + [record for part in parts for record in part]
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
        """Drop the checkpoint that was begun: a role that writes it is gone."""
        if self._pending is not None:
            self.checkpoints.abandon(self._pending[0])
            self._pending = None

    def failed(self, error: SaveError, must: bool, partial: Path | None = None) -> None:
        """Report that a checkpoint failed, or raise ``error``; see `begin`."""
        if partial is not None:
            for role in self.roles.values():
                with suppress(SaveError):
                    role.saved().result()  # the folder can only be deleted once no role writes to it
            self.checkpoints.abandon(partial)
        self._failures += 1
        if must or self._failures == MAX_FAILURES:
            raise error
        self.checkpoints.report(f"no checkpoint was saved: {error}; the run continues, earlier ones are untouched")

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        """Load a checkpoint into every role that has state."""
        roles = checkpoint.manifest.facts["roles"]
        if missing := sorted(self.roles.keys() - roles):
            raise ConfigError(f"the checkpoint has no {', '.join(missing)}", where=str(checkpoint.folder))
        wait_for_all(*(role.restore(checkpoint.folder) for role in self.roles.values()))
