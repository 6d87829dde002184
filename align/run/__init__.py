"""A run: its folder, its numbers, its display, its checkpoints, and how it stops and goes on."""

from align.run import bundle
from align.run.clock import Clock
from align.run.identity import Identity
from align.run.run import Run
from align.run.stopping import Stopping

__all__ = ["Clock", "Identity", "Run", "Stopping", "bundle"]
