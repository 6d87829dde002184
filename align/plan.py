"""What a dry run prints: what a recipe would start, what was checked, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from align.config import RecipeConfig, RewardConfig, TrainedModelConfig
from align.prechecks import placement
from align.prechecks.roles import cast_sections, check, remote_code


def describe(config: RecipeConfig, console: Console) -> None:
    """Print roles, their slots and how their weights are held. Raises `ConfigError` for an impossible placement."""
    slots, roles = check(config), cast_sections(config)
    table = Table("role", "slots", "processes", "weights", "source", box=None, header_style="bold")
    for name, section in roles.items():
        sharded = section.zero_stage == 3
        training = "trained" if isinstance(section, TrainedModelConfig) else "frozen"
        kind = f"{section.dtype}, {training}, ZeRO {section.zero_stage}"
        judge = section if isinstance(section, RewardConfig) and not section.is_model else None
        table.add_row(
            name,
            ",".join(map(str, slots[name])) if config.executor == "ray" else "-",
            str(len(slots[name])) if config.executor == "ray" else "this one",
            "none" if judge else f"{kind} ({'sharded over its processes' if sharded else 'whole in each process'})",
            judge.source if judge else "random" if section.init else section.path,
        )
    console.print(table)
    for line in remote_code(config):
        console.print(line, highlight=False)
    total = 1 + max(slot for role in slots.values() for slot in role)
    where = f"{total} slots of Ray" if config.executor == "ray" else "this process"
    rounds = f" in each of {config.num_rounds()} rounds" if config.num_rounds() > 1 else ""
    length = f"{config.run.epochs:g} epochs" if config.run.epochs else f"{config.run.steps} steps"
    console.print(f"{length}{rounds} on {where}, into {config.run.dir}", highlight=False)
    if config.executor != "ray":
        return
    gpus = placement.machine_gpus() if config.cluster.address is None else 0
    if line := placement.idle(slots, max(gpus, total)):
        console.print(f"note: {line} ({'GPUs of this machine' if gpus > total else 'slots'})", highlight=False)


def conclude(config: RecipeConfig, counts: Mapping[str, int], notes: Sequence[str], console: Console) -> None:
    """Print what a dry run has checked, and what only a run can tell."""
    for line in notes:
        console.print(f"note: {line}", highlight=False)
    data = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"checked: tokenizers, models and data ({data})", highlight=False)
    elsewhere = [one.http.url for one in vars(config).values() if isinstance(one, RewardConfig) and one.http.url]
    cluster = [config.cluster.address] if config.executor == "ray" and config.cluster.address else []
    left = ["whether the models fit into memory", *(f"whether {name} answers" for name in [*cluster, *elsewhere])]
    console.print(f"not checked: {', '.join(left)}", highlight=False)
