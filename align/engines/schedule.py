"""Learning-rate schedules as functions of the step, so that there is no scheduler state to restore."""

from __future__ import annotations

import math

from align.config import OptimizerConfig


def learning_rate(section: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step ``step`` (1-based).

    Warm-up is linear, ``lr * step / warmup_steps``. Then, with u in [0, 1] the fraction of the remaining steps that is
    done and m = ``min_lr_ratio``: constant ``lr``, linear ``lr (1 - (1 - m) u)``, cosine ``lr (m + (1 - m)(1 + cos(pi
    u)) / 2)``.
    """
    if step < section.warmup_steps:
        return section.lr * step / section.warmup_steps
    done = min(1.0, (step - section.warmup_steps) / max(1, total_steps - section.warmup_steps))
    floor = section.min_lr_ratio
    match section.schedule:
        case "constant":
            return section.lr
        case "linear":
            return section.lr * (1 - (1 - floor) * done)
        case "cosine":
            return section.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
