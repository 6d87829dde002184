"""Start the roles of a command: training, evaluation, scaling or serving, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.cluster.pool import RayCluster
from align.config import (
    ClusterConfig,
    CriticConfig,
    CudaOption,
    GeneratorConfig,
    PolicyConfig,
    PreviousPolicyConfig,
    PriorPolicyConfig,
    ReferenceConfig,
    RewardConfig,
    RoleConfig,
    SamplerConfig,
    TrainedRewardConfig,
)
from align.models.exported_files import Exported
from align.run import Clock
from align.workers import critic, generator, local, policy, reward
from align.workers.announce import Announce, to_stdout
from align.workers.base import Role, WorkerGroup, WorkerSpec

ROLES: dict[type[RoleConfig], type[Role]] = {
    PolicyConfig: policy.Policy,
    SamplerConfig: policy.Sampler,
    CriticConfig: critic.Critic,
    ReferenceConfig: policy.Reference,
    PriorPolicyConfig: policy.PriorPolicy,
    PreviousPolicyConfig: policy.FrozenSampler,
    RewardConfig: reward.Reward,
    TrainedRewardConfig: reward.TrainedReward,
    GeneratorConfig: generator.Generator,
}
"""The role that each config starts; a subclass without a row starts the role of its base class."""


COLLECTIVE_TIMEOUT_S = 600.0
"""Default of ``cluster.phase_timeout_s.collective``."""


@dataclass(frozen=True)
class StartOptions:
    """How roles start. The defaults are those of frozen roles, without a run."""

    seed: int = 0
    total_steps: int = 0
    """Optimizer steps of trained roles, for their learning-rate schedule."""
    skip_non_finite: bool = False
    cuda: tuple[CudaOption, ...] = ()
    exported: Mapping[str, Exported] = field(default_factory=dict)
    """Contents of the exported folder's readme and config for each trained role."""
    clock: Clock = field(default_factory=Clock)
    announce: Announce = to_stdout
    """Gets a line for each role that is being loaded and that is ready."""
    report: Callable[[str], None] | None = None
    """Gets a line for each restart of lost workers; None: ``announce``."""
    max_restarts: int = 2
    """How often lost workers are restarted: the default of ``run.max_restarts``."""
    interrupt: Callable[[], None] = lambda: None
    """Called at least once a second while workers are waited for; what it raises ends the wait."""
    ray_started: Callable[[], None] = lambda: None
    """Called after ``ray.init``, which replaces signal handlers."""


@contextmanager
def start_roles(
    configs: Mapping[str, RoleConfig],
    executor: Literal["ray", "local"],
    slots: Mapping[str, tuple[int, ...]],
    cluster: ClusterConfig,
    logs: Path,
    options: StartOptions,
) -> Iterator[dict[str, Any]]:
    """Roles by name for the time of the context: with a worker process on each of their ``slots``, or with the executor
    ``local`` in this process. ``logs`` is the folder of the workers' logs."""
    classes = {name: _role_class(name, config) for name, config in configs.items()}
    specs = {}
    collective_timeout_s = cluster.phase_timeout_s.get("collective", min(cluster.call_timeout_s, COLLECTIVE_TIMEOUT_S))
    for name, config in configs.items():
        size = len(slots[name]) if executor == "ray" else 1
        shared = (config, options.seed, options.total_steps, cluster.call_timeout_s, options.skip_non_finite)
        shares = executor == "ray" and any(set(slots[name]) & set(slots[other]) for other in configs if other != name)
        specs[name] = [
            WorkerSpec(
                name, rank, size, *shared, options.exported.get(name), collective_timeout_s, shares, options.cuda
            )
            for rank in range(size)
        ]

    def attached(ranks: Mapping[str, WorkerGroup]) -> dict[str, Any]:
        return {name: role_class(ranks[name], configs[name]) for name, role_class in classes.items()}

    if executor == "local":
        yield attached(
            {
                name: local.start_role(role_class.worker, specs[name][0], options.clock, options.announce)
                for name, role_class in classes.items()
            }
        )
        return
    num_slots = 1 + max(slot for name in configs for slot in slots[name])
    report = options.report or options.announce
    with RayCluster(cluster, num_slots, options.interrupt, report, options.max_restarts, options.announce) as ray:
        options.ray_started()
        workers = {name: (role_class.worker, specs[name], slots[name]) for name, role_class in classes.items()}
        yield attached(ray.start_roles(workers, logs.absolute(), options.clock))


def _role_class(name: str, config: RoleConfig) -> type[Role]:
    if name == "eval_reward":
        return reward.EvalReward
    return next(ROLES[base] for base in type(config).__mro__ if base in ROLES)


@contextmanager
def start_reward(
    config: RewardConfig,
    executor: Literal["ray", "local"],
    slots: tuple[int, ...],
    cluster: ClusterConfig,
    logs: Path,
    announce: Announce,
) -> Iterator[reward.Reward]:
    """Start only a reward role, as `start_roles` does."""
    name = "reward"
    with start_roles({name: config}, executor, {name: slots}, cluster, logs, StartOptions(announce=announce)) as roles:
        yield roles[name]
