"""What a recipe would start: the part of a dry run that needs no cluster."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from align.prepare import cast_sections, check, remote_code
from align.sections import Recipe, Reward, Trained


def describe(config: Recipe, console: Console) -> None:
    """Print roles, their slots and how their weights are held. Raises `ConfigError` for an impossible placement."""
    slots, roles = check(config), cast_sections(config)
    table = Table("role", "slots", "processes", "weights", "source", box=None, header_style="bold")
    for name, section in roles.items():
        sharded = section.zero_stage == 3
        kind = f"{section.dtype}, {'trained' if isinstance(section, Trained) else 'frozen'}, ZeRO {section.zero_stage}"
        judge = section if isinstance(section, Reward) and not section.is_model else None
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
