"""Requests to stop a run: signals, the file ``STOP``, the time limit.

A signal handler only sets a flag and writes a line: raising or exiting from one while a call into Ray waits has crashed
the interpreter. Instead, loops poll. `StopRequests.stop_reason` is read at the end of a step, which then saves and
exits with status 75. `StopRequests.force_quit` is read while waiting for workers, which then exits without saving.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

from align.prechecks.folders import STOP_FILE
from align.utils.signals import SignalHandlers

SAME_REQUEST_SECONDS = 1.0
"""A second signal within this time is the same request: Slurm signals a step, and the batch script passes its own
signal on."""
MARGIN = 0.1
"""Added to the slowest step and save, as a fraction of both."""
SCONTROL_SECONDS = 10.0
"""Timeout of a query to Slurm."""


class StopRequests:
    """Whether the run was asked to stop. As a context manager, handles signals."""

    def __init__(self, folder: Path, max_seconds: float | None = None):
        """A file ``STOP`` in ``folder`` is a request.

        So is the time limit: ``max_seconds`` after the start of the Slurm job, or of this process outside Slurm; and
        the end of the Slurm job, also without ``max_seconds``.
        """
        self._file = folder / STOP_FILE
        self.reason: str | None = None
        """The first request: a signal's name, ``the file STOP``, ``run.max_time`` or ``the end of the Slurm job``."""
        self.signal: signal.Signals | None = None
        """The second signal, which asks to exit without saving."""
        self._first: float | None = None
        self._handlers = SignalHandlers(self._on_signal)
        self._slowest_step, self._slowest_save = 0.0, None
        self._ends = _end_times(max_seconds)

    @property
    def force_quit(self) -> bool:
        """Whether to exit without saving, with `exit_status`."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """Exit status of a force quit: 128 + the number of the second signal, as in shells."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> StopRequests:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.restore()

    def install(self) -> None:
        """Set the signal handlers, again where a library has replaced them; see `SignalHandlers.install`."""
        if not self.force_quit:  # the third signal kills
            self._handlers.install()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is None:
            self._first = now
            self.reason = self.reason or name
            _write_stderr(f"{name}: finishing step and saving; a second signal quits without saving\n")
        elif now - self._first >= SAME_REQUEST_SECONDS and not self.force_quit:
            self.signal = signal.Signals(number)
            _write_stderr(f"{name}: quitting without saving; a third signal kills\n")
            self._handlers.set_default()

    def record_step(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._slowest_step = max(self._slowest_step, seconds)

    def record_save(self, seconds: float) -> None:
        """Record the duration of a save."""
        self._slowest_save = max(self._slowest_save or 0.0, seconds)

    def stop_reason(self) -> str | None:
        """Why to stop, or None. Checks the file and the time; call it at the end of each step.

        The time is up if now + 1.1 * (slowest step + slowest save) is after the end: another step and its save would
        not fit. Before the first save, a save is assumed to take as long as the slowest step.
        """
        if self.reason is None and os.path.lexists(self._file):
            self.reason = f"the file {STOP_FILE}"
        save = self._slowest_step if self._slowest_save is None else self._slowest_save
        needed = (1 + MARGIN) * (self._slowest_step + save)
        for reason, end in self._ends.items():
            if self.reason is None and time.time() + needed > end:
                self.reason = reason
        return self.reason


def _write_stderr(line: str) -> None:
    """Write to stderr without buffers: the handler may have interrupted a buffered write."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, line.encode())


def _end_times(max_seconds: float | None) -> dict[str, float]:
    """When the run must stop, in seconds of `time.time`, by reason."""
    begin, end = _slurm_job()
    ends = {}
    if max_seconds is not None:
        ends["run.max_time"] = (_process_start() if begin is None else begin) + max_seconds
    if end is not None and end > time.time():  # else the limit was raised, or the variable is stale
        ends["the end of the Slurm job"] = end
    return ends


def _slurm_job() -> tuple[float | None, float | None]:
    """Start and end of this process's Slurm job in seconds of `time.time`; None if unknown."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return None, None
    names = ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")  # from Slurm 23.02 on
    begin, end = (float(text) if (text := os.environ.get(name, "")).isdigit() else None for name in names)
    if begin is not None:
        return begin, end
    shown = _scontrol(job)
    return _time_of("StartTime", shown), _time_of("EndTime", shown) if end is None else end


def _scontrol(job: str) -> str:
    """Output of ``scontrol show job`` with times in UTC; empty if Slurm cannot be queried."""
    environment = {**os.environ, "TZ": "UTC", "SLURM_TIME_FORMAT": "standard"}
    command = ["scontrol", "show", "job", job]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SCONTROL_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _time_of(key: str, shown: str) -> float | None:
    match = re.search(rf"\b{key}=(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
    return float(calendar.timegm(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))) if match else None


def _process_start() -> float:
    """Start of this process in seconds of `time.time`, before its imports."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
