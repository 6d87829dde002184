"""The run folder: who owns it, what stands there already, and the files that grow in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from align import config as configuration
from align.checkpoint import Snapshot, Snapshots
from align.errors import ConfigError
from align.private import require_private
from align.redact import redact
from align.run.environment import environment, versions
from align.run.identity import Identity
from align.run.lines import Lines, copy_tree
from align.run.lock import Lock
from align.run.saving import Progress
from align.run.stopping import check_no_stop_file
from align.sections import Recipe

BEFORE_A_RUN = {"launch", "logs", "lock"}
"""What may lie in the folder of a run that has not begun: what a launcher wrote."""


class Folder:
    """The folder of one run, owned by this process from `open` to `close`."""

    def __init__(self, recipe: Recipe, identity: Identity):
        self.recipe, self.section, self.identity = recipe, recipe.run, identity
        self.path = Path(self.section.dir).expanduser().absolute()
        self.metrics, self.samples, self.evaluations = (
            Lines(self.path / f"{name}.jsonl", self.report, lambda: self.lock.check())
            for name in ("metrics", "samples", "evaluations")
        )
        self._board: SummaryWriter | None = None
        self.found: Snapshot | None = None
        """The snapshot that the run goes on from."""

    def report(self, line: str) -> None:
        """Tell the user something at once."""
        print(redact(f"align: {line}"), file=sys.stderr, flush=True)

    # Ownership

    def open(self) -> None:
        """Take the folder, find the snapshot to go on from, and write what is known before the start.

        Raises `ConfigError` for a folder that holds something else or another run, `LockError` for one that is owned.
        """
        self._look()
        check_no_stop_file(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} cannot be made: {error.strerror}") from error
        require_private(self.path)
        self.lock = Lock.acquire(self.path)
        if self.lock.took_over:
            self.report(f"{self.path} is taken over from {self.lock.took_over}, which ended without a word")
        try:
            self.snapshots = Snapshots(
                self.path / "checkpoints", self.recipe.checkpoint, self.lock.epoch, self.lock.check, self.report
            )
            self.snapshots.clean()
            self.search()
            self._write_start()
        except BaseException:
            self.lock.release()
            raise

    def _look(self) -> None:
        """Refuse what is no run, before anything is touched."""
        there = {item.name for item in self.path.iterdir()} - BEFORE_A_RUN if self.path.is_dir() else set()
        self._known = "identity.json" in there
        if there and self.section.resume == "never":
            remedy = "choose another run.dir, or let run.resume be auto"
            raise ConfigError(f"run.dir={self.path} is not empty", remedy=remedy)
        if there and not self._known:
            remedy = "choose another run.dir, or move away what lies there"
            raise ConfigError(f"run.dir={self.path} is not empty, and what lies there is no run", remedy=remedy)

    def search(self) -> None:
        """Find the newest sound snapshot, of this folder or else the one that ``run.resume`` names."""
        own, named = self.snapshots.newest(), Path(self.section.resume).expanduser().absolute()
        if self.section.resume in ("auto", "never") or (own and named.parent != own.folder.parent):
            self.found = own  # another run's snapshot was the beginning, and may be gone by now
        else:
            self.found = self.snapshots.open(named)
            if own and named != own.folder:
                remedy = f"give a new run.dir to go on from there beside it, or move {own.folder} away"
                raise ConfigError(f"run.resume={named} is not the newest snapshot of this run", remedy=remedy)
        if self.found is not None:
            self._require(self.found.manifest.facts, self.found.folder)
        elif (self.path / "checkpoints" / "latest").exists():
            remedy = "bring them back, or begin in a new run.dir"
            where = str(self.snapshots.folder)
            raise ConfigError("there were snapshots, and they are gone", where=where, remedy=remedy)
        elif self._known:
            self._require(json.loads((self.path / "identity.json").read_text()), self.path)
            self.report(f"{self.path} holds a run without a snapshot: it begins at its first step")

    def search_again(self) -> None:
        """Find the newest sound snapshot of this process's own run, or the one it began with."""
        self.found = self.snapshots.newest() or self.found

    def _require(self, facts: Mapping[str, Any], where: Path) -> None:
        self.identity.require(facts, self.section.allow_change, str(where))

    @property
    def source(self) -> Path:
        """The folder of the run that is gone on with; another one where a snapshot of it was given."""
        return self.path if self.found is None else self.found.folder.parent.parent

    @property
    def finished(self) -> bool:
        """Whether the final model of all steps is there."""
        total = self.section.steps * self.recipe.num_rounds()
        done = self.found is None or self.found.manifest.step >= total
        return self._known and done and (self.path / "final").exists()

    @property
    def facts(self) -> dict[str, Any]:
        """What every manifest says of the run."""
        return {**asdict(self.identity), "versions": versions()}

    def _write_start(self) -> None:
        self.write_text("config.yaml", redact(configuration.dumped(self.recipe)))
        now = environment()
        self.write_text("environment.json", redact(json.dumps(now, indent=2)) + "\n")
        self.write_json("identity.json", asdict(self.identity))
        start = {"epoch": self.lock.epoch, "from_step": self.found.manifest.step if self.found else 0, **now}
        with (self.path / "starts.jsonl").open("a") as starts:
            starts.write(redact(json.dumps(start)) + "\n")

    def close(self) -> None:
        """Give the folder back."""
        for lines in (self.metrics, self.samples, self.evaluations):
            lines.close()
        if self._board:
            self._board.close()
        self.lock.release()

    # Files

    def write_json(self, name: str, content: Any) -> None:
        """Write a small file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)

    def cut_back(self, progress: Progress) -> None:
        """Let the files end where ``progress`` was written down, and drop models of later steps. Into a new folder they
        are copied from the run that is gone on with."""
        for lines in (self.metrics, self.samples, self.evaluations):
            lines.open(progress.ends.get(lines.path.name, 0), self.source / lines.path.name)
        if self.source != self.path:
            for folder in (self.source / "best", *self.source.glob("round-*")):
                copy_tree(folder, self.path / folder.name)
        self._drop_best(progress)
        if self._board:
            self._board.close()
        if self.section.tensorboard:
            self._board = SummaryWriter(self.path / "tensorboard", purge_step=progress.step + 1)

    def _drop_best(self, progress: Progress) -> None:
        """Remove the best models of this round and later ones that no snapshot speaks of: their steps come again."""
        known = self.best_of_snapshots() | best_name(progress.state)
        last = self.recipe.num_rounds()
        for number in range(progress.round, last + 1):
            here = self.path if number == last else self.path / f"round-{number}"
            for folder in here.glob("best/step-*"):
                if folder.name not in known:
                    shutil.rmtree(folder)

    def ends(self) -> dict[str, int]:
        """Bring the files to the disk; their lengths. Raises `SaveError`."""
        return {lines.path.name: lines.sync() for lines in (self.metrics, self.samples, self.evaluations)}

    def log(self, step: int, line: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self.metrics.append(line, step)
        if self._board:
            for name, value in line.items():
                self._board.add_scalar(name, value, step)

    def set_aside(self, folder: Path) -> None:
        """Give a model another name, since this run goes on beyond it."""
        number = 1
        while (other := folder.with_name(f"{folder.name}.before-{number}")).exists():
            number += 1
        os.rename(folder, other)
        self.report(f"{folder} is now {other.name}: the run goes on beyond it")

    def best_of_snapshots(self) -> set[str]:
        """Names of the best models that kept snapshots speak of."""
        folders = [self.path / "checkpoints" / f"step-{step:06d}" for step in self.snapshots.steps()]
        found = [json.loads((folder / "driver.json").read_text())["state"] for folder in folders]
        return set().union(*map(best_name, found))


def best_name(state: Mapping[str, float]) -> set[str]:
    """The folder of the best model that the numbers of a run speak of, where they do."""
    return {f"step-{int(state['best_step']):06d}"} if "best_step" in state else set()
