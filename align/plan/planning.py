"""The plan of a recipe: its models, their bytes on slots and hosts, and the seconds of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config import RecipeConfig
from align.plan import gpu, host, steps
from align.plan.hardware import Gpu
from align.plan.sizes import RoleModel, role_model
from align.plan.slots import SlotGroup, slot_groups
from align.plan.workload import Workload, of_recipe
from align.prechecks import placement
from align.prechecks.roles import role_configs


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on GPUs of one kind. Bytes and seconds are estimates."""

    config: RecipeConfig
    gpu: Gpu
    work: Workload
    models: Mapping[str, RoleModel]
    slots: Mapping[str, tuple[int, ...]]
    groups: list[SlotGroup]
    host: host.HostMemory | None
    times: list[steps.PhaseTime]

    @property
    def too_large(self) -> list[SlotGroup]:
        """Slots that hold more than the GPU."""
        return [group for group in self.groups if group.peak[1] > self.gpu.memory]


def make_plan(config: RecipeConfig, kind: Gpu) -> Plan:
    """The plan of a recipe. Raises `ConfigError` for an impossible placement, `ModelError` for unknown dimensions."""
    roles = role_configs(config)
    slots = placement.resolve(config.placement, roles)
    work = of_recipe(config)
    models: dict[str, RoleModel] = {}
    for name, section in roles.items():
        model = role_model(name, section, len(slots[name]))
        if model is not None:
            models[name] = model
    evaluation: Any = getattr(config, "evaluation", None)
    evaluates = bool(evaluation and evaluation.every)
    memory = {name: gpu.role_memory(model, work, "sampler" in models, evaluates) for name, model in models.items()}
    held = {name: slots[name] for name in models}
    nodes = host.node_memory(models, held, config) if models else None
    return Plan(
        config, kind, work, models, slots, slot_groups(memory, held), nodes, steps.step_times(models, work, kind)
    )
