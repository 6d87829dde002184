"""The tracker for TensorBoard: event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes every metric as a scalar; samples and answers are left to the files of the run folder."""

    def __init__(self) -> None:
        self._evaluated: tuple[int, frozenset[str]] = 0, frozenset()
        """Step of the last evaluation, and the names of its scalars."""

    def open(self, recipe: Mapping[str, Any], folder: Path, step: int) -> None:
        """Hide the scalars of steps after ``step``; for a new run, of all steps."""
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else 0)

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write the scalars of a step. Those of its evaluation are there already."""
        evaluated, names = self._evaluated
        self._write(step, {k: v for k, v in metrics.items() if evaluated != step or k not in names})

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write the scalars of an evaluation."""
        self._evaluated = step, frozenset(metrics)
        self._write(step, metrics)

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
