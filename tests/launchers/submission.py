"""Submitting jobs to fake commands of Slurm."""

from __future__ import annotations

import json
from pathlib import Path

from launchers import slurm

RECIPE = """\
algorithm: rloo
run: {{dir: {run}, steps: 4}}
data: {{path: {folder}}}
policy: {{path: {folder}, optimizer: {{lr: 1e-6}}}}
reward: {{path: {folder}}}
placement: {{policy: 0-3, reference: 2, reward: 3}}
"""


def calls_of(sbatch: Path) -> list[list[str]]:
    return [json.loads(line) for line in sbatch.read_text().splitlines()] if sbatch.exists() else []


def submit(recipe: Path, *arguments: str, nodes: int = 2, gpus: int = 2) -> int:
    size = [f"--nodes={nodes}", f"--gpus-per-node={gpus}"]
    return slurm.main([str(recipe), *size, "--time=1-00:00:00", *arguments])


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def settings(script: str) -> dict[str, str]:
    line = next(line for line in script.splitlines() if line.startswith("max_restarts="))
    return dict(part.split("=", 1) for part in line.split())
