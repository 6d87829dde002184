"""Frozen roles by themselves: for whoever has something to be judged or answered, and no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from align.cluster.pool import RayCluster
from align.config import ClusterConfig, GeneratorConfig, ModelConfig, RewardConfig
from align.run import Clock
from align.workers import local
from align.workers.base import Role, Spec
from align.workers.generator import Generator
from align.workers.reward import Reward

ROLE = "reward"
RESTARTS = 2
"""How often lost workers are brought up anew: the default of ``run.max_restarts``."""


def _side(section: ModelConfig) -> type[Role]:
    return Generator if isinstance(section, GeneratorConfig) else Reward


@contextmanager
def company(
    sections: Mapping[str, ModelConfig],
    executor: Literal["ray", "local"],
    slots: Mapping[str, tuple[int, ...]],
    cluster: ClusterConfig,
    logs: Path,
    report: Callable[[str], None],
    *,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Generators and reward models by name, up for the time of the context: in this process, or with a process on each
    of their ``slots``.

    ``logs`` is the folder of the workers' logs, ``report`` gets a line when a role is loaded, when it is ready, and
    when lost workers are brought up again.
    """
    clock, sides = Clock(), {name: _side(section) for name, section in sections.items()}
    sizes = {name: len(slots[name]) if executor == "ray" else 1 for name in sections}
    specs = {
        name: [Spec(name, rank, sizes[name], section, seed, 0, cluster.call_timeout_s) for rank in range(sizes[name])]
        for name, section in sections.items()
    }
    if executor == "local":
        yield {
            name: sides[name](local.bring_up(sides[name].worker, specs[name][0], clock, report), sections[name])
            for name in specs
        }
        return
    count = 1 + max(slot for name in sections for slot in slots[name])
    with RayCluster(cluster, count, report=report, max_restarts=RESTARTS, announce=report) as ray:
        wanted = {name: (sides[name].worker, specs[name], slots[name]) for name in specs}
        ranks = ray.bring_up(wanted, logs.absolute(), clock)
        yield {name: sides[name](ranks[name], sections[name]) for name in specs}


@contextmanager
def judge(
    section: RewardConfig,
    executor: Literal["ray", "local"],
    slots: tuple[int, ...],
    cluster: ClusterConfig,
    logs: Path,
    report: Callable[[str], None],
) -> Iterator[Reward]:
    """The reward role alone; see `company`."""
    with company({ROLE: section}, executor, {ROLE: slots}, cluster, logs, report) as found:
        yield found[ROLE]
