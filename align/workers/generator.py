"""The role that answers conversations with text; see `align.generators`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from align.config import GeneratorConfig, RoleConfig, SamplingConfig
from align.engines import optimizer_state
from align.generators.base import Completion, Request
from align.generators.models import build_generator
from align.roles import Future, Metrics
from align.workers.base import Role, Worker, WorkerGroup, by_rank, worker_method


@dataclass(frozen=True)
class RankCompletions:
    """Answers of one rank, and its counts since the last call."""

    completions: list[Completion]
    metrics: Metrics


class GeneratorWorker(Worker):
    """One rank of a generator: the whole model, a client of the endpoint, or the function."""

    stateless = True

    def _prepare(self) -> None:
        section = self.spec.section
        assert isinstance(section, GeneratorConfig)
        optimizer_state.seed_generators(self.spec.seed)
        self.generator = build_generator(section, self.device, self.spec.seed)

    @worker_method
    def complete(self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool) -> RankCompletions:
        """Answers to this rank's requests."""
        return RankCompletions(self.generator.complete(requests, sampling, margins), self.generator.metrics())


class Generator(Role):
    """The driver's side of `GeneratorWorker`."""

    worker = GeneratorWorker

    def __init__(self, ranks: WorkerGroup, section: RoleConfig, phase: str = "complete"):
        """``phase`` is the name under which its seconds are counted."""
        super().__init__(ranks, section)
        self.phase = phase
        self._counts: Counter[str] = Counter()

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> Future[list[Completion]]:
        rows = [part.tolist() for part in by_rank(len(requests), self.ranks.world_size)]
        arguments = [([requests[i] for i in part], sampling, margins) for part in rows]

        def gather(parts: Sequence[RankCompletions]) -> list[Completion]:
            completions: dict[int, Completion] = {}
            for part, part_rows in zip(parts, rows, strict=True):
                completions |= dict(zip(part_rows, part.completions, strict=True))
                self._counts.update(part.metrics)  # type: ignore[arg-type]
            return [completions[i] for i in range(len(completions))]

        return self.ranks.call(self.phase, GeneratorWorker.complete, arguments, gather)

    def drain(self) -> Metrics:
        counts, self._counts = self._counts, Counter()
        return dict(counts)
