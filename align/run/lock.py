"""The lock on a run folder: one owner at a time, its heartbeat, and an epoch that grows with every owner.

``<run.dir>/lock/epoch-000007.json`` names the seventh owner. The highest number owns the run. Taking over is making
the next number with O_CREAT | O_EXCL, which is atomic on network file systems too, so of two takers one wins. The new
owner deletes the files of all before it. An old owner that wakes up, after a stop or a cut network, finds its file
gone and a higher number there, and may write nothing more: `Lock.check` comes before every publication.

Whether an owner lives is asked, in this order: of Slurm's restart count, of the process table, of Slurm, of the
heartbeat (the time of last change of the owner's file). Clocks of two machines may differ by any amount, so a
heartbeat that looks old or lies ahead is not believed but watched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from align.errors import ConfigError, LockError, SaveError

HEARTBEAT_SECONDS = 5.0
"""Time between two heartbeats."""
MISSED_BEATS = 3
"""A heartbeat younger than so many is taken for a sign of life; one that does not move for so many is none."""
SQUEUE_SECONDS = 10.0
"""How long Slurm may take for an answer."""
ATTEMPTS = 100
"""How often a lock that others take in the same moment is tried."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}
"""States of a Slurm job none of whose processes run: those at its end, and those of one that waits to run again."""

_EPOCH = re.compile(r"epoch-(\d{6,})\.json")
_MOST_BYTES = 65536
_MOST_PID = 2**22


@dataclass(frozen=True)
class Owner:
    """The process that an epoch belongs to."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: int
    """Field 22 of ``/proc/<pid>/stat``: clock ticks after the machine's start. Tells a process from a later one that
    was given its number."""
    user: str
    slurm_job: str
    """Empty where there is none."""
    slurm_restart: int
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Owner:
        """The process that asks."""
        pid, user = os.getpid(), os.getuid()
        restart = os.environ.get("SLURM_RESTART_COUNT", "")  # not set before the first restart
        try:
            name = pwd.getpwuid(user).pw_name
        except KeyError:  # containers may run under a number without a name
            name = str(user)
        return cls(
            host=socket.gethostname(),
            boot_id=_system("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_link("/proc/self/ns/pid"),
            pid=pid,
            started=_start_and_state(pid)[0],
            user=name,
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restart=int(restart) if restart.isdigit() else 0,
            since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            command=shlex.join(sys.argv)[:500],
        )

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """What a file says; None where it makes no sense, as when its owner died in writing it."""
        try:
            owner = cls(**json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return None
        typed = all(type(getattr(owner, field.name)).__name__ == field.type for field in fields(cls))
        return owner if typed and 0 < owner.pid < _MOST_PID else None

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"{self.user}@{self.host}, process {self.pid}{job}, since {self.since}"

    def same_machine(self, other: Owner) -> bool:
        """Whether process numbers of the two speak of the same processes. Two nodes in containers on one machine
        share its boot id."""
        return all(getattr(self, name) == getattr(other, name) != "" for name in ("host", "boot_id", "pid_namespace"))

    def runs(self) -> bool:
        """Whether this process of this machine is there and is no zombie."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is there, and another user's
            pass
        started, state = _start_and_state(self.pid)
        return not state or (started == self.started and state not in "ZX")  # /proc may hide what others run

    def was_requeued(self, me: Owner) -> bool:
        """Whether Slurm has ended this process and started its job anew, as the one that asks."""
        return self.slurm_job != "" and self.slurm_job == me.slurm_job and self.slurm_restart < me.slurm_restart


class Lock:
    """A run folder that this process owns. Use as a context manager, or call `release`."""

    def __init__(self, folder: Path, epoch: int, content: bytes, took_over: str | None):
        """`acquire` makes locks."""
        self.folder, self.epoch, self._content = folder, epoch, content
        self.took_over = took_over
        """Who owned the run before and ended without releasing it."""
        self._path = _path(folder, epoch)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat of the run folder", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path) -> Lock:
        """Own a run folder, which is made where it is missing (mode 0700).

        Returns at once where the folder is free or its owner is known to be dead, and after some 15 seconds where only
        the heartbeat can tell. Raises `LockError` where another process owns it and lives, and `ConfigError` where
        the folder cannot be written.
        """
        try:
            return cls._acquire(folder)
        except OSError as error:
            raise ConfigError(
                f"run.dir={folder} cannot be locked: {error.strerror} ({error.filename or folder / 'lock'})",
                remedy="choose a run.dir on a file system that this process may write to and that has room",
            ) from error

    @classmethod
    def _acquire(cls, folder: Path) -> Lock:
        locks, known = folder / "lock", 0
        content = json.dumps(asdict(Owner.this_process()), indent=2).encode() + b"\n"
        for _ in range(ATTEMPTS):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            locks.mkdir(exist_ok=True, mode=0o700)
            newest = max(known, _newest(locks))
            mine = newest + 1
            try:
                before = _judge(folder, newest)
            except FileNotFoundError:  # a next owner deleted it
                known = 0
                time.sleep(HEARTBEAT_SECONDS / 50)
                continue
            if not _create(_path(folder, mine), content):
                known = mine  # another process was faster: it is the owner to ask about
            elif _newest(locks) > mine:
                _path(folder, mine).unlink(missing_ok=True)  # the number was free because it is long past
            else:
                _delete_older(locks, mine)
                return cls(folder, mine, content, before)
        raise LockError(f"run.dir={folder}: other processes take and leave the lock all the time")

    def check(self) -> None:
        """Raise `LockError` where this process owns the folder no more; `SaveError` where that cannot be found out.

        Costs one listing and one small read. Call it before whatever makes a change to the run visible.
        """
        remedy = "leave the run to its owner; this process has changed nothing since"
        try:
            newest = _newest(self._path.parent)
            if newest > self.epoch:
                owner = _owner(_path(self.folder, newest))
                raise LockError(f"run.dir={self.folder} was taken over by {owner}", remedy=remedy)
            mine = self._is_mine()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise SaveError(f"run.dir={self.folder}: the lock cannot be read: {error.strerror}") from error
            mine = False
        if not mine:
            raise LockError(f"run.dir={self.folder}: the lock of this process was deleted", remedy=remedy)

    def release(self) -> None:
        """End in good order: the next start need not ask whether this process lives. May be called twice."""
        self._released.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)
        with contextlib.suppress(OSError):  # without the mark, the next start asks
            if self._is_mine():
                _released(self.folder, self.epoch).touch(mode=0o644)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_mine(self) -> bool:
        """Whether the file is the one this process made: someone may have deleted the folder and begun at 1 again."""
        return _read(self._path)[0] == self._content

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_mine():
                    return
                os.utime(self._path)
            except FileNotFoundError:
                return
            except OSError:  # a network that is down may come back
                continue


def _judge(folder: Path, epoch: int) -> str | None:
    """Nothing where the newest epoch is free, its owner where that one is dead. Raises `LockError` where it lives."""
    if epoch == 0 or _released(folder, epoch).exists():
        return None
    path = _path(folder, epoch)
    content, beat = _read(path)
    owner = Owner.parse(content)
    if not _lives(path, owner, folder):
        return _named(owner)
    age = time.time() - beat
    told = f"{age:.0f} s ago" if age >= -1 else f"{-age:.0f} s ahead of this machine's clock"
    command = f" ({owner.command})" if owner and owner.command else ""
    raise LockError(
        f"run.dir={folder} belongs to {_named(owner)}, last heartbeat {told}{command}",
        remedy=f"wait for it or stop it; choose another run.dir; or, if it is dead for certain, delete {path.parent}",
    )


def _lives(path: Path, owner: Owner | None, folder: Path) -> bool:
    """Whether the owner of an epoch may still write."""
    me = Owner.this_process()
    if owner is not None and owner.was_requeued(me):
        return False
    if owner is not None and owner.same_machine(me):
        return owner.runs()
    fresh = abs(time.time() - _read(path)[1]) <= MISSED_BEATS * HEARTBEAT_SECONDS
    if owner is not None and owner.host == me.host and owner.boot_id != me.boot_id:
        # From before this machine was started anew, unless another of the same name has a heartbeat.
        return fresh and _moves(path, owner, folder)
    if owner is not None and owner.slurm_job and owner.slurm_job != me.slurm_job:
        states = _slurm_states(owner.slurm_job)
        if states:
            return not ENDED.issuperset(states)
        # A job that Slurm does not know is long past, or of another cluster on the same file system.
        fresh = fresh and states is None
    return fresh or _moves(path, owner, folder)


def _moves(path: Path, owner: Owner | None, folder: Path) -> bool:
    """Watch a heartbeat, whatever its clock says."""
    seconds = MISSED_BEATS * HEARTBEAT_SECONDS
    print(f"run.dir={folder} belonged to {_named(owner)}: waiting {seconds:.0f} s for a heartbeat", file=sys.stderr)
    first, end = _read(path)[1], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(HEARTBEAT_SECONDS / 5)
        if _read(path)[1] != first:
            return True
    return False


def _slurm_states(job: str) -> list[str] | None:
    """States of a job, none where Slurm does not know it; None where Slurm cannot be asked."""
    squeue = shutil.which("squeue")
    if squeue is None or not job.isdigit():
        return None
    command = [squeue, "--noheader", "--states=all", f"--jobs={job}", "--format=%A %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None
    # The number of the last task of an array is that of the array too, and lists all its tasks.
    return [line.split()[1] for line in done.stdout.splitlines() if line.split()[:1] == [job]]


def _path(folder: Path, epoch: int) -> Path:
    return folder / "lock" / f"epoch-{epoch:06d}.json"


def _released(folder: Path, epoch: int) -> Path:
    """A mark beside the file of an epoch. The file stays, so that its number is never given twice."""
    return _path(folder, epoch).with_suffix(".released")


def _newest(locks: Path) -> int:
    return max((int(match[1]) for name in os.listdir(locks) if (match := _EPOCH.fullmatch(name))), default=0)


def _read(path: Path) -> tuple[bytes, float]:
    """Content and time of last change. Opening a file makes a network file system ask its server for both, where
    ``stat`` may answer from a cache."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # not on a pipe
        return file.read(_MOST_BYTES), os.fstat(file.fileno()).st_mtime


def _owner(path: Path) -> str:
    try:
        return _named(Owner.parse(_read(path)[0]))
    except OSError:
        return _named(None)


def _named(owner: Owner | None) -> str:
    return str(owner) if owner else "an owner whose name cannot be read"


def _create(path: Path, content: bytes) -> bool:
    """Make a file that must not be there yet; False where it is."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(file, content)
    except OSError:
        path.unlink(missing_ok=True)  # the disk is full
        raise
    finally:
        os.close(file)
    return True


def _delete_older(locks: Path, epoch: int) -> None:
    """Delete what owners before this epoch left. What cannot be deleted is harmless."""
    for name in os.listdir(locks):
        match = re.fullmatch(r"epoch-(\d{6,})\.(json|released)", name)
        if match and int(match[1]) < epoch:
            with contextlib.suppress(OSError):
                (locks / name).unlink()


def _start_and_state(pid: int) -> tuple[int, str]:
    """Fields 22 and 3 of ``/proc/<pid>/stat``; 0 and nothing where they cannot be read."""
    after_name = _system(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(after_name[19]), after_name[0]) if len(after_name) > 19 else (0, "")


def _system(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
