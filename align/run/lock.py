"""The lock on a run folder: one owner, a heartbeat, and an epoch that grows with every owner.

``<run.dir>/lock/epoch-000007.json`` describes the seventh owner. The highest number owns the run. A process takes over
by creating the next number with O_CREAT | O_EXCL, which is atomic on network file systems too, so one of two wins. The
new owner deletes the files of all earlier ones. An old owner that wakes up, after a stop or a network failure, finds a
higher number and must not write: `Lock.check` precedes every publication.

Whether an owner is alive is decided, in this order, by Slurm's restart count, the process table, Slurm's job state, and
the heartbeat (the modification time of the owner's file). Clocks of two machines may differ by any amount, so a
heartbeat that looks old or lies in the future is not trusted but watched.
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
"""Interval of heartbeats."""
MISSED_BEATS = 3
"""A heartbeat younger than this many intervals means alive; a heartbeat that does not change for as many means dead."""
SQUEUE_SECONDS = 10.0
"""Timeout of a query to Slurm."""
ATTEMPTS = 100
"""Attempts to take a lock that other processes take at the same time."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}
"""States of a Slurm job without running processes: it has ended, or waits to run again."""

_EPOCH = re.compile(r"epoch-(\d{6,})\.json")
_MOST_BYTES = 65536
_MOST_PID = 2**22


@dataclass(frozen=True)
class Owner:
    """The process that owns an epoch."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: int
    """Field 22 of ``/proc/<pid>/stat``: clock ticks since boot. Distinguishes a process from a later one with the same
    number."""
    user: str
    slurm_job: str
    """Empty outside Slurm."""
    slurm_restart: int
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Owner:
        """This process."""
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
        """Parse an owner's file; None if it is damaged, as when its owner died while writing it."""
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
        """Whether the two share one process table. Two containers on one machine share its boot id only."""
        return all(getattr(self, name) == getattr(other, name) != "" for name in ("host", "boot_id", "pid_namespace"))

    def is_running(self) -> bool:
        """Whether this process, of this machine, exists and is not a zombie."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it exists and is another user's
            pass
        started, state = _start_and_state(self.pid)
        return not state or (started == self.started and state not in "ZX")  # /proc may hide other users' processes

    def was_requeued(self, me: Owner) -> bool:
        """Whether Slurm ended this process and requeued its job as ``me``."""
        return self.slurm_job != "" and self.slurm_job == me.slurm_job and self.slurm_restart < me.slurm_restart


class Lock:
    """Ownership of a run folder. Use as a context manager, or call `release`."""

    def __init__(self, folder: Path, epoch: int, content: bytes, took_over: str | None):
        """Use `acquire`."""
        self.folder, self.epoch, self._content = folder, epoch, content
        self.took_over = took_over
        """The previous owner, if it exited without releasing the lock."""
        self._path = _path(folder, epoch)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat of the run folder", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path) -> Lock:
        """Take the lock on a run folder, which is created if it does not exist (mode 0700).

        Returns at once if the folder is free or its owner is known to be dead, and after about 15 seconds if only the
        heartbeat can tell. Raises `LockError` if its owner is alive, and `ConfigError` if the folder cannot be written.
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
        locks, minimum = folder / "lock", 0
        content = json.dumps(asdict(Owner.this_process()), indent=2).encode() + b"\n"
        for _ in range(ATTEMPTS):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            locks.mkdir(exist_ok=True, mode=0o700)
            newest = max(minimum, _newest_epoch(locks))
            mine = newest + 1
            try:
                previous = dead_owner(folder, newest)
            except FileNotFoundError:  # the next owner deleted it
                minimum = 0
                time.sleep(HEARTBEAT_SECONDS / 50)
                continue
            if not _create(_path(folder, mine), content):
                minimum = mine  # another process was faster: it is the owner now
            elif _newest_epoch(locks) > mine:
                _path(folder, mine).unlink(missing_ok=True)  # the number was free because it is outdated
            else:
                _delete_older(locks, mine)
                return cls(folder, mine, content, previous)
        raise LockError(f"run.dir={folder}: other processes keep taking the lock")

    def check(self) -> None:
        """Raise `LockError` if this process no longer owns the folder; `SaveError` if that cannot be determined.

        Costs one listing and one small read. Call it before every change to the run that others can see.
        """
        remedy = "leave the run to its owner; this process has changed nothing since"
        try:
            newest = _newest_epoch(self._path.parent)
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
        """Release the lock: the next start need not check whether this process is alive. May be called twice."""
        self._released.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)
        with contextlib.suppress(OSError):  # without the mark, the next start checks
            if self._is_mine():
                _release_mark(self.folder, self.epoch).touch(mode=0o644)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_mine(self) -> bool:
        """Whether the file is this process's: the folder may have been deleted and the count restarted at 1."""
        return _read(self._path)[0] == self._content

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_mine():
                    return
                os.utime(self._path)
            except FileNotFoundError:
                return
            except OSError:  # the network may recover
                continue


def dead_owner(folder: Path, epoch: int) -> str | None:
    """The owner of the newest epoch if it is dead, None if it released the lock; raises `LockError` otherwise."""
    if epoch == 0 or _release_mark(folder, epoch).exists():
        return None
    path = _path(folder, epoch)
    content, beat = _read(path)
    owner = Owner.parse(content)
    if not owner_is_alive(path, owner, folder):
        return _describe(owner)
    age = time.time() - beat
    when = f"{age:.0f} s ago" if age >= -1 else f"{-age:.0f} s ahead of this machine's clock"
    command = f" ({owner.command})" if owner and owner.command else ""
    raise LockError(
        f"run.dir={folder} belongs to {_describe(owner)}, last heartbeat {when}{command}",
        remedy=f"wait for it or stop it; choose another run.dir; or, if it is certainly dead, delete {path.parent}",
    )


def owner_is_alive(path: Path, owner: Owner | None, folder: Path) -> bool:
    """Whether the owner of an epoch may still write. An ``owner`` of None has a damaged file."""
    me = Owner.this_process()
    if owner is not None and owner.was_requeued(me):
        return False
    if owner is not None and owner.same_machine(me):
        return owner.is_running()
    fresh = abs(time.time() - _read(path)[1]) <= MISSED_BEATS * HEARTBEAT_SECONDS
    if owner is not None and owner.host == me.host and owner.boot_id != me.boot_id:
        # From before this machine rebooted, unless another machine of the same name has a heartbeat.
        return fresh and _heartbeat_changes(path, owner, folder)
    if owner is not None and owner.slurm_job and owner.slurm_job != me.slurm_job:
        states = _slurm_states(owner.slurm_job)
        if states:
            return not ENDED.issuperset(states)
        # Slurm does not know the job: it is old, or of another cluster on the same file system.
        fresh = fresh and states is None
    return fresh or _heartbeat_changes(path, owner, folder)


def _heartbeat_changes(path: Path, owner: Owner | None, folder: Path) -> bool:
    """Watch a heartbeat, without trusting any clock."""
    seconds = MISSED_BEATS * HEARTBEAT_SECONDS
    print(f"run.dir={folder} belonged to {_describe(owner)}: waiting {seconds:.0f} s for a heartbeat", file=sys.stderr)
    first, end = _read(path)[1], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(HEARTBEAT_SECONDS / 5)
        if _read(path)[1] != first:
            return True
    return False


def _slurm_states(job: str) -> list[str] | None:
    """States of a job; empty if Slurm does not know it, None if Slurm cannot be queried."""
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
    # The last task of an array has the array's number, which lists all tasks.
    return [line.split()[1] for line in done.stdout.splitlines() if line.split()[:1] == [job]]


def _path(folder: Path, epoch: int) -> Path:
    return folder / "lock" / f"epoch-{epoch:06d}.json"


def _release_mark(folder: Path, epoch: int) -> Path:
    """A mark beside the file of an epoch. The file stays, so that its number is never used twice."""
    return _path(folder, epoch).with_suffix(".released")


def _newest_epoch(locks: Path) -> int:
    return max((int(match[1]) for name in os.listdir(locks) if (match := _EPOCH.fullmatch(name))), default=0)


def _read(path: Path) -> tuple[bytes, float]:
    """Content and modification time. Opening a file makes a network file system query its server, while ``stat`` may
    answer from a cache."""
    with open(
        path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    ) as file:  # a pipe must not block
        return file.read(_MOST_BYTES), os.fstat(file.fileno()).st_mtime


def _owner(path: Path) -> str:
    try:
        return _describe(Owner.parse(_read(path)[0]))
    except OSError:
        return _describe(None)


def _describe(owner: Owner | None) -> str:
    return str(owner) if owner else "an unknown owner (its file is damaged)"


def _create(path: Path, content: bytes) -> bool:
    """Create a new file; False if it exists."""
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
    """Delete the files of earlier owners. Those that cannot be deleted are harmless."""
    for name in os.listdir(locks):
        match = re.fullmatch(r"epoch-(\d{6,})\.(json|released)", name)
        if match and int(match[1]) < epoch:
            with contextlib.suppress(OSError):
                (locks / name).unlink()


def _start_and_state(pid: int) -> tuple[int, str]:
    """Fields 22 and 3 of ``/proc/<pid>/stat``; 0 and empty if they cannot be read."""
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
