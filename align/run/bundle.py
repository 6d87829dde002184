"""Replay bundles: everything `align replay` needs to run one step again.

    bundles/step-000012/
      bundle.json            step, reason, the checkpoint before it, the metrics of the step
      config.yaml            the recipe
      rollouts.safetensors   the rollouts that the step trained on, if its policy samples

The random state of every rank is in the checkpoint, which retention keeps. A replay also repeats the steps between the
checkpoint and the step in question.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.config import RecipeConfig
from align.config.load import write_config
from align.errors import ConfigError
from align.run.checkpointing import read_rollouts, write_rollouts
from align.run.folder import Folder
from align.types import Rollouts
from align.utils.atomic_write import write_atomic
from align.utils.disk import saving

SCHEMA = 2
TIMING = re.compile("seconds/|tokens_per_second/|[a-z_]+/service/")
"""Prefixes of metrics that differ between any two runs."""


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle."""

    folder: Path
    step: int
    reason: str
    checkpoint: Path | None
    """Where the replay starts; None if the step came before the first checkpoint."""
    metrics: dict[str, Any] | None
    """Metrics of the step; None if it failed before it had any."""
    rollouts: Rollouts | None


def write_bundle(
    disk: Folder,
    recipe: RecipeConfig,
    step: int,
    reason: str,
    metrics: Mapping[str, float] | None,
    rollouts: Rollouts | None,
) -> Path:
    """Write the bundle of a step and keep the checkpoint before it; returns its folder. Raises `SaveError`."""
    folder = disk.path / "bundles" / f"step-{step:06d}"
    with saving(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    before = [saved for saved in disk.checkpoints.steps() if saved < step]
    if before:
        disk.checkpoints.pin(before[-1])
    write_config(recipe, folder / "config.yaml")
    if rollouts is not None:
        write_rollouts(folder, "rollouts.safetensors", rollouts)
    content = {
        "schema": SCHEMA,
        "step": step,
        "reason": reason,
        "checkpoint": f"../../checkpoints/step-{before[-1]:06d}" if before else None,
        "metrics": None if metrics is None else dict(metrics),
    }
    write_atomic(folder / "bundle.json", json.dumps(content, indent=2) + "\n")
    return folder


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle. Raises `ConfigError` if the folder is not one."""
    try:
        content = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"is not a bundle: {error}", where=str(folder)) from error
    if content.get("schema") != SCHEMA:
        problem = f"bundle.json has schema {content.get('schema')}, and this version of align reads {SCHEMA}"
        raise ConfigError(problem, where=str(folder), remedy="replay it with the version of align that wrote it")
    file, checkpoint = folder / "rollouts.safetensors", content["checkpoint"]
    return Bundle(
        folder,
        content["step"],
        content["reason"],
        None if checkpoint is None else (folder / checkpoint).resolve(),
        content["metrics"],
        read_rollouts(file) if file.exists() else None,
    )


def differences(bundle: Bundle, metrics: Mapping[str, Any] | None, rollouts: Rollouts | None) -> list[str]:
    """Differences of a second run of the step from the bundle, one line each; timing metrics are ignored."""
    lines = []
    if bundle.rollouts is not None and rollouts is not None:
        then, now = bundle.rollouts, rollouts
        pairs = {
            "sampled tokens": (then.sequences.responses.ids_N, now.sequences.responses.ids_N),
            "response lengths": (then.sequences.responses.lengths_B, now.sequences.responses.lengths_B),
            "log-probabilities": (then.logprob_BT, now.logprob_BT),
        }
        lines += [f"{name} differ" for name, (a, b) in pairs.items() if not torch.equal(a, b)]
    then_metrics, now_metrics = bundle.metrics or {}, metrics or {}
    for name in dict.fromkeys([*then_metrics, *now_metrics]):
        a, b = then_metrics.get(name), now_metrics.get(name)
        if not TIMING.match(name) and a != b and not (a != a and b != b):  # nan is not equal to itself
            lines.append(f"{name}: {a} then, {b} now")
    return lines
