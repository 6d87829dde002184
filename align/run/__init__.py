"""A run: its folder, metrics, display and checkpoints, and how it stops and resumes."""

from align.run import bundle
from align.run.display import Clock
from align.run.identity import Identity
from align.run.run import Run
from align.run.stopping import StopRequests

__all__ = ["Clock", "Identity", "Run", "StopRequests", "bundle"]
