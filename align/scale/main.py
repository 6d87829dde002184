"""``align scale``: drafts, feedback, edits, and the selection among them (HelpSteer3: Wang et al. 2025, arXiv
2503.04378).

The output folder holds ``results.jsonl``, a row for each prompt with all generated texts; ``scaling.json``, the
metrics; ``report.html``, the same with plots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from align.cluster.roles import StartOptions, start_roles
from align.config import DataConfig, GeneratorConfig, RewardConfig, RoleConfig, ScaleConfig, ScalePromptsConfig
from align.data import dataset
from align.data.rows import BadRow, Context, conversation, parse_row, turns
from align.data.sources import read_lines
from align.errors import DataError
from align.eval import reward
from align.eval import store as scoring
from align.generators import models as generators
from align.prechecks import placement
from align.prechecks.roles import with_absolute_paths
from align.scale import pipeline, sweep
from align.scale import report as report
from align.utils.atomic_write import write_atomic

VERSION = 1
RESULTS = "results.jsonl"
ROLES = ("policy", "feedback", "edit", "select", "eval_reward")
READ_AS = ("prompt", "messages", "context")
"""Fields of a row that may hold its conversation."""
HARMLESS = {*ROLES, "prompts", "prompts_at_once", "batch_size", "out", "executor", "placement", "cluster"}
"""Keys that may change when a folder is resumed; roles and prompts are compared by content."""


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align scale``."""
    scale(arguments.loaded.config, console)
    return 0


def scale(section: ScaleConfig, console: Console) -> dict[str, Any]:
    """Answer prompts without results, compute, write and print metrics. Returns the content of ``scaling.json``.

    Raises `AlignError` for prompts, models and a placement that cannot be used, before anything is started.
    """
    models = section.policy, section.feedback, section.edit, section.select, section.eval_reward
    roles: dict[str, RoleConfig] = {name: model for name, model in zip(ROLES, models, strict=True) if model}
    slots = placement.resolve(section.placement, roles)
    prompts = read_prompts(section.prompts)
    path = Path(section.out).expanduser() / RESULTS
    manifest = _manifest(section, roles, prompts)
    with scoring.locked(path) as file:
        scoring.agree([path], manifest, "results")
        store = scoring.Rows(file, path)
        done = {row["id"] for row in store.rows}
        left = [number for number in range(len(prompts)) if number not in done]
        if left:
            tell = partial(console.print, highlight=False)
            configs = {name: with_absolute_paths(role) for name, role in roles.items()}
            logs, options = path.parent / "logs", StartOptions(seed=section.seed, announce=tell)
            with (
                start_roles(configs, section.executor, slots, section.cluster, logs, options) as company,
                scoring.progress(console, "scale", len(prompts) - len(left), len(prompts)) as advance,
            ):
                answer(section, company, {number: prompts[number] for number in left}, store, advance)
        records = sorted(store.rows, key=lambda row: row["id"])
    results = sweep.measure(section, records)
    results = {"version": VERSION, "source": section.prompts.path, **results}
    report.terminal(results, console)
    write_atomic(path.parent / "scaling.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_atomic(path.parent / "report.html", report.page(results))
    console.print(f"written: {path.parent}/{RESULTS}, scaling.json, report.html", highlight=False, soft_wrap=True)
    return results


def answer(
    section: ScaleConfig, company: dict[str, Any], prompts: dict[int, Context], store: scoring.Rows, advance: Any
) -> None:
    """Send the prompts through the roles, at most the recipe's number in flight; write each prompt when it finishes."""
    role_queues = pipeline.role_queues(section, company)
    waiting = iter(prompts.items())

    def begin(count: int) -> None:
        for number, context in islice(waiting, count):
            pipeline.PromptPipeline(section, role_queues, number, context, done).advance()

    def done(record: dict[str, Any]) -> None:
        store.write([record])
        advance(1)
        begin(1)

    begin(section.prompts_at_once)
    pipeline.run_event_loop(role_queues.values())


def read_prompts(section: ScalePromptsConfig) -> list[Context]:
    """The conversations, each once. Raises `DataError` for an invalid source or row."""
    path = Path(section.path).expanduser()
    if path.is_file():
        conversations = _rows(path)
    else:
        data = DataConfig(path=section.path, format=section.format, revision=section.revision)
        rows = dataset.load_validation(data, "prompts")[0] if section.split == "validation" else None
        conversations = (row.context for row in (dataset.load_dataset(data, "prompts").train if rows is None else rows))
    contexts = list(islice(dict.fromkeys(conversations), section.max_prompts))
    if not contexts:
        raise DataError("no prompts are there", where=section.path, remedy="give a file with a row for each prompt")
    return contexts


def _rows(path: Path) -> Iterator[Context]:
    for where, raw in read_lines(path):
        try:
            row = parse_row(raw)
            name = next((name for name in READ_AS if name in row), None)
            if name is None:
                raise BadRow("row", f"has none of {', '.join(READ_AS)}", sorted(row))
            yield conversation(name, turns(name, row[name]))
        except BadRow as error:
            remedy = 'write {"prompt": text}, or {"messages": [{"role": ..., "content": ...}, ...]}'
            raise DataError(str(error), where=where, remedy=remedy) from None


def _manifest(section: ScaleConfig, roles: dict[str, RoleConfig], prompts: list[Context]) -> dict[str, Any]:
    """Everything that results depend on. Raises `AlignError` for a role that cannot be opened."""
    own = {name: value for name, value in asdict(section).items() if name not in HARMLESS}
    own["sweep"] = sorted(section.sweep.feedbacks)  # the other axes reuse the same samples
    read = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {"version": VERSION, **own, "prompts": read}
    for name, role in roles.items():
        if isinstance(role, GeneratorConfig):
            settings |= generators.identity_keys(name, role, section.seed)
        elif isinstance(role, RewardConfig):
            settings |= {f"{name}.kind": role.kind, f"{name}.source": role.source}
            settings[f"{name}, its content"] = reward.identity(role)
    return settings
