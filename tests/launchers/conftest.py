"""Recipes, and fake commands of Slurm. Lets the tests of this folder import `submission`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from submission import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(run=tmp_path / "run", folder=tmp_path))
    return path


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands. Each call of sbatch is a line of JSON in the file returned, jobs count from 101;
    squeue shows the file ``queue``."""
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    (bin_ / "sbatch").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "with calls.open('a') as file: file.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print(f'{100 + len(calls.read_text().splitlines())};cluster')\n"
    )
    (bin_ / "squeue").write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'queue'))}\n")
    (tmp_path / "queue").write_text("")
    for command in bin_.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return calls


@pytest.fixture
def service(tmp_path: Path) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(f"reward: {{path: {tmp_path}}}\ndir: {tmp_path}/serving\nreplicas: {{max: 3}}\n")
    return path
