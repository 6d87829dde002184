"""The display of a run, a live line on a terminal and plain lines elsewhere; and the seconds of each phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Span = tuple[float, float]
"""Begin and end in seconds of `time.time`, which the machines of a cluster share as well as their clocks agree."""

SHOWN = {
    "reward": "reward {:.3f}",
    "heldout/greedy/reward": "held-out {:.3f}",
    "kl": "KL {:.3f}",
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "validation/accuracy": "validation {:.3f}",
    "tokens_per_second/generate": "gen {:.0f} tok/s",
    "tokens_per_second/update": "train {:.0f} tok/s",
}
"""Metrics that a line shows, in this order, with their format."""


@dataclass
class Clock:
    """Seconds of the current step by phase. Phases that run at the same time both count in full."""

    on_phase: Callable[[str], None] = lambda phase: None
    """Called when a phase begins."""
    step: int = 0
    """Number of the current step; 0 before the first."""
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds that the slowest rank worked, by phase."""
    spans: list[Span] = field(default_factory=list)
    """When ranks worked, in any phase."""

    def begin(self, phase: str) -> None:
        """A role was called."""
        self.on_phase(phase)

    def record(self, phase: str, spans: Sequence[Span]) -> None:
        """A role answered; its ranks worked in these spans."""
        self.busy[phase] = self.busy.get(phase, 0.0) + max(end - begin for begin, end in spans)
        self.spans += spans

    def drain(self, step_seconds: float) -> dict[str, float]:
        """Seconds by phase of a step that took ``step_seconds``; resets the clock.

        ``wait`` is the time in which no rank of any role worked: transport, queues, and the driver's own arithmetic.
        """
        worked, reached = 0.0, float("-inf")
        for begin, end in sorted(self.spans):  # the length of the union of all spans
            worked += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        numbers = {**self.busy, "wait": max(0.0, step_seconds - worked), "step": step_seconds}
        self.busy, self.spans = {}, []
        return numbers


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics of one step in one line."""
    return "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)


class Display:
    """Shows the progress of a run; this one shows nothing."""

    def phase(self, name: str) -> None:
        """A phase of the step has begun."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def close(self) -> None:
        """The run is over."""


class PlainDisplay(Display):
    """Prints one line for each of about a hundred steps, for logs and pipes."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.every = name, total, max(1, total // 100)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the metrics and an estimate of the remaining time."""
        if step % self.every and step != self.total:
            return
        left = metrics["seconds/step"] * (self.total - step)
        with suppress(OSError):  # stdout may be a full disk or a closed pipe, which must not end training
            print(f"{self.name} {step}/{self.total}  {summary(metrics)}  about {left:.0f} s left", flush=True)


class LiveDisplay(Display):
    """A progress bar with the current phase and the last metrics."""

    def __init__(self, name: str, total: int, console: Console):
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("[cyan]{task.fields[phase]:<9}"),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(name, total=total, phase="starting", line="")
        self.progress.start()

    def phase(self, name: str) -> None:
        self.progress.update(self.task, phase=name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.update(self.task, completed=step, line=summary(metrics))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.progress.stop()


def make_display(kind: Literal["auto", "live", "plain", "none"], name: str, total: int) -> Display:
    """The display for a value of ``run.progress``; ``auto`` is live on a terminal and plain elsewhere."""
    console = Console()
    if kind == "none":
        return Display()
    if kind == "live" or (kind == "auto" and console.is_terminal):
        return LiveDisplay(name, total, console)
    return PlainDisplay(name, total)
