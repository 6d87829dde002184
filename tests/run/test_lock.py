"""One owner of a run folder: who is refused, who is dead, and who may write no more."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import align
from align.errors import AlignError, ConfigError, LockError, SaveError
from align.run import lock as module
from align.run.lock import Lock, Owner

CHILD = f"""
import sys, types
package = types.ModuleType("align.run")  # without the package's own imports, which load torch
package.__path__ = [{str(Path(align.__file__).parent / "run")!r}]
sys.modules["align.run"] = package
from pathlib import Path
from align.errors import LockError
from align.run.lock import Lock
print("ready", flush=True)
held = {{}}
for line in sys.stdin:
    word, folder = line.split()
    try:
        if word == "acquire":
            held[folder] = Lock.acquire(Path(folder))
            print(held[folder].epoch, flush=True)
        else:
            held[folder].check()
            print("mine", flush=True)
    except LockError as error:
        print("refused", error.exit_status, flush=True)
"""
BEAT = 0.2
MANY = 4
HOUR = 3600.0


class Child:
    """Another process that takes locks when told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def tell(self, word: str, folder: Path) -> None:
        self.process.stdin.write(f"{word} {folder}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run in a job."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def children() -> Iterator[Callable[[], Child]]:
    """Starts children that are ready, and ends them."""
    started: list[Child] = []

    def start() -> Child:
        child = Child()
        started.append(child)
        assert child.answer() == "ready"
        return child

    yield start
    for child in started:
        child.process.kill()
        child.process.communicate()


@pytest.fixture
def short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that a test can wait for."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", BEAT)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching a heartbeat, which takes 15 s, fails the test; a loaded machine does not."""
    monkeypatch.setattr(module, "_heartbeat_changes", lambda *_: pytest.fail("the heartbeat is watched"))


def left_by(folder: Path, epoch: int = 1, age: float = 0.0, **changed: object) -> Path:
    """The file of an owner like this process but for what is ``changed``, and its heartbeat ``age`` seconds old."""
    path = folder / "lock" / f"epoch-{epoch:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(Owner.this_process()), **changed}))
    os.utime(path, times=(time.time() - age, time.time() - age))
    return path


def beating(path: Path, age: float) -> Callable[[], None]:
    """Move a heartbeat by a clock that is ``age`` seconds behind; returns what ends it."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT / 4):
            os.utime(path, times=(time.time() - age, time.time() - age))

    thread = threading.Thread(target=beat)
    thread.start()
    return lambda: (ended.set(), thread.join())[0]


def try_it(folder: Path, path: Path, age: float, moves: bool) -> int | str:
    """The epoch that this process gets while a heartbeat moves or stands still, or ``refused``."""
    end = beating(path, age) if moves else lambda: None
    try:
        with Lock.acquire(folder) as lock:
            return lock.epoch
    except LockError:
        return "refused"
    finally:
        end()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "lock").iterdir())


# Owning a folder


def test_the_first_owner_makes_the_folder_for_itself_alone(tmp_path: Path):
    folder = tmp_path / "runs" / "first"
    with Lock.acquire(folder) as lock:
        assert (lock.epoch, lock.took_over) == (1, None)
        assert folder.stat().st_mode & 0o777 == (folder / "lock").stat().st_mode & 0o777 == 0o700
        owner = Owner.parse((folder / "lock" / "epoch-000001.json").read_bytes())
        assert (owner.pid, owner.slurm_job, owner.slurm_restart) == (os.getpid(), "", 0)
        lock.check()


def test_a_released_folder_is_free_at_once_and_the_epoch_grows(tmp_path: Path):
    for epoch in (1, 2, 3):
        with Lock.acquire(tmp_path) as lock:
            assert (lock.epoch, lock.took_over) == (epoch, None)
            assert names(tmp_path) == [f"epoch-{epoch:06d}.json"]
        lock.release()
        assert names(tmp_path) == [f"epoch-{epoch:06d}.json", f"epoch-{epoch:06d}.released"]


def test_the_heartbeat_moves_until_release(tmp_path: Path, short_beats: None):
    lock = Lock.acquire(tmp_path)
    path = tmp_path / "lock" / "epoch-000001.json"
    os.utime(path, times=(1000, 1000))
    end = time.monotonic() + 50 * BEAT
    while path.stat().st_mtime == 1000 and time.monotonic() < end:
        time.sleep(BEAT / 4)
    assert abs(path.stat().st_mtime - time.time()) < HOUR
    lock.release()
    os.utime(path, times=(1000, 1000))
    time.sleep(3 * BEAT)
    assert path.stat().st_mtime == 1000


# Owners on this machine


def test_a_live_owner_is_named_at_once(tmp_path: Path, children: Callable[[], Child], no_waiting: None):
    child = children()
    child.tell("acquire", tmp_path)
    assert child.answer() == "1"
    with pytest.raises(LockError) as caught:
        Lock.acquire(tmp_path)
    me = Owner.this_process()
    for word in (f"run.dir={tmp_path}", f"{me.user}@{me.host}", f"process {child.pid}", "since 2", "s ago", "remedy:"):
        assert word in str(caught.value)
    assert caught.value.exit_status == 77
    assert names(tmp_path) == ["epoch-000001.json"]


def test_the_refusal_names_the_slurm_job(tmp_path: Path):
    left_by(tmp_path, slurm_job="4711", age=4)
    with pytest.raises(LockError, match=rf"process {os.getpid()}, Slurm job 4711, since .*, last heartbeat 4 s ago"):
        Lock.acquire(tmp_path)


@pytest.mark.parametrize("reaped", [True, False], ids=["a dead process", "a zombie"])
def test_a_killed_owner_is_replaced_at_once(
    tmp_path: Path, children: Callable[[], Child], reaped: bool, no_waiting: None
):
    child = children()
    child.tell("acquire", tmp_path)
    assert child.answer() == "1"
    child.process.kill()
    if reaped:
        child.process.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with Lock.acquire(tmp_path) as lock:
        assert lock.epoch == 2
        assert f"process {child.pid}" in lock.took_over
        assert names(tmp_path) == ["epoch-000002.json"]


def test_a_process_number_given_anew_is_not_the_owner(tmp_path: Path):
    left_by(tmp_path, started=Owner.this_process().started - 1)
    with Lock.acquire(tmp_path) as lock:
        assert lock.epoch == 2


def test_a_process_whose_details_are_hidden_counts_as_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_by(tmp_path, started=1)
    monkeypatch.setattr(module, "_start_and_state", lambda pid: (0, ""))
    with pytest.raises(LockError):
        Lock.acquire(tmp_path)


@pytest.mark.parametrize(
    ("age", "moves", "outcome"),
    [(HOUR, False, 2), (0.0, False, 2), (0.0, True, "refused")],
    ids=["at once", "after a look at its heartbeat", "unless it is another machine of the same name"],
)
def test_an_owner_from_before_a_reboot_is_replaced(
    tmp_path: Path, short_beats: None, age: float, moves: bool, outcome: int | str, capsys: pytest.CaptureFixture[str]
):
    path = left_by(tmp_path, boot_id="another", age=age)
    assert try_it(tmp_path, path, age, moves) == outcome
    assert ("waiting" in capsys.readouterr().err) == (age == 0)


# Owners elsewhere


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}], ids=str)
@pytest.mark.parametrize("age", [HOUR, -HOUR, 0.0], ids=["an hour behind", "an hour ahead", "right"])
@pytest.mark.parametrize("moves", [True, False], ids=["beating", "still"])
def test_a_heartbeat_decides_about_owners_elsewhere_whatever_their_clock(
    tmp_path: Path, short_beats: None, place: dict[str, str], age: float, moves: bool
):
    path = left_by(tmp_path, pid=1, age=age, **place)
    fresh = age == 0
    assert try_it(tmp_path, path, age, moves) == ("refused" if moves or fresh else 2)


def test_a_fresh_heartbeat_is_refused_without_waiting(tmp_path: Path, no_waiting: None):
    left_by(tmp_path, host="elsewhere", age=10)
    with pytest.raises(LockError, match="elsewhere.*last heartbeat 10 s ago"):
        Lock.acquire(tmp_path)


def test_the_heartbeat_of_a_fast_clock_is_told_as_such(tmp_path: Path):
    left_by(tmp_path, host="elsewhere", age=-12)
    with pytest.raises(LockError, match="last heartbeat 12 s ahead of this machine's clock"):
        Lock.acquire(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b"[]", b"null", b'{"pid": 1}', b"[" * 50000, "pid", "host"],
    ids=["empty", "bytes", "list", "null", "a part", "deep", "no process number", "no name"],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "still"])
def test_an_owner_that_cannot_be_read_is_judged_by_its_heartbeat(
    tmp_path: Path, short_beats: None, content: bytes | str, fresh: bool
):
    path = left_by(tmp_path, **{content: -1} if isinstance(content, str) else {})
    if isinstance(content, bytes):
        path.write_bytes(content)
    age = 0.0 if fresh else HOUR
    os.utime(path, times=(time.time() - age, time.time() - age))
    if fresh:
        with pytest.raises(LockError, match="belongs to an unknown owner"):
            Lock.acquire(tmp_path)
    else:
        with Lock.acquire(tmp_path) as lock:
            assert lock.epoch == 2


# Slurm


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of squeue."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(script: str) -> None:
        (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return write


ASKED = 'case "$*" in *--states=all*--jobs=7*"%A %T"*) ;; *) exit 9;; esac;'
UNKNOWN = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


@pytest.mark.parametrize(
    ("script", "age", "moves", "outcome"),
    [
        pytest.param(ASKED + "echo 7 COMPLETED", 0.0, True, 2, id="at its end, heartbeats after a network cut"),
        pytest.param(ASKED + "echo 7 NODE_FAIL", HOUR, False, 2, id="its node failed"),
        pytest.param(ASKED + "echo 7 PENDING", 0.0, False, 2, id="waits to run again"),
        pytest.param(ASKED + "echo 7 RUNNING", HOUR, False, "refused", id="runs, silent for an hour"),
        pytest.param(ASKED + "echo 7 COMPLETING", HOUR, False, "refused", id="may still save"),
        pytest.param(ASKED + "echo 8 RUNNING; echo 7 FAILED", HOUR, True, 2, id="another task of its array runs"),
        pytest.param(ASKED + "true", 0.0, False, 2, id="not listed"),
        pytest.param(UNKNOWN, 0.0, False, 2, id="unknown"),
        pytest.param(UNKNOWN, HOUR, True, "refused", id="unknown here, alive in another cluster"),
        pytest.param("echo timed out >&2; exit 1", 0.0, False, "refused", id="no answer, fresh heartbeat"),
        pytest.param("echo timed out >&2; exit 1", HOUR, False, 2, id="no answer, no heartbeat"),
        pytest.param("exec sleep 60", HOUR, True, "refused", id="hangs, heartbeat"),
    ],
)
def test_slurm_is_asked_about_the_owner_s_job(
    tmp_path: Path,
    short_beats: None,
    squeue: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    age: float,
    moves: bool,
    outcome: int | str,
):
    monkeypatch.setattr(module, "SQUEUE_SECONDS", 0.5 if "sleep" in script else 10.0)
    squeue(script)
    folder = tmp_path / "run"
    path = left_by(folder, host="elsewhere", slurm_job="7", age=age)
    assert try_it(folder, path, age, moves) == outcome


def test_without_squeue_the_heartbeat_of_a_job_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    left_by(tmp_path, host="elsewhere", slurm_job="7")
    with pytest.raises(LockError, match="Slurm job 7"):
        Lock.acquire(tmp_path)


@pytest.mark.parametrize("place", [{}, {"host": "elsewhere"}], ids=["an orphan on this node", "on another node"])
def test_a_requeued_job_replaces_its_former_self(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, str]
):
    left_by(tmp_path, slurm_job="7", slurm_restart=1, **place)  # as alive as this process, with a fresh heartbeat
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with Lock.acquire(tmp_path) as lock:
        assert lock.epoch == 2
        assert "Slurm job 7" in lock.took_over


@pytest.mark.parametrize("job", [("7", "1"), ("8", "2")], ids=["the same start of the job", "another job"])
def test_only_a_later_start_of_the_same_job_is_a_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: tuple[str, str]
):
    left_by(tmp_path, slurm_job="7", slurm_restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", job[0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", job[1])
    with pytest.raises(LockError):
        Lock.acquire(tmp_path)


# Takers at the same time


def test_of_many_threads_one_becomes_the_owner(tmp_path: Path):
    for turn in range(20):
        folder, start, outcomes = tmp_path / str(turn), threading.Barrier(MANY), []
        left_by(folder, epoch=6, started=1)

        def take(folder: Path = folder, start: threading.Barrier = start, outcomes: list = outcomes) -> None:
            start.wait()
            try:
                outcomes.append(Lock.acquire(folder).epoch)
            except LockError:
                outcomes.append("refused")

        threads = [threading.Thread(target=take) for _ in range(MANY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes, key=str) == [7, *["refused"] * (MANY - 1)]
        assert names(folder) == ["epoch-000007.json"]


@pytest.mark.slow
def test_of_many_processes_one_becomes_the_owner(tmp_path: Path, children: Callable[[], Child]):
    takers = [children() for _ in range(MANY)]
    for turn in range(20):
        folder = tmp_path / str(turn)
        left_by(folder, epoch=6, started=1)
        for taker in takers:
            taker.tell("acquire", folder)
        outcomes = [taker.answer() for taker in takers]
        assert sorted(outcomes) == ["7", *["refused 77"] * (MANY - 1)]
        owner = takers[outcomes.index("7")]
        owner.tell("check", folder)
        assert owner.answer() == "mine"
        assert names(folder) == ["epoch-000007.json"]


def test_a_taker_that_comes_late_with_an_old_number_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_by(tmp_path, epoch=9)
    listed = iter([3])
    real = module._newest_epoch
    monkeypatch.setattr(module, "_newest_epoch", lambda locks: next(listed, None) or real(locks))
    monkeypatch.setattr(module, "dead_owner", lambda *_: monkeypatch.undo() and None)
    with pytest.raises(LockError, match=f"process {os.getpid()}"):
        Lock.acquire(tmp_path)
    assert names(tmp_path) == ["epoch-000009.json"]


def test_a_lock_that_never_stays_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "epoch-000001.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(LockError, match="keep taking the lock"):
        Lock.acquire(tmp_path)


# Owners that were replaced


def test_an_owner_that_was_stopped_may_not_write_after_it_was_replaced(
    tmp_path: Path, children: Callable[[], Child], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = children()
    old.tell("acquire", tmp_path)
    assert old.answer() == "1"
    os.kill(old.pid, signal.SIGSTOP)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lock.acquire(tmp_path) as new:
        os.kill(old.pid, signal.SIGCONT)
        old.tell("check", tmp_path)
        assert old.answer() == "refused 77"
        new.check()
        assert new.epoch == 2


def test_what_is_left_of_an_old_owner_does_not_disturb_the_new_one(
    tmp_path: Path, short_beats: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = Lock.acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    new = Lock.acquire(tmp_path)
    with pytest.raises(LockError, match=f"taken over by .*, process {os.getpid()}, Slurm job 7"):
        old.check()
    new.release()  # whatever beats from here on is the old owner's
    path = tmp_path / "lock" / "epoch-000002.json"
    os.utime(path, times=(1000, 1000))
    time.sleep(3 * BEAT)
    old.release()
    assert path.stat().st_mtime == 1000
    assert names(tmp_path) == ["epoch-000002.json", "epoch-000002.released"]


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "begun again at the same number"])
def test_an_owner_whose_lock_was_deleted_may_not_write(tmp_path: Path, short_beats: None, again: bool):
    old = Lock.acquire(tmp_path)
    (tmp_path / "lock" / "epoch-000001.json").unlink()
    if again:
        path = left_by(tmp_path, epoch=1, age=HOUR, pid=1)
    with pytest.raises(LockError, match="the lock of this process was deleted"):
        old.check()
    if again:
        time.sleep(3 * BEAT)
        assert path.stat().st_mtime < time.time() - HOUR / 2, "the old heartbeat keeps the new owner alive"
    old.release()
    assert "epoch-000001.released" not in names(tmp_path)


def test_a_lock_that_cannot_be_read_is_a_fault_of_the_infrastructure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Lock.acquire(tmp_path) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_newest_epoch", fail)
            with pytest.raises(SaveError, match="the lock cannot be read: Input/output error") as caught:
                lock.check()
        assert caught.value.exit_status == 76
        lock.check()


# Folders that cannot be written


@pytest.mark.parametrize("call", ["mkdir", "open", "write"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    folder, caught = tmp_path / "run", None
    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, fail)
        try:
            Lock.acquire(folder)
        except AlignError as error:
            caught = error
    assert isinstance(caught, ConfigError)
    assert caught.exit_status == 78
    for word in (f"run.dir={folder}", os.strerror(number), "remedy:"):
        assert word in str(caught)
    if call != "mkdir":
        assert names(folder) == []


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=.* cannot be locked: File exists"):
        Lock.acquire(tmp_path / "run")
