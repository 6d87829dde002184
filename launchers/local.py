#!/usr/bin/env python3
"""Run a recipe on this machine, in a process of its own, and start it again where that can help.

    python launchers/local.py recipes/quickstart/rloo.yaml --retries 3 run.steps=200

Status 76 (a worker, a disk, a node failed) and a process that somebody killed are tried again, up to --retries times;
the run resumes from its last checkpoint. Every other status is passed on, 75 (saved, more to do) too: somebody asked
for it. Signals go to the run, and after the first nothing is started again.
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
    """One run, its process, and the signals on their way to it."""

    def __init__(self, command: list[str]):
        self.command = command
        self.asked: signal.Signals | None = None
        """The first signal."""
        self._process: subprocess.Popen[bytes] | None = None

    def forward(self, number: int, _: FrameType | None) -> None:
        """Handler: pass a signal on."""
        self.asked = self.asked or signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)

    def once(self, more: Sequence[str]) -> int:
        """Run to the end; its status, 128 + n where signal n killed it."""
        if self.asked:
            return 128 + self.asked
        # A group of its own: of a Ctrl-C on a terminal the run gets what is passed on, and not a second one beside it.
        self._process = subprocess.Popen(
            [*self.command, *more], env={**os.environ, "PYTHONUNBUFFERED": "1"}, process_group=0
        )
        if self.asked:  # it came while the process was being made
            self._process.send_signal(self.asked)
        status = self._process.wait()
        return status if status >= 0 else 128 - status


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the last attempt."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--retries", type=int, default=3, help="how often a fault is tried again (%(default)s)")
    given = arguments.parse_intermixed_args(argv)
    run = load_recipe(given.recipe, given.overrides).config.run
    supervisor = Supervisor(common.train_command(given.recipe, given.overrides))
    for number in SIGNALS:
        signal.signal(number, supervisor.forward)
    status = supervisor.once([])
    for attempt in range(1, given.retries + 1):
        if supervisor.asked or not (status == FAULT or status > 128):
            break
        print(f"local.py: status {status}; attempt {attempt} of {given.retries} to go on", file=sys.stderr, flush=True)
        status = supervisor.once(common.resume_again(run))
    return status


if __name__ == "__main__":
    common.finish(main)
