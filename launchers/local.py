#!/usr/bin/env python3
"""Run a recipe on this machine in a child process, and restart it after failures.

    python launchers/local.py recipes/quickstart/rloo.yaml --retries 3 run.steps=200

After status 76 (a worker, a disk or a node failed) and after a process that was killed, the run is started again, up to
--retries times, and resumes from its last checkpoint. Every other status is passed on, also 75 (saved, not finished),
which only follows a request to stop. Signals are passed to the run; after the first one nothing is restarted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.config.load import load_recipe
from launchers import common

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FAULT = 76


class Supervisor:
    """Runs the command and passes signals to its process."""

    def __init__(self, command: list[str]):
        self.command = command
        self.first_signal: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def forward(self, number: int, _: FrameType | None) -> None:
        """Signal handler: pass the signal on."""
        self.first_signal = self.first_signal or signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, overrides: Sequence[str]) -> int:
        """Run once and return the status, 128 + n if signal n killed the process."""
        if self.first_signal:
            return 128 + self.first_signal
        # In a process group of its own the run gets Ctrl-C once, from `forward`, and not from the terminal as well.
        self._process = subprocess.Popen(
            [*self.command, *overrides], env={**os.environ, "PYTHONUNBUFFERED": "1"}, process_group=0
        )
        if self.first_signal:  # it came while the process was being started
            self._process.send_signal(self.first_signal)
        status = self._process.wait()
        return status if status >= 0 else 128 - status


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status of the last attempt."""
    parser = common.parser(__doc__)
    parser.add_argument("--retries", type=int, default=3, metavar="N", help="restarts after failures (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    run = load_recipe(arguments.recipe, arguments.overrides).config.run
    supervisor = Supervisor(common.train_command(arguments.recipe, arguments.overrides))
    for number in SIGNALS:
        signal.signal(number, supervisor.forward)
    status = supervisor.run([])
    for attempt in range(1, arguments.retries + 1):
        if supervisor.first_signal or not (status == FAULT or status > 128):
            break
        print(f"local.py: status {status}; restart {attempt} of {arguments.retries}", file=sys.stderr, flush=True)
        status = supervisor.run(common.resume_overrides(run))
    return status


if __name__ == "__main__":
    common.exit_with(main)
