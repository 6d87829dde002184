"""The run folder: its owner, what a start finds in it, and its files."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from align.checkpoint import CheckpointStore, DamagedError, SavedCheckpoint, list_folder, read_file, verify_result
from align.config import RecipeConfig
from align.config.load import flatten_config, format_config
from align.errors import ConfigError
from align.prechecks.folders import BEFORE_A_RUN, check_run_folder
from align.run.checkpointing import Progress
from align.run.identity import MAX_LISTED, Identity, environment, versions
from align.run.jsonl import JsonLines
from align.run.lock import Lock
from align.run.tracking import Trackers
from align.utils.atomic_write import copy_folder, write_atomic
from align.utils.disk import open_file, saving
from align.utils.security import redact


class Folder:
    """The folder of one run, owned by this process from `open` to `close`."""

    def __init__(self, recipe: RecipeConfig, identity: Identity):
        self.recipe, self.section, self.identity = recipe, recipe.run, identity
        self.path = Path(self.section.dir).expanduser().absolute()
        self.metrics, self.samples, self.evaluations = (
            JsonLines(self.path / f"{name}.jsonl", self.report, lambda: self.lock.check())
            for name in ("metrics", "samples", "evaluations")
        )
        self.trackers = Trackers(self.section.trackers, self.report)
        self._bests: dict[int, set[Path]] = {}
        """Best models by step of the checkpoint; a cache: a published checkpoint does not change."""
        self.checkpoint: SavedCheckpoint | None = None
        """The checkpoint that the run resumes from."""

    def report(self, line: str) -> None:
        """Print a line for the user to stderr, with secrets redacted."""
        with suppress(OSError):  # stderr may be a full disk, which must not end the run
            print(redact(f"align: {line}"), file=sys.stderr, flush=True)

    # Ownership

    def open(self) -> None:
        """Lock the folder, find the checkpoint to resume from, and write the files of the start.

        Raises `ConfigError` if the folder holds another run or something else, `LockError` if another process owns it.
        """
        self._has_run = check_run_folder(self.section)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            problem, remedy = f"run.dir={self.path} cannot be made: {error.strerror}", "choose another run.dir"
            raise ConfigError(problem, remedy=remedy) from error
        self.lock = Lock.acquire(self.path)
        try:
            with saving(self.path):
                self._open_owned()
        except BaseException:
            self.lock.release()
            raise

    def _open_owned(self) -> None:
        if self.lock.took_over:
            self.report(f"{self.path} is taken over from {self.lock.took_over}, which exited without releasing it")
        self.checkpoints = CheckpointStore(
            self.path / "checkpoints", self.recipe.checkpoint, self.lock.epoch, self.lock.check, self.report
        )
        self.checkpoints.clean()
        for partial in self.path.glob(".*.partial"):  # of an owner that was killed
            partial.unlink()
        self.find_checkpoint()
        self._write_start()

    def find_checkpoint(self) -> None:
        """Find the newest valid checkpoint of this folder, or else the one that ``run.resume`` names."""
        own, named = self.checkpoints.newest(), Path(self.section.resume).expanduser().absolute()
        if self.section.resume in ("auto", "never") or (own and named.parent != own.folder.parent):
            self.checkpoint = own  # the run started from another run's checkpoint, which may be deleted by now
        else:
            self.checkpoint = self.checkpoints.open(named)
            if own and named != own.folder:
                remedy = f"choose a new run.dir to start from that checkpoint, or move {own.folder} away"
                raise ConfigError(f"run.resume={named} is not the newest checkpoint of this run", remedy=remedy)
        if self.checkpoint is not None:
            facts, where = self.checkpoint.manifest.facts, str(self.checkpoint.folder)
            self.identity.require(facts, self.section.allow_change, where)
        elif os.path.lexists(self.path / "checkpoints" / "latest"):
            remedy = "restore them, or start in a new run.dir"
            where = str(self.checkpoints.folder)
            raise ConfigError("all checkpoints of this run were deleted", where=where, remedy=remedy)
        elif self._has_run:
            self._start_over()

    def _start_over(self) -> None:
        """Start at the first step in the folder of a run without a checkpoint.

        A changed recipe is accepted only if no step was taken; the files of that attempt then move to ``attempt-N``.
        """
        try:
            with open_file(self.path / "identity.json") as file:
                differences = self.identity.stored_differences(file.read(), self.section.allow_change)
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            what, how = f"identity.json cannot be read: {str(error).splitlines()[0]}", "from the first step"
        else:
            if not differences:
                if not os.path.lexists(self.path / "final"):
                    self.report(f"{self.path} holds a run without a checkpoint: starting at its first step")
                return
            keys = list(dict.fromkeys(key.split(":")[0] for key, _ in differences))
            more = f", and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
            what = f"keys: {', '.join(keys[:MAX_LISTED])}{more}"
            how = "with the changed recipe"
        metrics = self.path / "metrics.jsonl"
        done = [metrics] if os.path.lexists(metrics) and (not metrics.is_file() or metrics.stat().st_size) else []
        done += [*self.path.glob("checkpoints/*"), *self.path.glob("round-*"), *self.path.glob("final*")]
        if done:
            problem = f"holds {done[0].name} of another run, and no checkpoint to resume from ({what})"
            remedy = "choose another run.dir, or move away what is there"
            raise ConfigError(f"run.dir={self.path} {problem}", remedy=remedy)
        self.report(f"no step was taken in {self.path}: starting {how} ({what})")
        self._move_to_attempt()

    def _move_to_attempt(self) -> None:
        """Move the files of an attempt that took no step to the folder ``attempt-N``."""
        names = (f"attempt-{number}" for number in count(1))
        attempt = self.path / next(name for name in names if not os.path.lexists(self.path / name))
        (attempt / "logs").mkdir(parents=True, mode=0o700)
        items = [item for item in list_folder(self.path) if not BEFORE_A_RUN.fullmatch(item.name)]
        for item in sorted(items, key=lambda item: item.name == "identity.json"):  # last: it marks the folder as a run
            os.rename(item, attempt / item.name)
        for log in (self.path / "logs").glob("*.log"):
            os.rename(log, attempt / "logs" / log.name)
        self._has_run = False

    def find_checkpoint_again(self) -> None:
        """Find the newest valid checkpoint of this run, or the one that it started with."""
        self.checkpoint = self.checkpoints.newest() or self.checkpoint

    @property
    def source(self) -> Path:
        """Folder of the run that is resumed: another one if ``run.resume`` names its checkpoint."""
        return self.path if self.checkpoint is None else self.checkpoint.folder.parent.parent

    @property
    def finished(self) -> bool:
        """Whether the final model of the last step exists."""
        total = self.section.steps * self.recipe.num_rounds()
        done = self.checkpoint is None or self.checkpoint.manifest.step >= total
        final = self.path / "final"
        if not (self._has_run and done and os.path.lexists(final)):
            return False
        damage = damage_of(final)
        if damage and self.checkpoint is None:
            remedy = "restore it, or move it away to train again from the first step"
            raise ConfigError(f"is damaged, and there is no checkpoint: {damage}", where=str(final), remedy=remedy)
        return damage is None

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the run for every manifest."""
        return {**asdict(self.identity), "versions": versions()}

    def _write_start(self) -> None:
        self.write_json("identity.json", self.identity.content())  # first: it marks the folder as a run
        self.write_text("config.yaml", redact(format_config(self.recipe)))
        now = environment()
        self.write_text("environment.json", redact(json.dumps(now, indent=2)) + "\n")
        start = {"epoch": self.lock.epoch, "from_step": self.checkpoint.manifest.step if self.checkpoint else 0, **now}
        starts, before = self.path / "starts.jsonl", b""
        if os.path.lexists(starts):
            with open_file(starts) as file:
                before = file.read()
        write_atomic(starts, before[: before.rfind(b"\n") + 1] + redact(json.dumps(start)).encode() + b"\n")

    def close(self) -> None:
        """Close the files and release the lock."""
        try:
            for lines in (self.metrics, self.samples, self.evaluations):
                lines.close()
            self.trackers.close()
        finally:
            self.lock.release()

    # Files

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file atomically."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically. Raises as `write_atomic` does."""
        write_atomic(self.path / name, text)

    def truncate_to_step(self, progress: Progress) -> None:
        """Truncate the files to their length at ``progress``, and delete the models of later steps.

        If the checkpoint is another run's, files and best models are copied from there first.
        """
        for lines in (self.metrics, self.samples, self.evaluations):
            lines.open(progress.file_sizes.get(lines.path.name, 0), self.source / lines.path.name)
        if self.source != self.path:
            for folder in (self.source / "best", *self.source.glob("round-*")):
                copy_folder(folder, self.path / folder.name)
        self._bests.clear()
        self._delete_later_best(progress)
        self._check_models(progress)
        self.trackers.open(flatten_config(self.recipe), self.path, progress.step)

    def _check_models(self, progress: Progress) -> None:
        """Raise `ConfigError` if a model that the run needs is damaged: its best one, the one that its round starts
        from, or the final ones of earlier rounds. The final model of this round is written again."""
        steps = self.section.steps
        last_step: dict[Path, int] = {}  # by model: the last step whose checkpoint leads to it again
        for best in self._best(progress.round, progress.state):
            last_step[best] = int(progress.state["best_step"]) - 1
        start = progress.start_models.get(str(progress.round))
        if start is not None:
            match = re.search(r"best/step-([0-9]+)$", start)
            last_step[self.path / start] = int(match[1]) - 1 if match else (progress.round - 1) * steps
        for number in range(1, progress.round):
            final = self.path / f"round-{number}" / "final"
            if os.path.lexists(final):
                last_step[final] = number * steps
        for folder, step in last_step.items():
            damage = damage_of(folder)
            if damage is not None:
                remedy = "restore it, or start in a new run.dir"
                if any(saved <= step for saved in self.checkpoints.steps()):
                    remedy = f"restore it, or move away the checkpoints after step {step}: the run then writes it again"
                raise ConfigError(f"is damaged: {damage}", where=str(folder), remedy=remedy)

    def _delete_later_best(self, progress: Progress) -> None:
        """Delete the best models of this round and later ones that no checkpoint names: their steps are repeated."""
        needed = self.best_of_checkpoints() | self._best(progress.round, progress.state)
        for number in range(progress.round, self.recipe.num_rounds() + 1):
            for folder in self._models(number).glob("best/step-*"):
                if folder not in needed:
                    shutil.rmtree(folder, ignore_errors=True)

    def sync_files(self) -> dict[str, int]:
        """fsync the files that grow; returns their lengths in bytes. Raises `SaveError`."""
        return {lines.path.name: lines.sync() for lines in (self.metrics, self.samples, self.evaluations)}

    def rename_final(self, folder: Path, why: str) -> None:
        """Rename a final model to ``final.before-N``, and report why."""
        names = (f"{folder.name}.before-{number}" for number in count(1))
        other = folder.with_name(next(name for name in names if not os.path.lexists(folder.with_name(name))))
        with saving(folder):
            os.rename(folder, other)
        self.report(f"{folder} is now {other.name}: {why}")

    def best_of_checkpoints(self) -> set[Path]:
        """The best models that kept checkpoints name."""
        return set().union(*map(self._best_of_checkpoint, self.checkpoints.steps()))

    def _best_of_checkpoint(self, step: int) -> set[Path]:
        """The best model that one checkpoint names; none if it is damaged, since no run resumes from it."""
        if step not in self._bests:
            folder = self.checkpoints.folder / f"step-{step:06d}"
            try:
                progress = json.loads(read_file(folder, "driver.json"))
                self._bests[step] = self._best(progress["round"], progress["state"])
            except (DamagedError, ConfigError) as error:
                self.report(f"{folder} is damaged, and no run resumes from it: {error}")
                self._bests[step] = set()
        return self._bests[step]

    def _models(self, number: int) -> Path:
        """Folder of a round's models: for the last round, the run folder."""
        return self.path if number == self.recipe.num_rounds() else self.path / f"round-{number}"

    def _best(self, number: int, state: Mapping[str, float]) -> set[Path]:
        """The best model that the ``state`` of a round names, if any."""
        if "best_step" not in state:
            return set()
        return {self._models(number) / "best" / f"step-{int(state['best_step']):06d}"}


def damage_of(model: Path) -> str | None:
    """The first damage in a model folder, as file and reason; None if it is as it was written."""
    try:
        verify_result(model)
    except DamagedError as error:
        return str(error)
    return None
