"""Check and measure one GPU: numbers against the CPU's, kernels, ZeRO stages, whole runs, speed, memory.

    python benchmarks/gpu.py OUT [--stages NAME ...] [--limit 570]
    python benchmarks/gpu.py OUT --device cpu --tiny

Every stage of `gpu_stages` and `gpu_speed` runs in a process of its own under its own time limit, so that one that
fails or hangs costs nothing of the others. Rows are printed as they come, and written to ``OUT/results.jsonl``; at the
end ``OUT/results.md`` holds them as a table. A row may have a bound, and is then a check. The exit status is 1 if a
stage or a check failed. A stage that needs a package which is missing is skipped, and says which. ``--tiny`` shrinks
all models, to rehearse the stages where there is no GPU; on a CPU the limits are four times as long. Models have random
weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "machine": ("gpu_stages", 45),
    "cases": ("gpu_stages", 75),
    "attention": ("gpu_stages", 60),
    "zero": ("gpu_stages", 75),
    "decode": ("gpu_speed", 90),
    "update": ("gpu_speed", 75),
    "memory": ("gpu_speed", 60),
    "runs": ("gpu_stages", 180),
}
"""Module of each stage and its seconds at most, in the order in which they run."""
MARK = "@row "
"""Begins a line of a stage's output that holds a row."""


@dataclass(frozen=True)
class Row:
    """One number of a stage. ``bound`` makes it a check: the value must be at most that."""

    stage: str
    name: str
    value: float | str
    unit: str = ""
    bound: float | None = None

    @property
    def passed(self) -> bool:
        """True where there is nothing to check. A value that is not a number fails."""
        return self.bound is None or (isinstance(self.value, (int, float)) and self.value <= self.bound)

    @property
    def shown(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        bound = "" if self.bound is None else f" (at most {self.bound:g}: {'ok' if self.passed else 'FAILED'})"
        return f"{value} {self.unit}".rstrip() + bound


@dataclass(frozen=True)
class Ending:
    """How a stage ended: ``ok``, ``failed``, ``timeout``, or ``skipped`` for a missing package."""

    stage: str
    status: str
    seconds: float
    reason: str = ""


class Report:
    """Writes rows and endings as they come."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows, self.endings = folder, list[Row](), list[Ending]()
        self._lines: TextIO = (folder / "results.jsonl").open("w", encoding="utf-8")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(asdict(row) | {"passed": row.passed}, f"  {row.name}: {row.shown}")

    def end(self, ending: Ending) -> None:
        self.endings.append(ending)
        reason = f": {ending.reason}" if ending.reason else ""
        self._write(asdict(ending), f"{ending.stage}: {ending.status} after {ending.seconds:.0f} s{reason}")

    def _write(self, line: dict[str, Any], shown: str) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        print(shown, flush=True)

    def table(self) -> str:
        """Rows and endings as Markdown."""
        lines = ["| stage | what | value |", "|---|---|---|"]
        for ending in self.endings:
            lines += [f"| {row.stage} | {row.name} | {row.shown} |" for row in self.rows if row.stage == ending.stage]
            reason = f": {ending.reason}" if ending.reason else ""
            lines.append(f"| {ending.stage} | *{ending.status}{reason}* | {ending.seconds:.0f} s |")
        return "\n".join(lines) + "\n"

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows) and all(item.status in ("ok", "skipped") for item in self.endings)


def run_stage(stage: str, arguments: argparse.Namespace, limit: float, report: Report) -> None:
    """Run a stage in its own process group, which ends with it."""
    command = [sys.executable, __file__, str(arguments.out), "--stage", stage, "--device", arguments.device]
    command += ["--tiny"] if arguments.tiny else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began, status, reason = time.monotonic(), "timeout", f"stopped after {limit:.0f} s"
    log = report.folder / f"{stage}.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            if _read_rows(process, began + limit, report):
                status = {0: "ok", 3: "skipped"}.get(process.wait(), "failed")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status in ("failed", "skipped"):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit status {process.returncode}"
    report.end(Ending(stage, status, time.monotonic() - began, "" if status == "ok" else reason))


def _read_rows(process: subprocess.Popen[str], deadline: float, report: Report) -> bool:
    """Report the rows that a stage prints, until it ends. False if the deadline comes first."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    pending = ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(timeout=left):
                continue
            text = os.read(process.stdout.fileno(), 65536).decode(errors="replace")
            if not text:
                return True
            *lines, pending = (pending + text).split("\n")
            for line in lines:
                if line.startswith(MARK):
                    report.add(Row(**json.loads(line.removeprefix(MARK))))
    return False


def run_here(arguments: argparse.Namespace) -> int:
    """Run the stage ``--stage`` in this process. Status 3: a package is missing."""
    try:
        common = importlib.import_module("gpu_stages")
        with tempfile.TemporaryDirectory() as folder:
            setting = common.Setting(arguments.device, arguments.tiny, Path(folder))
            module = importlib.import_module(STAGES[arguments.stage][0])
            function: Callable[..., Any] = getattr(module, arguments.stage)
            for name, *rest in function(setting):
                print(MARK + json.dumps(asdict(Row(arguments.stage, name, *rest))), flush=True)
    except ModuleNotFoundError as error:
        print(f"no package {error.name}", file=sys.stderr)
        return 3
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--limit", type=float, default=570.0, help="seconds of all stages together, on a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        return run_here(arguments)
    factor = 4 if arguments.device == "cpu" else 1
    report, deadline = Report(arguments.out), time.monotonic() + factor * arguments.limit
    for stage in arguments.stages:
        left = deadline - time.monotonic()
        if left < 5:
            report.end(Ending(stage, "timeout", 0.0, f"no time left of {arguments.limit:.0f} s"))
        else:
            run_stage(stage, arguments, min(factor * STAGES[stage][1], left), report)
    (arguments.out / "results.md").write_text(report.table(), encoding="utf-8")
    print(report.table())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
