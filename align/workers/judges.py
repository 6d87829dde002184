"""A reward role by itself: a judge for whoever has responses to be scored and no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from align.run import Clock
from align.sections import Cluster
from align.sections import Reward as RewardSection
from align.workers import local
from align.workers.base import Spec
from align.workers.pool import RayCluster
from align.workers.reward import Reward

ROLE = "reward"
RESTARTS = 2
"""How often lost workers are brought up anew: the default of ``run.max_restarts``."""


@contextmanager
def judge(
    section: RewardSection,
    executor: Literal["ray", "local"],
    slots: tuple[int, ...],
    cluster: Cluster,
    logs: Path,
    report: Callable[[str], None],
) -> Iterator[Reward]:
    """The role, up for the time of the context: in this process, or with a process on each of ``slots``.

    ``logs`` is the folder of the workers' logs, ``report`` is told a line when lost workers are brought up anew.
    """
    seed, clock = 0, Clock()
    size = len(slots) if executor == "ray" else 1
    specs = [Spec(ROLE, rank, size, section, seed, 0, cluster.call_timeout_s) for rank in range(size)]
    if executor == "local":
        yield Reward(local.bring_up(Reward.worker, specs[0], clock), section)
        return
    with RayCluster(cluster, 1 + max(slots), report=report, max_restarts=RESTARTS) as ray:
        ranks = ray.bring_up({ROLE: (Reward.worker, specs, slots)}, logs.absolute(), clock)
        yield Reward(ranks[ROLE], section)
