"""The printed plan: slots by role and phase, host, disk, seconds, and the verdict."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from align.plan.gpu import KINDS, PHASES
from align.plan.hardware import COPY, DECODE, FORWARD, GB, TRAIN
from align.plan.host import GPUS_PER_NODE, checkpoint_bytes, disk_bytes
from align.plan.planning import Plan
from align.plan.remedies import Change, first_that_fits
from align.plan.slots import SlotGroup
from align.prechecks.placement import ranges

HEADINGS = ("weights", "grads", "optim", "cache", "activ.", "logits", "buffers", "context")


def gigabytes(value: float) -> str:
    """``12.3``; a dash for nothing."""
    return f"{value / GB:.1f}" if value >= 0.05 * GB else ("-" if not value else "0.0")


def print_plan(plan: Plan, console: Console) -> bool:
    """Print the whole plan. Returns whether every slot fits."""
    _print_models(plan, console)
    table = Table("role", "phase", box=None, header_style="bold", pad_edge=False)
    for heading in (*HEADINGS, "sum GB"):
        table.add_column(heading, justify="right")
    for group in plan.groups:
        _add_group(table, group, plan)
    console.print(table)
    _print_host(plan, console)
    _print_times(plan, console)
    return print_verdict(plan, console)


def _print_models(plan: Plan, console: Console) -> None:
    for model in plan.models.values():
        weights = f"{model.weights / 1e9:.2f}e9 weights" if model.weights >= 1e7 else f"{model.weights:,} weights"
        trained = f", {model.trained:,} trained" if 0 < model.trained < model.weights else ""
        line = (
            f"{model.name}: {weights}{trained}, {model.section.dtype}, ZeRO {model.section.zero_stage} on {model.ranks}"
        )
        console.print(f"{line}; {model.origin}", highlight=False)
    for name in plan.slots.keys() - plan.models.keys():
        console.print(f"{name}: no weights here", highlight=False)


def _add_group(table: Table, group: SlotGroup, plan: Plan) -> None:
    table.add_section()
    table.add_row(f"[bold]{ranges(group.slots)}[/]")
    for role in group.roles:
        for phase in PHASES:
            if phase in role.transient:
                held = role.at(phase)
                table.add_row(
                    role.name, phase, *(gigabytes(held.get(kind, 0.0)) for kind in KINDS), gigabytes(sum(held.values()))
                )
    phase, peak = group.peak
    share = f"{peak / plan.gpu.memory:.0%}"
    style = "bold red" if peak > plan.gpu.memory else "bold"
    label = "all roles" if len(group.roles) > 1 else "peak"
    table.add_row(label, phase, *[""] * (len(KINDS) - 1), share, gigabytes(peak), style=style)


def _print_host(plan: Plan, console: Console) -> None:
    host = plan.host
    if host is None:
        return
    stages = ("loading", "training", "saving", "exporting")
    parts = ", ".join(f"{stage} {gigabytes(getattr(host, stage))}" for stage in stages)
    console.print(f"host memory of node {host.node} ({GPUS_PER_NODE} slots a node), GB: {parts}", highlight=False)
    single, kept = checkpoint_bytes(plan.models), disk_bytes(plan.models, plan.config)
    console.print(f"disk, GB: a checkpoint {gigabytes(single)}, all that is kept {gigabytes(kept)}", highlight=False)


def _print_times(plan: Plan, console: Console) -> None:
    table = Table("phase", box=None, header_style="bold", pad_edge=False)
    for heading in ("seconds", "share", "tokens", "tokens/s"):
        table.add_column(heading, justify="right")
    total = sum(time.seconds for time in plan.times)
    for time in plan.times:
        speed = f"{time.tokens / time.seconds:,.0f}" if time.tokens and time.seconds else "-"
        table.add_row(time.name, _seconds(time.seconds), f"{time.seconds / total:.0%}", f"{time.tokens:,.0f}", speed)
    table.add_row("step", _seconds(total), "", "", "", style="bold")
    console.print(table)
    gpu = plan.gpu
    console.print(
        f"Estimates, with every prompt and response at its longest: {gpu.name} {gpu.flops / 1e12:.0f} TFLOP/s and "
        f"{gpu.bandwidth / 1e12:.1f} TB/s ({gpu.source}), of which decoding is assumed to reach {DECODE:.0%}, forward "
        f"passes {FORWARD:.0%}, training {TRAIN:.0%}, links {COPY:.0%}.",
        highlight=False,
    )


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_verdict(plan: Plan, console: Console) -> bool:
    """Print whether every slot fits, and the first keys that make it fit. Returns whether it does."""
    memory = f"{plan.gpu.memory / GB:g} GB"
    if not plan.groups:
        console.print("fits: no role has weights here", highlight=False)
        return True
    if not plan.too_large:
        group = max(plan.groups, key=lambda item: item.peak[1])
        phase, peak = group.peak
        console.print(
            f"[bold]fits[/] {memory}: at most {gigabytes(peak)} GB, {ranges(group.slots)} in {phase}", highlight=False
        )
        return True
    for group in plan.too_large:
        phase, peak = group.peak
        console.print(
            f"[bold red]does not fit[/] {memory}: {ranges(group.slots)} need {gigabytes(peak)} GB in {phase}",
            highlight=False,
        )
    result = first_that_fits(plan)
    if result is None:
        console.print("no change of keys that was tried makes it fit: take more or larger GPUs", highlight=False)
    else:
        text = " ".join(f"{key}={_text(value)}" for key, value in result[0])
        peak = max(group.peak[1] for group in result[1].groups)
        console.print(f"would fit with {text} ({gigabytes(peak)} GB)", highlight=False)
    return False


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_json(plan: Plan, changes: list[Change] | None) -> dict[str, Any]:
    """The plan as plain numbers: bytes and seconds."""
    return {
        "gpu": vars(plan.gpu),
        "models": {
            name: {"weights": model.weights, "trained": model.trained, "ranks": model.ranks, "origin": model.origin}
            for name, model in plan.models.items()
        },
        "slots": [
            {
                "slots": list(group.slots),
                "roles": {role.name: {phase: role.at(phase) for phase in PHASES} for role in group.roles},
                "bytes": {phase: group.at(phase) for phase in PHASES},
            }
            for group in plan.groups
        ],
        "host": vars(plan.host) if plan.host else None,
        "checkpoint_bytes": checkpoint_bytes(plan.models),
        "disk_bytes": disk_bytes(plan.models, plan.config),
        "seconds": {time.name: time.seconds for time in plan.times},
        "fits": not plan.too_large,
        "changes": None if changes is None else dict(changes),
    }
