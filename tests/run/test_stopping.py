"""Requests to stop: each signal, the file, and the time that is left, by hand-worked numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import align
from align.errors import ConfigError
from align.prechecks.folders import check_no_stop_file
from align.run import stopping as module
from align.run.stopping import StopRequests
from align.utils.signals import SIGNALS

CHILD = f"""
import signal, sys, time, types
for each in (signal.SIGINT, signal.SIGHUP):
    signal.signal(each, signal.SIG_DFL)  # tests in the background of a shell ignore them
package = types.ModuleType("align.run")  # without the package's own imports, which load torch
package.__path__ = [{str(Path(align.__file__).parent / "run")!r}]
sys.modules["align.run"] = package
from pathlib import Path
from align.run import stopping
stopping.SAME_REQUEST_SECONDS = float(sys.argv[2])
with stopping.StopRequests(Path(sys.argv[1])) as stop:
    print("ready", flush=True)
    while stop.stop_reason() is None:
        time.sleep(0.01)
    print(stop.stop_reason(), flush=True)
    end = time.monotonic() + 60
    while not stop.force_quit and time.monotonic() < end:
        time.sleep(0.01)
    print(stop.stop_reason(), stop.exit_status, flush=True)
    time.sleep(60)
"""
NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run in a job."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Tests may run in the background of a shell, which has them ignore SIGINT, or under ``nohup``."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of day, moved by hand; the process started 30 s ago."""
    now = SimpleNamespace(seconds=NOW)
    monkeypatch.setattr(module.time, "time", lambda: now.seconds)
    monkeypatch.setattr(module, "_process_start", lambda: NOW - 30)
    return now


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[float], subprocess.Popen]]:
    """Starts a process that waits to be asked to stop, with the seconds that one request may take."""
    started: list[subprocess.Popen] = []

    def start(same_request: float) -> subprocess.Popen:
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(same_request)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# Signals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_asks_the_second_leaves_the_third_kills(
    child: Callable[[float], subprocess.Popen], number: signal.Signals
):
    process = child(0.0)
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name} {128 + number}\n"
    process.send_signal(number)
    _, written = process.communicate(timeout=30)
    assert process.returncode == -number
    assert written.splitlines() == [
        f"{number.name}: finishing step and saving; a second signal quits without saving",
        f"{number.name}: quitting without saving; a third signal kills",
    ]


def test_signals_of_the_same_moment_are_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    with StopRequests(tmp_path) as stopping:
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm's own, to the step
        now.seconds = 50.9
        os.kill(os.getpid(), signal.SIGUSR2)  # passed on by the batch script
        assert (stopping.stop_reason(), stopping.force_quit) == ("SIGTERM", False)
        now.seconds = 51.0
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (stopping.stop_reason(), stopping.force_quit, stopping.exit_status) == ("SIGTERM", True, 140)


def test_a_handler_raises_nothing_and_interrupts_no_sleep(tmp_path: Path):
    with StopRequests(tmp_path) as stopping:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        begun = time.monotonic()
        timer.start()
        time.sleep(0.3)
        timer.join()
        assert time.monotonic() - begun >= 0.3
        assert stopping.stop_reason() == "SIGINT"


def test_handlers_are_restored(tmp_path: Path):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with StopRequests(tmp_path):
        assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_handlers_that_a_library_replaced_can_be_set_again(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests(tmp_path) as stopping:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        stopping.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.stop_reason() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_or_a_shell_has_ignored_stays_ignored(tmp_path: Path, number: signal.Signals):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequests(tmp_path) as stopping:
            os.kill(os.getpid(), number)
            assert stopping.stop_reason() is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_no_handler_is_set(tmp_path: Path):
    before, seen = {number: signal.getsignal(number) for number in SIGNALS}, []

    def use() -> None:
        with StopRequests(tmp_path) as stopping:
            seen.append({number: signal.getsignal(number) for number in SIGNALS})
            (tmp_path / "STOP").touch()
            seen.append(stopping.stop_reason())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before, "the file STOP"]


# The file


def test_the_file_stop_asks(tmp_path: Path):
    stopping = StopRequests(tmp_path)
    assert stopping.stop_reason() is None
    (tmp_path / "STOP").touch()
    assert (stopping.stop_reason(), stopping.reason, stopping.force_quit) == ("the file STOP", "the file STOP", False)
    (tmp_path / "STOP").unlink()
    assert stopping.stop_reason() == "the file STOP"


def test_the_first_request_gives_the_reason(tmp_path: Path):
    with StopRequests(tmp_path) as stopping:
        (tmp_path / "STOP").touch()
        assert stopping.stop_reason() == "the file STOP"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (stopping.stop_reason(), stopping.force_quit) == ("the file STOP", False)


def test_a_run_does_not_start_beside_a_file_stop(tmp_path: Path):
    check_no_stop_file(tmp_path)
    (tmp_path / "STOP").touch()
    with pytest.raises(ConfigError, match=rf"holds the file STOP[^\0]*remove {tmp_path / 'STOP'} to go on") as caught:
        check_no_stop_file(tmp_path)
    assert caught.value.exit_status == 78


# Time


@pytest.mark.parametrize(
    ("steps", "saves", "needed"),
    [
        ([], [], 0),
        ([10], [], 22),  # 1.1 * (10 + 10): a save that was never measured counts as long as a step
        ([10], [40], 55),  # 1.1 * (10 + 40)
        ([10, 60, 20], [40, 5], 110),  # 1.1 * (60 + 40)
        ([10], [0], 11),
    ],
)
def test_the_time_is_up_when_step_and_save_would_not_fit(
    tmp_path: Path, clock: SimpleNamespace, steps: list[float], saves: list[float], needed: float
):
    stopping = StopRequests(tmp_path, max_seconds=1000)  # ends 970 s from now: 30 s went into the start
    for seconds in steps:
        stopping.record_step(seconds)
    for seconds in saves:
        stopping.record_save(seconds)
    clock.seconds = NOW + 970 - needed - 0.01
    assert stopping.stop_reason() is None
    clock.seconds = NOW + 970 - needed + 0.01
    assert stopping.stop_reason() == "run.max_time"


def test_without_a_limit_time_never_ends_a_run(tmp_path: Path, clock: SimpleNamespace):
    stopping = StopRequests(tmp_path)
    stopping.record_step(1e9)
    clock.seconds = NOW + 1e12
    assert stopping.stop_reason() is None


@pytest.mark.parametrize(
    ("variables", "max_seconds", "end", "reason"),
    [
        ({"SLURM_JOB_START_TIME": NOW - 200}, 1000, 800, "run.max_time"),
        ({"SLURM_JOB_START_TIME": NOW - 200, "SLURM_JOB_END_TIME": NOW + 500}, 1000, 500, "the end of the Slurm job"),
        ({"SLURM_JOB_START_TIME": NOW - 200, "SLURM_JOB_END_TIME": NOW + 900}, 1000, 800, "run.max_time"),
        ({"SLURM_JOB_START_TIME": NOW - 200, "SLURM_JOB_END_TIME": NOW + 900}, None, 900, "the end of the Slurm job"),
        ({"SLURM_JOB_START_TIME": NOW - 200, "SLURM_JOB_END_TIME": NOW - 1}, 1000, 800, "run.max_time"),
    ],
    ids=["start", "the end is nearer", "the end is further", "no max_time", "the limit was raised"],
)
def test_time_counts_by_the_variables_of_the_slurm_job(
    tmp_path: Path,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, float],
    max_seconds: float | None,
    end: float,
    reason: str,
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing else can be asked
    for name, value in variables.items():
        monkeypatch.setenv(name, f"{value:.0f}")
    stopping = StopRequests(tmp_path, max_seconds)
    clock.seconds = NOW + end - 1
    assert stopping.stop_reason() is None
    clock.seconds = NOW + end + 1
    assert stopping.stop_reason() == reason


SHOWN = (
    "JobId=7 JobName=x\n   SubmitTime=2023-11-14T20:00:00\n   StartTime=2023-11-14T22:10:00 EndTime={end} Deadline=N/A"
)


@pytest.mark.parametrize(
    ("script", "end", "reason"),
    [  # NOW is 2023-11-14T22:13:20 UTC: the job started 200 s ago
        (f"echo '{SHOWN.format(end='2023-11-15T22:10:00')}'", 800, "run.max_time"),
        (f"echo '{SHOWN.format(end='2023-11-14T22:20:00')}'", 400, "the end of the Slurm job"),
        (f"echo '{SHOWN.format(end='Unknown')}'", 800, "run.max_time"),
        (f"echo '{SHOWN.format(end='2023-11-14T22:20:00')}'; exit 1", 970, "run.max_time"),
        ("exec sleep 60", 970, "run.max_time"),
    ],
    ids=["start", "end", "no end", "refused", "hangs"],
)
def test_an_older_slurm_is_asked_for_the_times_of_the_job(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, script: str, end: float, reason: str
):
    asked = 'case "$TZ $SLURM_TIME_FORMAT $*" in "UTC standard show job 7") ;; *) exit 9;; esac'
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{asked}\n{script}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setattr(module, "SCONTROL_SECONDS", 0.5 if "sleep" in script else 30.0)
    stopping = StopRequests(tmp_path, 1000)
    clock.seconds = NOW + end - 1
    assert stopping.stop_reason() is None
    clock.seconds = NOW + end + 1
    assert stopping.stop_reason() == reason


def test_the_start_of_a_process_is_that_of_its_program_not_of_its_imports():
    code = f"""
import time
before = time.time()
time.sleep(0.5)
import sys, types
package = types.ModuleType("align.run")
package.__path__ = [{str(Path(align.__file__).parent / "run")!r}]
sys.modules["align.run"] = package
from align.run import stopping
print(stopping._process_start() - before)
"""
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert begun - time.time() - 0.05 < float(done.stdout) < 0.05  # ticks are 0.01 s


# Before a run has begun

EARLY = """
import os, signal, sys
import align.cli as cli
for each in (signal.SIGINT, signal.SIGHUP):
    signal.signal(each, signal.SIG_DFL)  # tests in the background of a shell ignore them
for words in (["train"], ["train", "--dry-run"], ["show"]):
    for number in map(int, sys.argv[1:]):
        pid = os.fork()
        if pid == 0:
            cli._run = lambda *_: os.kill(os.getpid(), number)
            cli._parse = lambda argv: argv
            os._exit(cli.main(words) or 0)
        print(words[-1], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "torch" in sys.modules, flush=True)
"""


def test_a_signal_before_torch_is_loaded_asks_for_another_start():
    """Training has nothing to save yet; other commands are killed, as ever."""
    command = [sys.executable, "-c", EARLY, *(str(int(number)) for number in SIGNALS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    killed = [f"{word} {-number} False" for word in ("--dry-run", "show") for number in SIGNALS]
    assert done.stdout.splitlines() == [*["train 75 False"] * len(SIGNALS), *killed]
    assert done.stderr.splitlines() == [
        f"align: {number.name}: nothing to save; run the same command again to resume" for number in SIGNALS
    ]


def test_output_that_does_not_fit_on_the_disk_is_no_success():
    """Nor the status 120 of an interpreter that cannot flush at its end."""
    recipe = Path(align.__file__).parents[1] / "recipes/quickstart/ppo.yaml"
    command = [sys.executable, "-m", "align.cli", "show", str(recipe)]
    with open("/dev/full", "w") as full:
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert shown.returncode == 76
    assert "No space left on device" in shown.stderr and "remedy: free space" in shown.stderr
