"""What ``align train --dry-run`` prints: the roles that would start, what was checked, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from align.config import CheckpointRewardConfig, HttpRewardConfig, RecipeConfig, RewardConfig, TrainedModelConfig
from align.prechecks import placement
from align.prechecks.roles import check_roles, remote_code, role_configs


def print_plan(config: RecipeConfig, console: Console) -> None:
    """Print each role with its slots and how it holds its weights. Raises `ConfigError` for an impossible placement."""
    slots, on_ray = check_roles(config), config.executor == "ray"
    table = Table("role", "slots", "processes", "weights", "source", box=None, header_style="bold")
    for name, role in role_configs(config).items():
        use = "trained" if isinstance(role, TrainedModelConfig) else "frozen"
        where = "sharded over its processes" if role.zero_stage == 3 else "whole in each process"
        weights, source = f"{role.dtype}, {use}, ZeRO {role.zero_stage} ({where})", "random" if role.init else role.path
        if isinstance(role, RewardConfig) and not isinstance(role, CheckpointRewardConfig):
            weights, source = "none", role.source
        placed = [",".join(map(str, slots[name])), str(len(slots[name]))] if on_ray else ["-", "this one"]
        table.add_row(name, *placed, weights, source)
    console.print(table)
    for line in remote_code(config):
        console.print(line, highlight=False)
    num_slots = 1 + max(slot for role_slots in slots.values() for slot in role_slots)
    where = f"{num_slots} slots of Ray" if on_ray else "this process"
    rounds = f" in each of {config.num_rounds()} rounds" if config.num_rounds() > 1 else ""
    length = f"{config.run.epochs:g} epochs" if config.run.epochs else f"{config.run.steps} steps"
    console.print(f"{length}{rounds} on {where}, into {config.run.dir}", highlight=False)
    if on_ray:
        gpus = placement.machine_gpus() if config.cluster.address is None else 0
        if line := placement.idle(slots, max(gpus, num_slots)):
            console.print(f"note: {line} ({'GPUs of this machine' if gpus > num_slots else 'slots'})", highlight=False)


def print_checked(config: RecipeConfig, counts: Mapping[str, int], notes: Sequence[str], console: Console) -> None:
    """Print what a dry run has checked, and what only a run can check."""
    for line in notes:
        console.print(f"note: {line}", highlight=False)
    data = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"checked: tokenizers, models and data ({data})", highlight=False)
    servers = [role.url for role in vars(config).values() if isinstance(role, HttpRewardConfig)]
    if config.executor == "ray" and config.cluster.address:
        servers.insert(0, config.cluster.address)
    if servers:
        unchecked = ", ".join(f"whether {server} answers" for server in servers)
        console.print(f"not checked: {unchecked}", highlight=False)
