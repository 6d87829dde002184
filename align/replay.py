"""``align replay``: run the step of a bundle again and compare its numbers and samples."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from align.config.load import load_recipe
from align.errors import DivergedError, StoppedError
from align.launch import open_run, run_rounds
from align.prepare import prepare
from align.run import bundle
from align.utils import fault_injection


def replay(folder: Path, overrides: Sequence[str], console: Console) -> bool:
    """Run the step of a bundle again in a temporary folder. Returns whether numbers, samples and outcome are equal."""
    fault_injection.arm(os.environ.get("ALIGN_FAULT"))
    recorded = bundle.read_bundle(folder)
    with tempfile.TemporaryDirectory(prefix="align-replay-") as temporary:
        replay_overrides = [
            f"run.dir={temporary}/run",
            f"run.resume={recorded.checkpoint or 'auto'}",
            "run.bundle_steps=[]",
            "run.max_restarts=0",
            "run.max_time=null",
            "checkpoint.every=0",
        ]
        prepared = prepare(load_recipe(folder / "config.yaml", [*replay_overrides, *overrides]))
        run = open_run(prepared, None)
        run.stop_after = recorded.step
        outcome = "ended"
        with run:
            first = run.progress.step + 1
            console.print(f"step {recorded.step}, bundled because: {recorded.reason}", highlight=False)
            console.print(f"running steps {first} to {recorded.step} again", highlight=False)
            try:
                run_rounds(prepared, run)
            except StoppedError:
                pass  # raised by `run.stop_after`
            except DivergedError as error:
                outcome = error.message
            lines = bundle.differences(recorded, run.metrics if recorded.metrics else None, run.sampled)
        expected = recorded.reason if recorded.metrics is None else "ended"
        if outcome != expected:
            before = repr(expected) if recorded.metrics is None else expected
            lines.append(f"outcome: {before} then, {outcome!r} now")
    console.print("\n".join(lines) or "the same, number by number", highlight=False)
    return not lines
