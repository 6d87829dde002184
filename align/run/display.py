"""What a user sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
"""Metrics worth a place in a line, in order, with their form."""


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics of one step in one line."""
    return "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)


class Display(Protocol):
    """Something that shows progress."""

    def phase(self, name: str) -> None:
        """A phase of the step has begun."""
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class Silent:
    """Shows nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Plain(Silent):
    """One line for each of about a hundred steps, for logs and pipes."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.every = name, total, max(1, total // 100)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step's numbers and how long the rest will take."""
        if step % self.every and step != self.total:
            return
        left = metrics["seconds/step"] * (self.total - step)
        with suppress(OSError):  # where stdout goes may be full, and the run need not end for that
            print(f"{self.name} {step}/{self.total}  {summary(metrics)}  about {left:.0f} s left", flush=True)


class Live:
    """A progress bar with the current phase and the last numbers."""

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
        """Show what is going on."""
        self.progress.update(self.task, phase=name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step, line=summary(metrics))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.progress.stop()


def make(kind: Literal["auto", "live", "plain", "none"], name: str, total: int) -> Display:
    """The display that a recipe asks for; ``auto`` looks whether there is a terminal."""
    console = Console()
    if kind == "none":
        return Silent()
    if kind == "live" or (kind == "auto" and console.is_terminal):
        return Live(name, total, console)
    return Plain(name, total)
