"""``align plan``, and the last lines of ``align train --dry-run``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from align.config import RecipeConfig
from align.config.load import LoadedConfig, load_recipe
from align.errors import AlignError, ConfigError
from align.plan import remedies, report
from align.plan.hardware import GB, GPUS, Gpu
from align.plan.planning import make_plan
from align.utils.atomic_write import write_atomic


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align plan``: status 0 if every slot fits, 78 if not."""
    loaded = load_recipe(arguments.recipe, arguments.overrides)
    plan = make_plan(on_gpus(loaded), chosen_gpu(arguments.gpu, arguments.gpu_memory))
    fits = report.print_plan(plan, console)
    if arguments.json:
        result = None if fits else remedies.first_that_fits(plan)
        content = report.as_json(plan, result[0] if result else None)
        write_atomic(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0 if fits else ConfigError.exit_status


def chosen_gpu(name: str, memory: float | None) -> Gpu:
    """A GPU by name, with another size of memory in GB where one is given."""
    if memory is not None and memory <= 0:
        raise ConfigError(f"--gpu-memory must be positive. Got {memory:g}")
    return GPUS[name] if memory is None else replace(GPUS[name], memory=memory * GB)


def on_gpus(loaded: LoadedConfig) -> RecipeConfig:
    """The recipe with bfloat16 where ``dtype: auto`` looked at this machine: the planned GPUs have bfloat16 units."""
    config: Any = loaded.config
    for key in loaded.automatic:
        if key.endswith(".dtype"):
            try:
                config = remedies.changed(config, key, "bfloat16")
            except ValueError as error:
                raise ConfigError(f"{key} auto is bfloat16 on GPUs: {error}", where=f"{loaded.recipe}") from error
    return config


def print_tail(loaded: LoadedConfig, console: Console) -> None:
    """The verdict on GPUs of 80 GB, for a dry run."""
    try:
        plan = make_plan(on_gpus(loaded), GPUS["H100"])
    except AlignError as error:
        console.print(f"no plan of memory: {error.message}", highlight=False)
        return
    console.print("memory by arithmetic (align plan has all numbers, and other GPUs):", highlight=False)
    report.print_verdict(plan, console)
