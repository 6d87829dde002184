"""CUDA graphs of decoding steps: one launch in place of about 50 for each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 256
"""Graphs that are kept; the oldest makes room. All share one pool of memory."""


class StepGraphs:
    """Graphs of a step by its shape, for steps that read and write tensors in place and wait for nothing.

    A shape that comes for the first time runs eagerly, which also warms up its kernels; the second time it is captured
    and replayed. Graphs hold addresses, so other ``places`` drop them.
    """

    def __init__(self, capture: Callable[[Callable[[], None], Any], Any] | None = None):
        """``capture`` records a step without running it, given the graph to share memory with, and returns an object
        with ``replay``. The default is CUDA's."""
        self._capture = capture or _captured
        self._graphs: dict[tuple[int, ...], Any] = {}
        self._places: object = None

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs, self._places = {}, None

    def run(self, shape: tuple[int, ...], places: object, step: Callable[[], None]) -> None:
        """Take one step. ``places`` says where the tensors of the step lie."""
        if self._places != places:
            self.clear()
            self._places = places
        if shape not in self._graphs:
            step()
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[shape] = None
            return
        if self._graphs[shape] is None:
            captured = [graph for graph in self._graphs.values() if graph is not None]
            try:
                self._graphs[shape] = self._capture(step, captured[0] if captured else None)
            except RuntimeError as error:
                warnings.warn(f"decoding without CUDA graphs: {error}", stacklevel=2)
                self._capture = _eager
                self._graphs[shape] = _eager(step, None)
        self._graphs[shape].replay()


class _Eager:
    """Stands for a graph where capture has failed."""

    def __init__(self, step: Callable[[], None]):
        self.replay = step


def _eager(step: Callable[[], None], other: Any) -> Any:
    return _Eager(step)


def _captured(step: Callable[[], None], other: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=other.pool() if isinstance(other, torch.cuda.CUDAGraph) else None):
        step()
    return graph
