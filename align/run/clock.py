"""Where the seconds of a step went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Span = tuple[float, float]
"""Begin and end, in seconds of `time.time`, which machines of a cluster share as well as their clocks agree."""


@dataclass
class Clock:
    """Seconds of the current step by phase. Phases that run at the same time both count in full."""

    on_phase: Callable[[str], None] = lambda phase: None
    """Told when a phase begins."""
    step: int = 0
    """Number of the step that is under way; 0 before the first."""
    busy: dict[str, float] = field(default_factory=dict)
    """Time that the slowest rank worked, by phase."""
    spans: list[Span] = field(default_factory=list)
    """When ranks worked, whatever they did."""

    def begin(self, phase: str) -> None:
        """A role was asked for something."""
        self.on_phase(phase)

    def record(self, phase: str, spans: Sequence[Span]) -> None:
        """A role answered; its ranks worked in these spans."""
        self.busy[phase] = self.busy.get(phase, 0.0) + max(end - begin for begin, end in spans)
        self.spans += spans

    def drain(self, step_seconds: float) -> dict[str, float]:
        """The numbers of a step that took ``step_seconds``, and a fresh start.

        ``wait`` is the time in which no rank of any role worked: transport, queues, and the driver's own arithmetic.
        """
        worked, reached = 0.0, float("-inf")
        for begin, end in sorted(self.spans):
            worked += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        numbers = {**self.busy, "wait": max(0.0, step_seconds - worked), "step": step_seconds}
        self.busy, self.spans = {}, []
        return numbers
