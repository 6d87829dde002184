"""Which checkpoints are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

from align.config import CheckpointConfig


def kept(metrics: Mapping[int, Mapping[str, float]], pinned: Set[int], section: CheckpointConfig) -> set[int]:
    """Steps whose checkpoints stay, of those with these metrics.

    The latest ``keep_latest``, the best ``keep_best`` of all by ``best_by``, the multiples of ``keep_every``, and the
    pinned ones. A step whose metric is missing or not finite is no candidate for the best; of equals the later counts
    as better.
    """
    sign = 1 if section.best_is == "highest" else -1
    values = {step: numbers.get(section.best_by, math.nan) for step, numbers in metrics.items()}
    candidates = [step for step, value in values.items() if math.isfinite(value)]
    best = sorted(candidates, key=lambda step: (sign * values[step], step), reverse=True)
    found = {*sorted(metrics)[-section.keep_latest :], *best[: section.keep_best]}
    if section.keep_every:
        found |= {step for step in metrics if step % section.keep_every == 0}
    return found | (pinned & metrics.keys())
