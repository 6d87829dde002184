"""Requests to stop: signals, a file, the time that is left.

A handler only sets a flag and writes a line. Raising or leaving from one while a call into Ray waits has ended in a
crash of the interpreter. So whoever runs a loop asks: `Stopping.asked` at the end of a step, which then saves and
leaves with status 75, and `Stopping.now` while waiting, which then leaves at once without saving.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from align.prechecks.folders import STOP_FILE
from align.utils.signals import IGNORED_STAYS_IGNORED, SIGNALS

SAME_REQUEST_SECONDS = 1.0
"""A signal this soon after the first is the same request: Slurm sends it to a step and the batch script passes its own
on."""
MARGIN = 0.1
"""Part of the slowest step and save that is added to both."""
SCONTROL_SECONDS = 10.0
"""How long Slurm may take for an answer."""


class Stopping:
    """Whether the run was asked to stop. Handlers of signals are set between ``with`` and its end."""

    def __init__(self, folder: Path, max_seconds: float | None = None):
        """A file ``STOP`` in ``folder`` is a request. So is the time: ``max_seconds`` after the start of the Slurm job,
        or of this process where there is none, and the end of the Slurm job, which holds without ``max_seconds`` too.
        """
        self._file = folder / STOP_FILE
        self.reason: str | None = None
        """The first request: a signal's name, ``the file STOP``, ``run.max_time`` or ``the end of the Slurm job``."""
        self.signal: signal.Signals | None = None
        """The second signal, which asks to leave at once without saving."""
        self._first: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._slowest_step, self._slowest_save = 0.0, None
        self._ends = _ends(max_seconds)

    @property
    def now(self) -> bool:
        """Whether to leave at once, without saving, with `status`."""
        return self.signal is not None

    @property
    def status(self) -> int:
        """Exit status of leaving at once: 128 + the number of the second signal, as shells have it."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> Stopping:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._handlers = {}

    def install(self) -> None:
        """Set the handlers, again where another library has set its own since: ``ray.init`` replaces that of SIGTERM by
        one that raises SystemExit. Only the main thread can; elsewhere nothing happens."""
        if not self._in_main_thread() or self.now:
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler == self._on_signal or (number in IGNORED_STAYS_IGNORED and handler is signal.SIG_IGN):
                continue
            self._handlers.setdefault(number, signal.SIG_DFL if handler is None else handler)
            signal.signal(number, self._on_signal)

    @staticmethod
    def _in_main_thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is None:
            self._first = now
            self.reason = self.reason or name
            _say(f"{name}: finishing step and saving; a second signal leaves at once\n")
        elif now - self._first >= SAME_REQUEST_SECONDS and not self.now:
            self.signal = signal.Signals(number)
            _say(f"{name}: leaving at once without saving; a third signal kills\n")
            for each in self._handlers:
                signal.signal(each, signal.SIG_DFL)

    def note_step(self, seconds: float) -> None:
        """A step took so long."""
        self._slowest_step = max(self._slowest_step, seconds)

    def note_save(self, seconds: float) -> None:
        """Writing a checkpoint took so long."""
        self._slowest_save = max(self._slowest_save or 0.0, seconds)

    def asked(self) -> str | None:
        """Why to stop, or None. Looks for the file and at the clock; call it at the end of each step.

        The time is up where now + 1.1 * (slowest step + slowest save) lies after the end: another step and its save
        would not fit. Before the first save, one is reckoned to take as long as the slowest step.
        """
        if self.reason is None and os.path.lexists(self._file):
            self.reason = f"the file {STOP_FILE}"
        save = self._slowest_step if self._slowest_save is None else self._slowest_save
        needed = (1 + MARGIN) * (self._slowest_step + save)
        for reason, end in self._ends.items():
            if self.reason is None and time.time() + needed > end:
                self.reason = reason
        return self.reason


def _say(line: str) -> None:
    """Write to stderr without buffers, which a handler may have interrupted."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, line.encode())


def _ends(max_seconds: float | None) -> dict[str, float]:
    """When the time is up, in seconds of `time.time`, by reason."""
    begin, end = _slurm_job()
    ends = {}
    if max_seconds is not None:
        ends["run.max_time"] = (_process_start() if begin is None else begin) + max_seconds
    if end is not None and end > time.time():  # else the limit was raised, or the variable is of an older job
        ends["the end of the Slurm job"] = end
    return ends


def _slurm_job() -> tuple[float | None, float | None]:
    """Start and end of the Slurm job of this process, in seconds of `time.time`; None for what is not known."""
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
    """What Slurm tells about a job, with times in UTC; nothing where it cannot be asked."""
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
    """When this process was started, in seconds of `time.time`: imports count."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
