"""Trackers: where the numbers of a run go beside the files of its folder.

A new tracker is one file with a class that has the methods of `Tracker`, one entry in `TRACKERS`, and its name in
`align.config.TrackerName`, which makes it a value of ``run.trackers``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from align.errors import AlignError
from align.run.tensorboard import TensorBoard
from align.types import Rollouts


class Tracker(Protocol):
    """Receives the numbers of a run. Runs in the driver process only; workers have no tracker.

    Lifecycle: `open`, then for each step `log_evaluation` (if the step evaluates) before `log`, then `close`. A run
    that recovers from lost workers closes its trackers and opens new ones at the step of the checkpoint.

    If a method raises, the run reports the error, drops this tracker and continues: ``metrics.jsonl``,
    ``samples.jsonl`` and ``evaluations.jsonl`` hold the same content. An `AlignError` from `open` ends the run, for
    settings that cannot work.
    """

    def open(self, recipe: Mapping[str, Any], folder: Path, step: int) -> None:
        """Start after ``step``, 0 for a new run: drop what an earlier process logged for later steps.

        ``recipe`` holds the resolved values by dotted key. ``folder`` is the run folder.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """The line of ``metrics.jsonl`` of a step, evaluations included, and its lines of ``samples.jsonl``."""
        ...

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        """A held-out evaluation of the policy after ``step``, as in ``evaluations.jsonl``. Before the first step of a
        round, the starting policy is evaluated."""
        ...

    def close(self) -> None:
        """Write what waits. The run ends, or goes back to a checkpoint."""
        ...


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard}
"""Trackers by their name in ``run.trackers``."""


class Trackers:
    """The trackers of one run, each of which may fail without the others."""

    def __init__(self, names: Sequence[str], report: Callable[[str], None]):
        self._names, self._report = names, report
        self._open: dict[str, Tracker] = {}

    def open(self, recipe: Mapping[str, Any], folder: Path, step: int) -> None:
        """Close the trackers that are open, and open new ones after ``step``."""
        self.close()
        self._open = {name: TRACKERS[name]() for name in self._names}
        self._call(lambda tracker: tracker.open(recipe, folder, step), passes=AlignError)

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        self._call(lambda tracker: tracker.log(step, metrics, samples))

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        self._call(lambda tracker: tracker.log_evaluation(step, metrics, answers))

    def close(self) -> None:
        """Close all trackers."""
        self._call(lambda tracker: tracker.close())
        self._open = {}

    def _call(self, method: Callable[[Tracker], None], passes: type[Exception] | tuple[()] = ()) -> None:
        for name, tracker in list(self._open.items()):
            try:
                method(tracker)
            except passes:
                raise
            except Exception as error:  # a disk or a service that refuses must not end training
                del self._open[name]
                problem = f"{type(error).__name__}: {error}"
                self._report(f"tracker {name} failed ({problem}); nothing more is written there, see metrics.jsonl")


def format_samples(
    step: int, rollouts: Rollouts, score_B: Tensor | None, count: int, decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    """``count`` responses in readable form, spread over the prompts: lines of ``samples.jsonl``."""
    sequences, samples = rollouts.sequences, []
    for i in (k * len(rollouts) // count for k in range(count)):
        sample = {
            "step": step,
            "prompt": decode(sequences.prompts.row(int(sequences.prompt_B[i])).tolist()),
            "response": decode(sequences.responses.row(i).tolist()),
            "finished": bool(rollouts.finished_B[i]),
            "score": None if score_B is None else float(score_B[i]),
        }
        samples.append(sample)
    return samples
