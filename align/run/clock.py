"""Where the seconds of a step went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of the current step by phase. Phases that run at the same time both count in full."""

    on_phase: Callable[[str], None] = lambda phase: None
    """Told when a phase begins."""
    busy: dict[str, float] = field(default_factory=dict)
    """Time that the slowest rank worked, by phase."""
    waited: float = 0.0
    """Time that answers were under way while no rank worked on them: transport, queues, gathering."""

    def begin(self, phase: str) -> None:
        """A role was asked for something."""
        self.on_phase(phase)

    def record(self, phase: str, busy: float, elapsed: float) -> None:
        """A role answered ``elapsed`` seconds after it was asked; its slowest rank worked ``busy`` of them."""
        self.busy[phase] = self.busy.get(phase, 0.0) + busy
        self.waited += max(0.0, elapsed - busy)

    def drain(self) -> dict[str, float]:
        """The numbers of this step, and a fresh start."""
        numbers = {**self.busy, "wait": self.waited}
        self.busy, self.waited = {}, 0.0
        return numbers
