"""A run: its folder, its numbers, its display."""

from align.run.clock import Clock
from align.run.run import Run

__all__ = ["Clock", "Run"]
