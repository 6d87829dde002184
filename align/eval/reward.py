"""``align eval reward``: evaluate a reward model, or stored scores, on a benchmark.

The output folder holds ``items.jsonl``, every item with its scores; ``scores.json``, all metrics with intervals;
``report.html``, the same with plots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console

from align.cluster import roles as cluster_roles
from align.config import BenchmarkDataConfig, CheckpointRewardConfig, RecipeConfig, RewardConfig, RewardEvaluationConfig
from align.config.eval import BenchmarkName
from align.data.chat import Dialogue
from align.errors import ConfigError
from align.eval import benchmarks, metrics, stored_scores
from align.eval import store as scoring
from align.eval.items import Benchmark
from align.eval.protocols import PROTOCOLS, Numbers, rewardbench_with_prior_sets
from align.eval.stored_scores import StoredScores
from align.prechecks import placement
from align.prechecks.roles import with_absolute_paths
from align.report import evaluation as report
from align.rewards import scorers
from align.utils.atomic_write import write_atomic

VERSION = 1
DEFAULT_OUT = "runs/evaluation"
HARMLESS = re.compile(
    "path|paths|revision|attention|zero_stage|offload_parameters|max_tokens_per_micro_batch|failed|trust_remote_code|"
    "token_env|timeout_s|retries|backoff_s|max_backoff_s|max_concurrency|batch_size|cache_size"
)
"""Fields of ``reward`` that do not change scores; weights, code and templates are compared by content."""


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align eval reward``."""
    section: RewardEvaluationConfig = arguments.loaded.config
    evaluate(section, _read(section), console)
    return 0


def _read(section: RewardEvaluationConfig) -> Benchmark | None:
    """The items; None if the file of scores must describe them."""
    if section.scores and not section.data.path:
        return None
    return benchmarks.load(section.benchmark, section.data)


def evaluate(section: RewardEvaluationConfig, benchmark: Benchmark | None, console: Console) -> dict[str, Any]:
    """Score items without scores, compute, write and print metrics. Returns the content of ``scores.json``."""
    if section.scores:
        file = Path(section.scores).expanduser()
        scored, judge = stored_scores.read(file, section.benchmark, benchmark), file.name
        model = hashlib.sha256(file.read_bytes()).hexdigest()
        folder = Path(section.out).expanduser() if section.out else None
    else:
        assert benchmark is not None  # `_read` leaves it out for scores alone
        assert section.reward is not None
        judge, model = section.reward.source, identity(section.reward)
        default = f"{DEFAULT_OUT}/{section.benchmark}-{model[:8]}"
        folder = Path(section.out or default).expanduser()
        manifest = _manifest(benchmark, model)
        with scoring.opened(folder, manifest) as store:
            if scoring.waiting(benchmark, store):
                _score(section, benchmark, store, console)
            scored = StoredScores(benchmark, stored_scores.in_order(benchmark, store.scores, str(folder)))
    results = measure(section, scored, judge)
    report.terminal(results, console)
    if folder is not None:
        if section.scores:
            _keep(folder, scored, _manifest(scored.benchmark, model))
        write_atomic(folder / "scores.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_atomic(folder / "report.html", report.page(results))
        console.print(f"written: {folder}/scores.json, items.jsonl, report.html", highlight=False, soft_wrap=True)
    return results


def _manifest(benchmark: Benchmark, model: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "benchmark": benchmark.name,
        "items": benchmark.fingerprint,
        "model": model,
    }


def identity(reward: RewardConfig) -> str:
    """sha256 over everything that scores depend on: weights, head, templates. Raises `AlignError`, before
    anything starts, for a reward that cannot be built."""
    text_input = scorers.scorer_class(reward).check(reward, "reward", None)
    settings = {name: value for name, value in asdict(reward).items() if not HARMLESS.fullmatch(name)}
    parts: list[Any] = [scorers.fingerprint(reward, 0), text_input and text_input.renderers, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _score(section: RewardEvaluationConfig, benchmark: Benchmark, store: scoring.Store, console: Console) -> None:
    slots = placement.resolve(section.placement, ["reward"])["reward"]
    num_ranks = len(slots) if section.executor == "ray" else 1
    tell = partial(console.print, highlight=False)
    logs = store.path.parent / "logs"
    assert section.reward is not None
    reward = with_absolute_paths(section.reward)
    assert isinstance(reward, RewardConfig)
    if not reward.remote:  # a service that is down stops at once; what has no score alone is left for another call
        reward = replace(reward, failed="drop")
    with cluster_roles.start_reward(reward, section.executor, slots, section.cluster, logs, tell) as role:

        def score(dialogues: Sequence[Dialogue], groups: Sequence[int]) -> list[float]:
            return role.score_dialogues(dialogues, groups).result().tolist()

        scoring.complete(benchmark, store, score, num_ranks * scoring.RESPONSES_AT_ONCE, console)


def _keep(folder: Path, scored: StoredScores, manifest: dict[str, Any]) -> None:
    with scoring.opened(folder, manifest) as store:
        named = dict(zip((item.id for item in scored.benchmark.items), scored.scores, strict=True))
        left = scoring.waiting(scored.benchmark, store)
        store.add([(item, named[item.id]) for item in left], scored.verdicts)


def measure(section: RewardEvaluationConfig, scored: StoredScores, judge: str) -> dict[str, Any]:
    """All metrics of a benchmark whose items have scores."""
    benchmark, items = scored.benchmark, scored.benchmark.items
    protocol = rewardbench_with_prior_sets if section.prior_sets else PROTOCOLS[section.benchmark]
    chance = section.resamples, section.confidence, section.seed
    prompts = [item.prompt for item in items]
    numbers = metrics.bootstrap(partial(protocol, items, scored.scores), prompts, *chance)
    pairs = metrics.pairs(items, scored.scores)
    by_kind = metrics.accuracies(items, pairs, *chance) if len(pairs.item_P) else {}
    scaled = len(pairs.item_P) > 0 and not scored.verdicts
    return {
        "version": VERSION,
        "benchmark": benchmark.name,
        "judge": judge,
        "source": benchmark.source,
        "fingerprint": benchmark.fingerprint,
        "sizes": metrics.sizes(items),
        "notes": benchmark.notes,
        "bootstrap": dict(zip(("resamples", "confidence", "seed"), chance, strict=True)),
        "numbers": _plain(numbers),
        "slices": {
            kind: {name: asdict(interval) for name, interval in named.items()} for kind, named in by_kind.items()
        },
        "calibration": metrics.calibration(pairs) if scaled else None,
        "margins": metrics.margins(pairs) if scaled else None,
        "comparison": _compared(section, scored, protocol, chance) if section.compare else None,
    }


def _plain(numbers: dict[str, tuple[float, float | None, float | None]]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": value, "low": low, "high": high} for name, (value, low, high) in numbers.items()}


def _compared(
    section: RewardEvaluationConfig, scored: StoredScores, protocol: Any, chance: tuple[int, float, int]
) -> dict[str, Any]:
    """Differences from another model's metrics, both on the same resamples."""
    items, file = scored.benchmark.items, Path(section.compare).expanduser()
    other = stored_scores.read(file / scoring.ITEMS if file.is_dir() else file, section.benchmark, scored.benchmark)

    def difference(weight_RI: np.ndarray) -> Numbers:
        here, there = (protocol(items, scores, weight_RI) for scores in (scored.scores, other.scores))
        return {name: here[name] - there[name] for name in here}

    numbers = metrics.bootstrap(difference, [item.prompt for item in items], *chance)
    return {"with": str(file), "numbers": _plain(numbers)}


def planned(recipe: RecipeConfig) -> list[Callable[[Console], dict[str, Any]]]:
    """The evaluations after a training run. Reads their items now, so that missing data fails before the run starts."""
    evaluations: list[Callable[[Console], dict[str, Any]]] = []
    for name, path in recipe.evaluations().items():
        if name not in get_args(BenchmarkName):
            remedy = f"known: {', '.join(get_args(BenchmarkName))}"
            raise ConfigError(f"benchmarks: {name!r} is no benchmark", remedy=remedy)
        section = _after(recipe, name, path)
        own = name == "heldout" and not path  # what the recipe itself holds out, by all keys of its data
        data = replace(recipe.data, max_rows=None)
        items = benchmarks.held_out(data) if own else benchmarks.load(name, section.data)
        evaluations.append(partial(evaluate, section, items))
    return evaluations


def _after(recipe: Any, name: Any, path: str) -> RewardEvaluationConfig:
    run, trained, data = Path(recipe.run.dir), recipe.reward, recipe.data
    rows = BenchmarkDataConfig(path, bad_rows=data.bad_rows)
    if name == "heldout":
        own: dict[str, Any] = {key: getattr(data, key) for key in ("revision", "format", "domains", "max_spread")}
        rows = replace(rows, path=path or data.path or ", ".join(data.sources), **own)
    reward = CheckpointRewardConfig(
        path=str(run / "final"),
        dtype=trained.dtype,
        attention=trained.attention,
        zero_stage=3 if trained.zero_stage == 3 else 0,
        max_tokens_per_micro_batch=trained.max_tokens_per_micro_batch,
    )
    slots = {"reward": recipe.placement["reward"]} if "reward" in recipe.placement else {}
    return RewardEvaluationConfig(
        benchmark=name,
        data=rows,
        reward=reward,
        out=str(run / "evaluation" / name),
        executor=recipe.executor,
        placement=slots,
        cluster=recipe.cluster,
    )
