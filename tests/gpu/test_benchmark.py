"""`benchmarks/gpu.py` in tiny sizes on the CPU: rows as they come, checks, stages that fail, hang or lack a package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rehearse(folder: Path, stages: list[str]) -> list[dict[str, Any]]:
    """Lines of the results of stages, all of which end well."""
    command = [sys.executable, str(SCRIPT), str(folder), "--device", "cpu", "--tiny", "--stages", *stages]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if line.get("status") == "ok"] == stages
    return lines


def test_two_stages(tmp_path: Path):
    lines = rehearse(tmp_path, ["machine", "memory"])
    names = {line.get("name") for line in lines}
    assert {"torch", "matrix product, bfloat16", "weights: allocated", "weights to the host, pinned"} <= names
    assert "| machine | torch |" in (tmp_path / "results.md").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_stages_that_check_and_measure(tmp_path: Path):
    lines = rehearse(tmp_path, ["cases", "attention", "zero", "decode", "update"])
    checks = [line for line in lines if line.get("bound") is not None]
    # Kinds of cases; families, kernels, log-probabilities and gradient; ZeRO stages and offload.
    assert len(checks) == 5 + 3 * 2 * 2 + 5
    assert all(line["passed"] and line["value"] < 1e-5 for line in checks)


def run_stub(gpu: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, limit: float = 20.0) -> Any:
    """A report of one stage that is ``code`` in place of the benchmark's own."""
    stub = folder / "stub.py"
    stub.write_text(code)
    monkeypatch.setattr(gpu, "__file__", str(stub))
    report = gpu.Report(folder / "out")
    gpu.run_stage("machine", argparse.Namespace(out=folder, device="cpu", tiny=True), limit, report)
    return report


ROW = 'print(\'@row {"stage": "machine", "name": "error", "value": %s, "unit": "", "bound": 1.0}\', flush=True)\n'


@pytest.mark.parametrize(
    ("code", "limit", "status", "passed"),
    [
        (ROW % 0.5, 20.0, "ok", True),
        (ROW % 2.0, 20.0, "ok", False),
        (ROW % "NaN", 20.0, "ok", False),
        (ROW % 0.5 + "raise SystemExit('out of memory')", 20.0, "failed", False),
        (ROW % 0.5 + "import time; time.sleep(60)", 1.0, "timeout", False),
        (ROW % 0.5 + "import sys; print('no package ray', file=sys.stderr); sys.exit(3)", 20.0, "skipped", True),
    ],
)
def test_how_a_stage_ends(gpu, monkeypatch, tmp_path: Path, code: str, limit: float, status: str, passed: bool):
    report = run_stub(gpu, monkeypatch, tmp_path, code, limit)
    assert [row.name for row in report.rows] == ["error"]  # what came before the end is kept
    assert [ending.status for ending in report.endings] == [status]
    assert report.passed is passed
    assert "error" in report.table()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_is_named(gpu, monkeypatch, tmp_path: Path):
    report = run_stub(gpu, monkeypatch, tmp_path, "import sys; print('no package ray', file=sys.stderr); sys.exit(3)")
    assert report.endings[0].reason == "no package ray"


def test_the_stages_fit_into_ten_minutes(gpu):
    assert sum(limit for _, limit in gpu.STAGES.values()) <= 660  # a limit is rarely reached; --limit ends the whole
