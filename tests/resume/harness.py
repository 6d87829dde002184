"""What the tests of resuming share: runs that can be killed, and the comparison of two run folders."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

CLOCK = ("seconds/", "tokens_per_second/")


class Runs:
    """Starts runs through `server.py`."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.started: list[int] = []
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
        )

    def _ask(self, order: dict) -> int:
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, *argv: str, fault: str = "", log: str = "run", **env: str) -> int:
        """Begin ``align ARGV``; returns its process."""
        path = self._path(log)
        pid = self._ask({"argv": list(argv), "env": {"ALIGN_FAULT": fault, **env}, "log": str(path)})
        self.started.append(pid)
        return pid

    def _path(self, log: str) -> Path:
        return self.logs / f"{log.replace('/', '_')}.log"

    def wait(self, pid: int) -> int:
        """Its exit status, negative for a signal."""
        return self._ask({"wait": pid})

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to the run, if it still is there: nobody has waited for it, so the number is its own."""
        os.kill(pid, number)

    def run(self, *argv: str, fault: str = "", log: str = "run", **env: str) -> int:
        """Run ``align ARGV`` to its end."""
        return self.wait(self.start(*argv, fault=fault, log=log, **env))

    def text(self, log: str = "run") -> str:
        """What runs with this log have written."""
        path = self._path(log)
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(30)


def until(condition, seconds: float = 60.0) -> bool:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def metrics(folder: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def _driver(checkpoint: Path) -> dict:
    driver = json.loads((checkpoint / "driver.json").read_text())
    driver["totals"] = {key: value for key, value in driver["totals"].items() if not key.startswith(CLOCK)}
    del driver["file_sizes"]["metrics.jsonl"]  # seconds have more digits or fewer
    return driver


def assert_same(one: Path, other: Path) -> None:
    """Two run folders hold the same, byte for byte, but for the clock."""
    assert metrics(one) == metrics(other)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    models = sorted(path.relative_to(one) for path in one.glob("**/model.safetensors"))
    assert models == sorted(path.relative_to(other) for path in other.glob("**/model.safetensors"))
    assert models
    for model in models:
        assert (one / model).read_bytes() == (other / model).read_bytes(), model
    a, b = checkpoints(one)[-1], checkpoints(other)[-1]
    assert a.name == b.name
    assert _driver(a) == _driver(b)
    files, others = ({record["name"]: record["sha256"] for record in _files(one)} for one in (a, b))
    skipped = {"driver.json"}
    assert {n: h for n, h in files.items() if n not in skipped} == {n: h for n, h in others.items() if n not in skipped}
    assert any("rank-" in name for name in files)


def killed_at_random(runs: Runs, recipe: str, folder: Path, *, kills: int, seed: int) -> None:
    """Kill a run ``kills`` times at random moments and compare it with one that nobody disturbed.

    Each cycle lives until it has published a checkpoint: a run that is killed ever faster would never end.
    """
    options = (f"run.steps={2 * kills + 10}", "checkpoint.every=1", f"evaluation.every={kills}")
    assert runs.run("train", recipe, f"run.dir={folder / 'whole'}", *options) == 0, runs.text()
    train, chance = ("train", recipe, f"run.dir={folder / 'run'}", *options), random.Random(seed)
    for _ in range(kills):
        before = checkpoints(folder / "run")[-1:]
        pid = runs.start(*train)
        assert until(lambda: checkpoints(folder / "run")[-1:] != before), runs.text()  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.1))
        runs.kill(pid)
        assert runs.wait(pid) == -signal.SIGKILL, runs.text()
    assert runs.run(*train) == 0, runs.text()
    assert_same(folder / "run", folder / "whole")


def _files(checkpoint: Path) -> list[dict]:
    text = json.loads((checkpoint / "manifest.json").read_text())
    return text["files"] if "files" in text else text["manifest"]["files"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
