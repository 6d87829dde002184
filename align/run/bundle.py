"""Replay bundles: what it takes to run one step again.

    bundles/step-000012/
      bundle.json            step, reason, the checkpoint before it, the metrics that the step gave
      config.yaml            the recipe
      rollouts.safetensors   what the step learned from, where its policy samples

The state of every rank's generators is in the checkpoint, which retention leaves alone. Steps between it and the one in
question are run again too.
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
from align.utils.disk import saving, write_whole

SCHEMA = 2
CLOCK = re.compile("seconds/|tokens_per_second/|[a-z_]+/service/")
"""How metrics begin that no two runs share."""


@dataclass(frozen=True)
class Bundle:
    """A bundle, read."""

    folder: Path
    step: int
    reason: str
    checkpoint: Path | None
    """Where to begin; None where the step came before the first checkpoint."""
    metrics: dict[str, Any] | None
    """What the step gave; None where it gave nothing."""
    rollouts: Rollouts | None


def write(
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
    before = [at for at in disk.checkpoints.steps() if at < step]
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
    write_whole(folder / "bundle.json", json.dumps(content, indent=2) + "\n")
    return folder


def read(folder: Path) -> Bundle:
    """Read a bundle. Raises `ConfigError` for a folder that is none."""
    try:
        content = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"is no bundle: {error}", where=str(folder)) from error
    if content.get("schema") != SCHEMA:
        raise ConfigError(f"bundle.schema is {content.get('schema')}, not {SCHEMA}", where=str(folder))
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
    """What a second run of the step did otherwise, a line each; the clock is left out."""
    found = []
    if bundle.rollouts is not None and rollouts is not None:
        then, now = bundle.rollouts, rollouts
        pairs = {
            "sampled tokens": (then.sequences.responses.ids_N, now.sequences.responses.ids_N),
            "response lengths": (then.sequences.responses.lengths_B, now.sequences.responses.lengths_B),
            "log-probabilities": (then.logprob_BT, now.logprob_BT),
        }
        found += [f"{name} differ" for name, (a, b) in pairs.items() if not torch.equal(a, b)]
    then_metrics, now_metrics = bundle.metrics or {}, metrics or {}
    for name in dict.fromkeys([*then_metrics, *now_metrics]):
        a, b = then_metrics.get(name), now_metrics.get(name)
        if not CLOCK.match(name) and a != b and not (a != a and b != b):  # nan is not equal to itself
            found.append(f"{name}: {a} then, {b} now")
    return found
