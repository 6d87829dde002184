"""The checkpoints of a run: one folder per saved step, complete or absent.

    checkpoints/
      step-000040/                          published: manifest.json and the files that it lists
      step-000040.pinned                    keeps that checkpoint forever
      step-000020.bad/                      damaged; the file ``why`` names the damage
      latest                                name of the newest, for people and scripts; never read here
      partial-step-000060.<epoch>.<nonce>/  being written, or left by a writer that died
      old-step-000010.<epoch>.<nonce>/      being deleted

A checkpoint is published by one rename, after everything in it is synced to disk. ``epoch`` is the number of the owner
of the run folder. ``fence`` raises `LockError` if another process owns it; it precedes each rename and deletion.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from align.checkpoint.files import MANIFEST
from align.checkpoint.manifest import DamagedError, Manifest, check_owner, compare, inspect, name_of, scan, verify
from align.config import CheckpointConfig
from align.errors import ConfigError, SaveError
from align.utils import fault_injection
from align.utils.atomic_write import rename_synced, sync_folder, write_new
from align.utils.disk import saving

SPARE_BYTES = 2**20
"""Free space required beside the checkpoint itself, for manifest, pointer and folders."""
SPARE_FRACTION = 0.02
"""The same as a fraction of the checkpoint, for the file system's overhead."""
SPARE_INODES = 256


def kept_steps(metrics: Mapping[int, Mapping[str, float]], pinned: Set[int], section: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints are kept, given the metrics of all.

    The latest ``keep_latest``, the best ``keep_best`` by ``best_by``, the multiples of ``keep_every``, and the pinned
    ones. A step whose metric is missing or not finite is not a candidate for the best. Of equals, the later is better.
    """
    sign = 1 if section.best_is == "highest" else -1
    values = {step: numbers.get(section.best_by, math.nan) for step, numbers in metrics.items()}
    candidates = [step for step, value in values.items() if math.isfinite(value)]
    best = sorted(candidates, key=lambda step: (sign * values[step], step), reverse=True)
    kept = {*sorted(metrics)[-section.keep_latest :], *best[: section.keep_best]}
    if section.keep_every:
        kept |= {step for step in metrics if step % section.keep_every == 0}
    return kept | (pinned & metrics.keys())


@dataclass(frozen=True)
class SavedCheckpoint:
    """A published checkpoint whose files were verified."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """A file of the checkpoint. Raises `ConfigError` if the manifest does not list it."""
        if name not in {record.name for record in self.manifest.files}:
            remedy = "resume with the recipe and the version of align that wrote the checkpoint"
            raise ConfigError(f"the checkpoint has no file {name}", where=str(self.folder), remedy=remedy)
        return self.folder / name


def list_folder(folder: Path) -> list[Path]:
    """The content of a folder, sorted; empty if it does not exist. Raises `ConfigError` if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(folder)) from error


class CheckpointStore:
    """The folder ``checkpoints`` of one run."""

    def __init__(
        self,
        folder: Path,
        section: CheckpointConfig,
        epoch: int = 0,
        fence: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: None,
    ):
        """``report`` prints lines for the user about damage and failed deletions."""
        self.folder, self.section, self.epoch = folder, section, epoch
        self.fence, self.report = fence, report

    def begin(self, step: int, num_bytes: int) -> Path:
        """A new folder for the files of a checkpoint; ``num_bytes`` is an estimate of their size.

        Raises `SaveError` if space or inodes do not suffice or the system refuses, `ConfigError` if other users may
        write to ``folder``.
        """
        with saving(self.folder):
            fault_injection.maybe_inject("driver", 0, "checkpoint", step)
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700)
                sync_folder(self.folder.parent)
            self._check_owner()
            self._check_space(num_bytes)
            partial = self._unique("partial", name_of(step))
            partial.mkdir(mode=0o700)
        return partial

    def publish(self, partial: Path, manifest: Manifest) -> SavedCheckpoint:
        """Make the files in ``partial`` the checkpoint of ``manifest.step``; then delete what need not be kept.

        If the step is published already with the same files, round and facts, ``partial`` is dropped. Raises
        `SaveError` if it is published with others, if ``partial`` does not match the manifest, or if the system
        refuses. Once the checkpoint is on disk, failures (pointer, deletion) are reported, not raised.
        """
        final = self.folder / name_of(manifest.step)
        manifest = Manifest.read(manifest.text().encode(), final / MANIFEST)  # publish only what can be read
        with saving(partial):
            self._seal(partial, manifest)
            published = self._find_published(final, manifest)
            if not published:
                fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
                self.fence()
                os.rename(partial, final)
            fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
            sync_folder(self.folder)
        self.abandon(partial)
        self._point(manifest.step)
        self.retain()
        return SavedCheckpoint(final, published or manifest)

    def abandon(self, partial: Path) -> None:
        """Delete a checkpoint that will not be published. Never raises; `clean` deletes what remains."""
        shutil.rmtree(partial, ignore_errors=True)

    def clean(self) -> None:
        """Delete what dead writers of this epoch and earlier ones left half-written or half-deleted."""
        for path in list_folder(self.folder):
            leftover = re.fullmatch(r"(partial|old)-.+\.([0-9]+)\.[0-9a-f]{8}", path.name)
            if leftover and int(leftover[2]) <= self.epoch:
                self.fence()
                self._delete(path)

    def newest(self) -> SavedCheckpoint | None:
        """The newest valid checkpoint; None if there is no checkpoint at all.

        Damaged ones are reported and renamed. Raises `ConfigError` if there are some and none is valid: a run never
        starts from scratch because its checkpoints are damaged.
        """
        steps = self.steps()
        if steps:
            self._check_owner()
        for step in reversed(steps):
            try:
                return SavedCheckpoint(self.folder / name_of(step), verify(self.folder / name_of(step)))
            except DamagedError as error:
                self._mark_damaged(step, error)
        if any(path.name.startswith("step-") for path in list_folder(self.folder)):  # marked by an earlier start, too
            remedy = "repair one (the file `why` in each .bad folder names the damage), or start in a new run.dir"
            raise ConfigError("there are checkpoints, and none is valid", where=str(self.folder), remedy=remedy)
        return None

    def open(self, path: Path) -> SavedCheckpoint:
        """The checkpoint in the folder ``path``. Raises `ConfigError` with its damage."""
        path = path.absolute()
        try:
            return SavedCheckpoint(path, verify(path))
        except DamagedError as error:
            valid = CheckpointStore(path.parent, self.section)._newest_valid(other_than=path)
            remedy = f"the newest valid one there is {valid}" if valid else "there is no valid one beside it"
            raise ConfigError(f"not a valid checkpoint: {error}", where=str(path), remedy=remedy) from error

    def steps(self) -> list[int]:
        """Published steps in order, valid or not."""
        matches = [re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})", path.name) for path in list_folder(self.folder)]
        return sorted(int(match[1]) for match in matches if match)

    def pin(self, step: int) -> None:
        """Keep the checkpoint of ``step`` forever. Raises `SaveError`."""
        with saving(self.folder / name_of(step)):
            (self.folder / name_of(step)).stat()
            self.fence()
            (self.folder / f"{name_of(step)}.pinned").touch(mode=0o600)
            sync_folder(self.folder)

    def retain(self) -> None:
        """Delete the checkpoints that need not be kept (`kept_steps`).

        Only checkpoints whose files have the sizes of the manifest count, and only they are deleted. Failed deletions
        are reported.
        """
        metrics = {}
        for step in self.steps():
            try:
                metrics[step] = inspect(self.folder / name_of(step)).metrics
            except (DamagedError, ConfigError) as error:
                self.report(f"{self.folder / name_of(step)}: kept and not counted: {error}")
        pinned = {step for step in metrics if (self.folder / f"{name_of(step)}.pinned").exists()}
        for step in sorted(metrics.keys() - kept_steps(metrics, pinned, self.section)):
            try:
                old = self._unique("old", name_of(step))
                fault_injection.maybe_inject("driver", 0, "retain", max(metrics))
                self.fence()
                os.rename(self.folder / name_of(step), old)
                sync_folder(self.folder)  # before deleting files: a half-deleted folder must not have the final name
                fault_injection.maybe_inject("driver", 0, "retain", max(metrics))
            except OSError as error:
                self.report(f"{self.folder / name_of(step)}: cannot be deleted: {error.strerror}")
                continue
            self._delete(old)

    def _unique(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{name}.{self.epoch}.{secrets.token_hex(4)}"

    def _check_owner(self) -> None:
        try:
            check_owner(self.folder.resolve(), str(self.folder))
        except DamagedError as error:
            remedy = "make this user its only owner (chown, chmod 700), and check what is in it"
            raise ConfigError(error.reason, where=error.file, remedy=remedy) from error

    def _check_space(self, num_bytes: int) -> None:
        system = os.statvfs(self.folder)
        free = system.f_bavail * system.f_frsize
        needed = num_bytes + int(SPARE_FRACTION * num_bytes) + SPARE_BYTES
        short = None
        if free < needed:
            short = f"a checkpoint needs {needed} bytes here, {free} are free"
        elif system.f_files and system.f_favail < SPARE_INODES:  # some file systems report no inodes
            short = f"a checkpoint needs {SPARE_INODES} inodes here, {system.f_favail} are free"
        if short:
            remedy = "free space there, or keep fewer checkpoints (checkpoint.keep_latest, keep_best, keep_every)"
            raise SaveError(short, where=str(self.folder), remedy=remedy)

    def _seal(self, partial: Path, manifest: Manifest) -> None:
        """Compare the files with the manifest, write it, and sync all folders."""
        try:
            sizes, folders = scan(partial)
            compare(manifest, sizes)
        except DamagedError as error:
            remedy = "check which other process writes there; checkpoints published before are untouched"
            raise SaveError(error.reason, where=str(partial / error.file), remedy=remedy) from error
        with saving(partial / MANIFEST):
            fault_injection.maybe_inject("driver", 0, "manifest", manifest.step)
            write_new(partial / MANIFEST, [manifest.text().encode()])
        for folder in folders:
            fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
            sync_folder(folder)

    def _find_published(self, final: Path, manifest: Manifest) -> Manifest | None:
        """The manifest of the same checkpoint, if it is published already. Raises `SaveError` if another one is."""
        if not os.path.lexists(final):
            return None
        try:
            published = verify(final)
        except DamagedError as error:
            self._mark_damaged(manifest.step, error)
            return None
        same = replace(manifest, epoch=published.epoch, metrics=published.metrics)
        if same.text() != published.text():
            remedy = "resume in a new run.dir, or move that checkpoint away"
            raise SaveError("is published already, with other content", where=str(final), remedy=remedy)
        return published

    def _point(self, step: int) -> None:
        """Write ``latest``. A failure is reported: the checkpoint is valid without it."""
        temporary = self._unique("partial", "latest")
        try:
            fault_injection.maybe_inject("driver", 0, "publish", step)
            write_new(temporary, [f"{name_of(step)}\n".encode()])
            fault_injection.maybe_inject("driver", 0, "publish", step)
            self.fence()
            rename_synced(temporary, self.folder / "latest")
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self.report(f"{self.folder / 'latest'}: cannot be written: {error.strerror}")

    def _mark_damaged(self, step: int, error: DamagedError) -> None:
        """Rename a damaged checkpoint to ``.bad``, and write the reason into it."""
        path = self.folder / name_of(step)
        taken = {other.name for other in list_folder(self.folder)}
        names = (f"{path.name}.bad{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, len(taken) + 3))))
        bad = self.folder / next(name for name in names if name not in taken)
        self.report(f"{path} is damaged and renamed to {bad.name}: {error}")
        self.fence()
        try:
            os.rename(path, bad)
            if not bad.is_symlink():
                write_new(bad / "why", [f"{error}\n".encode()])
        except OSError as refusal:
            self.report(f"{bad}: cannot be written: {refusal.strerror}")

    def _newest_valid(self, other_than: Path) -> Path | None:
        """The newest valid checkpoint except one, to suggest it; renames nothing."""
        for path in (self.folder / name_of(step) for step in reversed(self.steps())):
            if path == other_than:
                continue
            try:
                verify(path)
                return path
            except (DamagedError, ConfigError):
                continue
        return None

    def _delete(self, path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            self.report(f"{path}: cannot be deleted: {error.strerror}")
