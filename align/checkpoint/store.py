"""The checkpoints of a run: one folder for each step that was saved, there as a whole or not at all.

    checkpoints/
      step-000040/                          published: manifest.json and the files that it names
      step-000040.pinned                    keeps that checkpoint for ever
      step-000020.bad/                      was damaged; the file ``why`` says how
      latest                                name of the newest, for people and scripts; never read here
      partial-step-000060.<epoch>.<nonce>/  being written, or a torso
      old-step-000010.<epoch>.<nonce>/      being deleted

A checkpoint is published by one rename, after everything in it is on the disk. ``epoch`` is the number of the owner of
the run folder, and ``fence`` raises `LockError` when another process owns it: asked before each rename and deletion.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from align.checkpoint import retention
from align.checkpoint.files import MANIFEST
from align.checkpoint.manifest import Manifest, UnsoundError, check_owner, compare, inspect, name_of, scan, verify
from align.config import CheckpointConfig
from align.errors import ConfigError, SaveError
from align.utils import fault_injection
from align.utils.atomic_write import rename_synced, sync_folder, write_new
from align.utils.disk import saving

SPARE_BYTES = 2**20
"""Free beside what a checkpoint takes, for manifest, pointer and folders."""
SPARE_FRACTION = 0.02
"""The same by size, for what a file system adds to its files."""
SPARE_INODES = 256


@dataclass(frozen=True)
class SavedCheckpoint:
    """A published checkpoint whose files were found sound."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """A file of the manifest. Raises `ConfigError` where it names none so."""
        if name not in {record.name for record in self.manifest.files}:
            remedy = "go on with the recipe and the version of align that wrote the checkpoint"
            raise ConfigError(f"the checkpoint has no file {name}", where=str(self.folder), remedy=remedy)
        return self.folder / name


def listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none. Raises `ConfigError` where that cannot be told."""
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
        report: Callable[[str], None] = lambda note: None,
    ):
        """``report`` gets lines for the user about what was found damaged or could not be deleted."""
        self.folder, self.section, self.epoch = folder, section, epoch
        self.fence, self.report = fence, report

    def begin(self, step: int, num_bytes: int) -> Path:
        """A new folder for the files of a checkpoint; ``num_bytes`` is an estimate of what will be written.

        Raises `SaveError` where space or inodes do not suffice or the system refuses, `ConfigError` where other users
        may write to ``folder``.
        """
        with saving(self.folder):
            fault_injection.maybe_inject("driver", 0, "checkpoint", step)
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700)
                sync_folder(self.folder.parent)
            self._check_own()
            self._check_space(num_bytes)
            partial = self._aside("partial", name_of(step))
            partial.mkdir(mode=0o700)
        return partial

    def publish(self, partial: Path, manifest: Manifest) -> SavedCheckpoint:
        """Make the files in ``partial`` the checkpoint of ``manifest.step``; then delete what need not be kept.

        A step that is published already with the same files, round and facts stays, and ``partial`` is dropped. Raises
        `SaveError` where it is published with others, where ``partial`` is not what the manifest says, or where the
        system refuses. What fails after the checkpoint is on the disk (pointer, deletion) is reported, not raised.
        """
        final = self.folder / name_of(manifest.step)
        manifest = Manifest.read(manifest.text().encode(), final / MANIFEST)  # what cannot be read is not published
        with saving(partial):
            self._seal(partial, manifest)
            there = self._found_there(final, manifest)
            if not there:
                fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
                self.fence()
                os.rename(partial, final)
            fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
            sync_folder(self.folder)
        self.abandon(partial)
        self._point(manifest.step)
        self.retain()
        return SavedCheckpoint(final, there or manifest)

    def abandon(self, partial: Path) -> None:
        """Remove what was begun and will not be published. Never raises; what stays is removed by `clean`."""
        shutil.rmtree(partial, ignore_errors=True)

    def clean(self) -> None:
        """Remove what dead writers left half-written or half-deleted: of this epoch and those before."""
        for path in listed(self.folder):
            aside = re.fullmatch(r"(partial|old)-.+\.([0-9]+)\.[0-9a-f]{8}", path.name)
            if aside and int(aside[2]) <= self.epoch:
                self.fence()
                self._remove(path)

    def newest(self) -> SavedCheckpoint | None:
        """The newest checkpoint that is sound; None where there is none at all.

        Damaged ones on the way are reported and renamed. Raises `ConfigError` where there are some and none is sound:
        a run never starts afresh because its checkpoints are damaged.
        """
        steps = self.steps()
        if steps:
            self._check_own()
        for step in reversed(steps):
            try:
                return SavedCheckpoint(self.folder / name_of(step), verify(self.folder / name_of(step)))
            except UnsoundError as error:
                self._set_aside(step, error)
        if any(path.name.startswith("step-") for path in listed(self.folder)):  # those set aside before as well
            remedy = "mend one (the file `why` in each .bad folder names the damage), or start in a new run.dir"
            raise ConfigError("there are checkpoints, and none is sound", where=str(self.folder), remedy=remedy)
        return None

    def open(self, path: Path) -> SavedCheckpoint:
        """The checkpoint in the folder ``path``. Raises `ConfigError` that says what is wrong with it."""
        path = path.absolute()
        try:
            return SavedCheckpoint(path, verify(path))
        except UnsoundError as error:
            sound = CheckpointStore(path.parent, self.section)._newest_sound(other_than=path)
            remedy = f"the newest sound one there is {sound}" if sound else "there is no sound one beside it"
            raise ConfigError(f"not a sound checkpoint: {error}", where=str(path), remedy=remedy) from error

    def steps(self) -> list[int]:
        """Published steps in order, sound or not."""
        found = [re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})", path.name) for path in listed(self.folder)]
        return sorted(int(match[1]) for match in found if match)

    def pin(self, step: int) -> None:
        """Keep the checkpoint of ``step`` whatever comes. Raises `SaveError`."""
        with saving(self.folder / name_of(step)):
            (self.folder / name_of(step)).stat()
            self.fence()
            (self.folder / f"{name_of(step)}.pinned").touch(mode=0o600)
            sync_folder(self.folder)

    def retain(self) -> None:
        """Delete the checkpoints that need not be kept (`retention.kept`).

        Only those whose files are there in their sizes count, and only they are deleted. What cannot be deleted is
        reported.
        """
        metrics = {}
        for step in self.steps():
            try:
                metrics[step] = inspect(self.folder / name_of(step)).metrics
            except (UnsoundError, ConfigError) as error:
                self.report(f"{self.folder / name_of(step)}: kept and not counted: {error}")
        pinned = {step for step in metrics if (self.folder / f"{name_of(step)}.pinned").exists()}
        for step in sorted(metrics.keys() - retention.kept(metrics, pinned, self.section)):
            try:
                old = self._aside("old", name_of(step))
                fault_injection.maybe_inject("driver", 0, "retain", max(metrics))
                self.fence()
                os.rename(self.folder / name_of(step), old)
                sync_folder(self.folder)  # before its files go: half of them must never lie under its name
                fault_injection.maybe_inject("driver", 0, "retain", max(metrics))
            except OSError as error:
                self.report(f"{self.folder / name_of(step)}: cannot be deleted: {error.strerror}")
                continue
            self._remove(old)

    def _aside(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{name}.{self.epoch}.{secrets.token_hex(4)}"

    def _check_own(self) -> None:
        try:
            check_owner(self.folder.resolve(), str(self.folder))
        except UnsoundError as error:
            remedy = "make the folder yours alone (chown, chmod 700), and look at what is in it"
            raise ConfigError(error.reason, where=error.file, remedy=remedy) from error

    def _check_space(self, num_bytes: int) -> None:
        system = os.statvfs(self.folder)
        free = system.f_bavail * system.f_frsize
        needed = num_bytes + int(SPARE_FRACTION * num_bytes) + SPARE_BYTES
        short = None
        if free < needed:
            short = f"a checkpoint needs {needed} bytes here, {free} are free"
        elif system.f_files and system.f_favail < SPARE_INODES:  # some file systems count none
            short = f"a checkpoint needs {SPARE_INODES} inodes here, {system.f_favail} are free"
        if short:
            remedy = "free space there, or keep fewer checkpoints (checkpoint.keep_latest, keep_best, keep_every)"
            raise SaveError(short, where=str(self.folder), remedy=remedy)

    def _seal(self, partial: Path, manifest: Manifest) -> None:
        """Compare the files with the manifest, write it, and bring all folders to the disk."""
        try:
            sizes, folders = scan(partial)
            compare(manifest, sizes)
        except UnsoundError as error:
            remedy = "look for what else writes there; checkpoints published before are untouched"
            raise SaveError(error.reason, where=str(partial / error.file), remedy=remedy) from error
        with saving(partial / MANIFEST):
            fault_injection.maybe_inject("driver", 0, "manifest", manifest.step)
            write_new(partial / MANIFEST, [manifest.text().encode()])
        for folder in folders:
            fault_injection.maybe_inject("driver", 0, "publish", manifest.step)
            sync_folder(folder)

    def _found_there(self, final: Path, manifest: Manifest) -> Manifest | None:
        """The same checkpoint, where it is published already. Raises `SaveError` where another one is."""
        if not os.path.lexists(final):
            return None
        try:
            found = verify(final)
        except UnsoundError as error:
            self._set_aside(manifest.step, error)
            return None
        same = replace(manifest, epoch=found.epoch, metrics=found.metrics)
        if same.text() != found.text():
            remedy = "go on in a new run.dir, or move that checkpoint away"
            raise SaveError("is published already, with other content", where=str(final), remedy=remedy)
        return found

    def _point(self, step: int) -> None:
        """Write ``latest``. A failure is reported: the checkpoint counts without it."""
        temporary = self._aside("partial", "latest")
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

    def _set_aside(self, step: int, error: UnsoundError) -> None:
        """Rename a damaged checkpoint and leave the reason in it."""
        path = self.folder / name_of(step)
        taken = {other.name for other in listed(self.folder)}
        names = (f"{path.name}.bad{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, len(taken) + 3))))
        aside = self.folder / next(name for name in names if name not in taken)
        self.report(f"{path} is damaged and set aside as {aside.name}: {error}")
        self.fence()
        try:
            os.rename(path, aside)
            if not aside.is_symlink():
                write_new(aside / "why", [f"{error}\n".encode()])
        except OSError as refusal:
            self.report(f"{aside}: cannot be written: {refusal.strerror}")

    def _newest_sound(self, other_than: Path) -> Path | None:
        """The newest sound checkpoint but one, for an offer: nothing is renamed."""
        for path in (self.folder / name_of(step) for step in reversed(self.steps())):
            if path == other_than:
                continue
            try:
                verify(path)
                return path
            except (UnsoundError, ConfigError):
                continue
        return None

    def _remove(self, path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            self.report(f"{path}: cannot be deleted: {error.strerror}")
