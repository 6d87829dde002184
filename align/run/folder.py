"""The run folder: who owns it, what stands there already, and the files that grow in it."""

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

from align.checkpoint import CheckpointStore, SavedCheckpoint, UnsoundError, listed, read_file, require_sound
from align.config import RecipeConfig
from align.config.load import flatten_config, format_config
from align.errors import ConfigError
from align.prechecks.folders import BEFORE_A_RUN, check_run_folder
from align.run.checkpointing import Progress
from align.run.environment import environment, versions
from align.run.identity import MOST_LISTED, Identity
from align.run.jsonl import JsonLines, copy_tree
from align.run.lock import Lock
from align.run.tracking import Trackers
from align.utils.disk import open_file, saving, write_whole
from align.utils.redact import redact


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
        """Best models by checkpoint: what is published does not change."""
        self.checkpoint: SavedCheckpoint | None = None
        """The checkpoint that the run goes on from."""

    def report(self, line: str) -> None:
        """Tell the user something at once."""
        with suppress(OSError):  # where stderr goes may be full, and the run need not end for that
            print(redact(f"align: {line}"), file=sys.stderr, flush=True)

    # Ownership

    def open(self) -> None:
        """Take the folder, find the checkpoint to go on from, and write what is known before the start.

        Raises `ConfigError` for a folder that holds something else or another run, `LockError` for one that is owned.
        """
        self._known = check_run_folder(self.section)
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
            self.report(f"{self.path} is taken over from {self.lock.took_over}, which ended without a word")
        self.checkpoints = CheckpointStore(
            self.path / "checkpoints", self.recipe.checkpoint, self.lock.epoch, self.lock.check, self.report
        )
        self.checkpoints.clean()
        for left in self.path.glob(".*.partial"):  # by an owner that was killed
            left.unlink()
        self.search()
        self._write_start()

    def search(self) -> None:
        """Find the newest sound checkpoint, of this folder or else the one that ``run.resume`` names."""
        own, named = self.checkpoints.newest(), Path(self.section.resume).expanduser().absolute()
        if self.section.resume in ("auto", "never") or (own and named.parent != own.folder.parent):
            self.checkpoint = own  # another run's checkpoint was the beginning, and may be gone by now
        else:
            self.checkpoint = self.checkpoints.open(named)
            if own and named != own.folder:
                remedy = f"give a new run.dir to go on from there beside it, or move {own.folder} away"
                raise ConfigError(f"run.resume={named} is not the newest checkpoint of this run", remedy=remedy)
        if self.checkpoint is not None:
            self._require(self.checkpoint.manifest.facts, self.checkpoint.folder)
        elif os.path.lexists(self.path / "checkpoints" / "latest"):
            remedy = "bring them back, or begin in a new run.dir"
            where = str(self.checkpoints.folder)
            raise ConfigError("there were checkpoints, and they are gone", where=where, remedy=remedy)
        elif self._known:
            self._begin_again()

    def _begin_again(self) -> None:
        """Begin at the first step in the folder of a run without a checkpoint; with a changed recipe only where no step
        was taken, and apart from what stands there."""
        try:
            with open_file(self.path / "identity.json") as file:
                differences = self.identity.differences(json.loads(file.read()), self.section.allow_change)
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            what, how = f"identity.json cannot be read: {str(error).splitlines()[0]}", "anew"
        else:
            if not differences:
                if not os.path.lexists(self.path / "final"):
                    self.report(f"{self.path} holds a run without a checkpoint: it begins at its first step")
                return
            keys = list(dict.fromkeys(key.split(":")[0] for key, _ in differences))
            more = f", and {len(keys) - MOST_LISTED} more" if len(keys) > MOST_LISTED else ""
            what = f"keys: {', '.join(keys[:MOST_LISTED])}{more}"
            how = "with the changed recipe"
        metrics = self.path / "metrics.jsonl"
        done = [metrics] if os.path.lexists(metrics) and (not metrics.is_file() or metrics.stat().st_size) else []
        done += [*self.path.glob("checkpoints/*"), *self.path.glob("round-*"), *self.path.glob("final*")]
        if done:
            problem = f"holds {done[0].name} of another run, and no checkpoint to resume from ({what})"
            remedy = "choose another run.dir, or move away what lies there"
            raise ConfigError(f"run.dir={self.path} {problem}", remedy=remedy)
        self.report(f"no step was taken in {self.path}: starting {how} ({what})")
        self._set_attempt_aside()

    def _set_attempt_aside(self) -> None:
        """Move what an attempt without a step has written to the folder ``attempt-N``."""
        names = (f"attempt-{number}" for number in count(1))
        aside = self.path / next(name for name in names if not os.path.lexists(self.path / name))
        (aside / "logs").mkdir(parents=True, mode=0o700)
        items = [item for item in listed(self.path) if not BEFORE_A_RUN.fullmatch(item.name)]
        for item in sorted(items, key=lambda item: item.name == "identity.json"):  # which tells a run, last
            os.rename(item, aside / item.name)
        for log in (self.path / "logs").glob("*.log"):
            os.rename(log, aside / "logs" / log.name)
        self._known = False

    def find_checkpoint_again(self) -> None:
        """Find the newest sound checkpoint of this process's own run, or the one it began with."""
        self.checkpoint = self.checkpoints.newest() or self.checkpoint

    def _require(self, facts: Mapping[str, Any], where: Path) -> None:
        self.identity.require(facts, self.section.allow_change, str(where))

    @property
    def source(self) -> Path:
        """The folder of the run that is gone on with; another one where a checkpoint of it was given."""
        return self.path if self.checkpoint is None else self.checkpoint.folder.parent.parent

    @property
    def finished(self) -> bool:
        """Whether the final model of all steps is there."""
        total = self.section.steps * self.recipe.num_rounds()
        done = self.checkpoint is None or self.checkpoint.manifest.step >= total
        final = self.path / "final"
        if not (self._known and done and os.path.lexists(final)):
            return False
        damage = damage_of(final)
        if damage and self.checkpoint is None:
            remedy = "restore it, or move it away to train again from the first step"
            raise ConfigError(f"is damaged, and no checkpoint is there: {damage}", where=str(final), remedy=remedy)
        return damage is None

    @property
    def facts(self) -> dict[str, Any]:
        """What every manifest says of the run."""
        return {**asdict(self.identity), "versions": versions()}

    def _write_start(self) -> None:
        self.write_json("identity.json", asdict(self.identity))  # first: it tells a run from other folders
        self.write_text("config.yaml", redact(format_config(self.recipe)))
        now = environment()
        self.write_text("environment.json", redact(json.dumps(now, indent=2)) + "\n")
        start = {"epoch": self.lock.epoch, "from_step": self.checkpoint.manifest.step if self.checkpoint else 0, **now}
        starts, before = self.path / "starts.jsonl", b""
        if os.path.lexists(starts):
            with open_file(starts) as file:
                before = file.read()
        write_whole(starts, before[: before.rfind(b"\n") + 1] + redact(json.dumps(start)).encode() + b"\n")

    def close(self) -> None:
        """Give the folder back."""
        try:
            for lines in (self.metrics, self.samples, self.evaluations):
                lines.close()
            self.trackers.close()
        finally:
            self.lock.release()

    # Files

    def write_json(self, name: str, content: Any) -> None:
        """Write a small file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all. Raises as `write_whole` does."""
        write_whole(self.path / name, text)

    def truncate_to_step(self, progress: Progress) -> None:
        """Let the files end where ``progress`` was written down, and drop models of later steps. Into a new folder they
        are copied from the run that is gone on with."""
        for lines in (self.metrics, self.samples, self.evaluations):
            lines.open(progress.ends.get(lines.path.name, 0), self.source / lines.path.name)
        if self.source != self.path:
            for folder in (self.source / "best", *self.source.glob("round-*")):
                copy_tree(folder, self.path / folder.name)
        self._bests.clear()
        self._drop_best(progress)
        self._check_models(progress)
        self.trackers.open(flatten_config(self.recipe), self.path, progress.step)

    def _check_models(self, progress: Progress) -> None:
        """Raise `ConfigError` where a model that the run needs, or has to show, is damaged: its best one, what its
        round starts from, and what earlier rounds gave. The final model of this round is written again."""
        steps = self.section.steps
        needed: dict[Path, int] = {}  # model: the last step whose checkpoint leads to it again
        for best in self._best(progress.round, progress.state):
            needed[best] = int(progress.state["best_step"]) - 1
        start = progress.starts.get(str(progress.round))
        if start is not None:
            match = re.search(r"best/step-([0-9]+)$", start)
            needed[self.path / start] = int(match[1]) - 1 if match else (progress.round - 1) * steps
        for number in range(1, progress.round):
            final = self.path / f"round-{number}" / "final"
            if os.path.lexists(final):
                needed[final] = number * steps
        for folder, step in needed.items():
            damage = damage_of(folder)
            if damage is not None:
                remedy = "restore it, or begin in a new run.dir"
                if any(saved <= step for saved in self.checkpoints.steps()):
                    remedy = f"restore it, or move away the checkpoints after step {step}: the run then writes it again"
                raise ConfigError(f"is damaged: {damage}", where=str(folder), remedy=remedy)

    def _drop_best(self, progress: Progress) -> None:
        """Remove the best models of this round and later ones that no checkpoint speaks of: their steps come again."""
        known = self.best_of_checkpoints() | self._best(progress.round, progress.state)
        for number in range(progress.round, self.recipe.num_rounds() + 1):
            for folder in self._models(number).glob("best/step-*"):
                if folder not in known:
                    shutil.rmtree(folder, ignore_errors=True)

    def ends(self) -> dict[str, int]:
        """Bring the files to the disk; their lengths. Raises `SaveError`."""
        return {lines.path.name: lines.sync() for lines in (self.metrics, self.samples, self.evaluations)}

    def rename_final(self, folder: Path, why: str) -> None:
        """Give a model another name, and say why."""
        names = (f"{folder.name}.before-{number}" for number in count(1))
        other = folder.with_name(next(name for name in names if not os.path.lexists(folder.with_name(name))))
        with saving(folder):
            os.rename(folder, other)
        self.report(f"{folder} is now {other.name}: {why}")

    def best_of_checkpoints(self) -> set[Path]:
        """The best models that kept checkpoints speak of."""
        return set().union(*map(self._best_of_checkpoint, self.checkpoints.steps()))

    def _best_of_checkpoint(self, step: int) -> set[Path]:
        """The same of one checkpoint; none for one that is damaged, from which no run goes on."""
        if step not in self._bests:
            folder = self.checkpoints.folder / f"step-{step:06d}"
            try:
                progress = json.loads(read_file(folder, "driver.json"))
                self._bests[step] = self._best(progress["round"], progress["state"])
            except (UnsoundError, ConfigError) as error:
                self.report(f"{folder} is damaged, and not gone on from: {error}")
                self._bests[step] = set()
        return self._bests[step]

    def _models(self, number: int) -> Path:
        """Where the models of a round are: the last round's in the run folder itself."""
        return self.path if number == self.recipe.num_rounds() else self.path / f"round-{number}"

    def _best(self, number: int, state: Mapping[str, float]) -> set[Path]:
        """The best model that the numbers of a round speak of, where they do."""
        if "best_step" not in state:
            return set()
        return {self._models(number) / "best" / f"step-{int(state['best_step']):06d}"}


def damage_of(model: Path) -> str | None:
    """Which file of a model folder is not as it was written, and how; None where all are."""
    try:
        require_sound(model)
    except UnsoundError as error:
        return str(error)
    return None
