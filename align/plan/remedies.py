"""Keys that make a recipe fit: tried one by one, then together, each by a new plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align.config import ModelConfig, TrainedModelConfig
from align.errors import AlignError
from align.plan.planning import Plan, make_plan

SMALLEST_BATCH = 1024
"""Tokens below which a micro-batch is not made smaller: it would waste the GPU."""
MAX_CHANGES = 6
"""Most keys that are changed together."""

Change = tuple[str, Any]
"""A dotted key and its value."""


def first_that_fits(plan: Plan) -> tuple[list[Change], Plan] | None:
    """The first change that fits, else the first changes that fit when each is added to those before it; None if none
    do."""
    for change in changes(plan):
        if (changed := _try([change], plan)) and not changed.too_large:
            return [change], changed
    chosen: list[Change] = []
    smallest = plan
    for _ in range(MAX_CHANGES):
        better = [(c, p) for c in changes(smallest) if (p := _try([c], smallest)) and excess(p) < excess(smallest)]
        if not better:
            return None
        change, smallest = min(better, key=lambda item: excess(item[1]))
        chosen = [*(old for old in chosen if old[0] != change[0]), change]
        if not smallest.too_large:
            return chosen, smallest
    return None


def excess(plan: Plan) -> float:
    """Bytes beyond the GPU on all slots together."""
    return sum(len(group.slots) * max(0.0, group.peak[1] - plan.gpu.memory) for group in plan.groups)


def changes(plan: Plan) -> Iterator[Change]:
    """Candidates for the roles of the slots that hold too much, those that cost least time first."""
    names = list(dict.fromkeys(role.name for group in plan.too_large for role in group.roles))
    sections = {name: plan.models[name].section for name in names if not plan.models[name].judge}
    for make in (_micro_batches, _checkpointing, _cache, _sharding, _offload, _more_slots):
        for name, section in sections.items():
            yield from make(name, section, plan)


def _micro_batches(name: str, section: ModelConfig, plan: Plan) -> Iterator[Change]:
    tokens = section.max_tokens_per_micro_batch
    unit = plan.work.prompt_tokens + plan.work.unit * plan.work.response_tokens
    while tokens > max(SMALLEST_BATCH, unit):
        tokens = max(SMALLEST_BATCH, unit, tokens // 2)
        yield f"{name}.max_tokens_per_micro_batch", tokens


def _checkpointing(name: str, section: ModelConfig, plan: Plan) -> Iterator[Change]:
    if isinstance(section, TrainedModelConfig) and not section.gradient_checkpointing:
        yield f"{name}.gradient_checkpointing", True


def _cache(name: str, section: Any, plan: Plan) -> Iterator[Change]:
    rows = getattr(section, "max_num_seqs", 0)
    while rows > 8:
        rows //= 2
        yield f"{name}.max_num_seqs", rows


def _sharding(name: str, section: ModelConfig, plan: Plan) -> Iterator[Change]:
    if plan.models[name].ranks == 1 or name == "sampler":
        return
    stages = (2, 3) if isinstance(section, TrainedModelConfig) else (3,)
    yield from ((f"{name}.zero_stage", stage) for stage in stages if stage > section.zero_stage)


def _offload(name: str, section: Any, plan: Plan) -> Iterator[Change]:
    if isinstance(section, TrainedModelConfig) and not section.offload_optimizer:
        yield f"{name}.offload_optimizer", True


def _more_slots(name: str, section: ModelConfig, plan: Plan) -> Iterator[Change]:
    """Twice and four times the slots, for roles that shard something."""
    slots = plan.slots[name]
    if section.zero_stage == 0 or name == "sampler":
        return
    last = max(slot for role in plan.slots.values() for slot in role)
    for factor in (2, 4):
        added = range(last + 1, last + 1 + (factor - 1) * len(slots))
        yield f"placement.{name}", f"{_ranges(slots)},{_ranges(tuple(added))}"


def _ranges(slots: tuple[int, ...]) -> str:
    consecutive = slots == tuple(range(slots[0], slots[-1] + 1))
    if len(slots) == 1:
        return str(slots[0])
    return f"{slots[0]}-{slots[-1]}" if consecutive else ",".join(map(str, slots))


def _try(wanted_changes: list[Change], plan: Plan) -> Plan | None:
    """The plan with changed keys; None where the recipe refuses them."""
    config: Any = plan.config
    try:
        for key, value in wanted_changes:
            config = changed(config, key, value)
        return make_plan(config, plan.gpu)
    except (ValueError, AlignError):
        return None


def changed(config: Any, key: str, value: Any) -> Any:
    """The config with the value of a dotted key. Raises `ValueError` as its sections do."""
    name, _, rest = key.partition(".")
    if isinstance(config, dict):
        return {**config, name: value}
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})
