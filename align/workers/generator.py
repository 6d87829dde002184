"""The role that answers conversations with text; see `align.generators`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.config import GeneratorConfig, ModelConfig, SamplingConfig
from align.engines import optimizer_state
from align.generators import opening
from align.generators.base import Completion, Request
from align.roles import Future, Metrics
from align.workers.base import Ranks, Role, Worker, answered, by_rank


@dataclass(frozen=True)
class Completed:
    """What a rank answers, and what it counted meanwhile."""

    completions: list[Completion]
    metrics: Metrics


class GeneratorWorker(Worker):
    """One rank of a generator: the whole model, a client of the endpoint, or the function."""

    stateless = True

    def _prepare(self) -> None:
        section = self.spec.section
        assert isinstance(section, GeneratorConfig)
        optimizer_state.seed_generators(self.spec.seed)
        self.generator = opening.open_generator(section, self.device, self.spec.seed)

    @answered
    def complete(self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool) -> Completed:
        """Answers to this rank's requests."""
        return Completed(self.generator.complete(requests, sampling, margins), self.generator.metrics())


class Generator(Role):
    """The driver's side of `GeneratorWorker`."""

    worker = GeneratorWorker

    def __init__(self, ranks: Ranks, section: ModelConfig, phase: str = "complete"):
        """``phase`` is the name under which its seconds are counted."""
        super().__init__(ranks, section)
        self.phase = phase
        self._counts: Metrics = {}

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> Future[list[Completion]]:
        """See `align.generators.base.Generator`."""
        index = [part.tolist() for part in by_rank(len(requests), self.ranks.world_size)]
        arguments = [([requests[i] for i in part], sampling, margins) for part in index]
        return self.ranks.call(
            self.phase, GeneratorWorker.complete, arguments, lambda parts: self._gathered(parts, index)
        )

    def _gathered(self, parts: Sequence[Completed], index: Sequence[Sequence[int]]) -> list[Completion]:
        found: dict[int, Completion] = {}
        for part, rows in zip(parts, index, strict=True):
            found |= dict(zip(rows, part.completions, strict=True))
            for name, value in part.metrics.items():
                self._counts[name] = self._counts.get(name, 0.0) + value
        return [found[i] for i in range(len(found))]

    def drain(self) -> Metrics:
        """See `align.roles.Counting`."""
        found, self._counts = self._counts, {}
        return found
