"""Read stored scores: a third-party file, or the folder of an evaluation.

Three row formats are supported: the outputs that JudgeBench stores (``pair_id``, with ``scores`` of response A and B or
with ``judgments`` of one or two games), the ``items.jsonl`` of an evaluation, and plain ``{"id": ..., "scores":
[...]}``, right responses first. Rows of the first two formats describe their items, so they need no
benchmark data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.rows import BadRow, parse_row, require_fields, text
from align.data.sources import read_lines
from align.errors import DataError
from align.eval import benchmarks
from align.eval.items import Benchmark, Item, from_record
from align.eval.protocols import JUDGEBENCH_CATEGORIES, RM_BENCH_DOMAINS, counter

SHAPES = {"rm-bench": (3, 6), "judgebench": (1, 2), "rewardbench": (1, 2), "heldout": (1, 2)}
"""Numbers of right responses and of all responses of an item, for benchmarks where all items agree."""


@dataclass(frozen=True)
class StoredScores:
    """A benchmark with the scores of all responses of its items."""

    benchmark: Benchmark
    scores: list[list[float]]
    """Scores of each item, in the order of ``benchmark.items``."""
    verdicts: bool = False
    """True if the scores are sums of pairwise decisions: only their order has a meaning."""


def read(file: Path, name: str, benchmark: Benchmark | None) -> StoredScores:
    """The scores in ``file``, for the items of ``benchmark`` or, without it, for the items that the file describes.

    Raises `DataError` for an invalid row, and for duplicate, missing or unknown ids.
    """
    if not file.is_file():
        raise DataError("there is no such file", where=str(file), remedy="give a file of scores, as JSON lines")
    by_id: dict[str, tuple[Item | None, list[float]]] = {}
    twice: Counter[str] = Counter()
    verdicts = False
    for where, raw in read_lines(file):
        try:
            id, item, scores, decided = _line(parse_row(raw), name)
        except BadRow as error:
            raise DataError(str(error), where=where, remedy="see docs/evaluation.md for what a line may be") from None
        twice[id] += id in by_id
        by_id[id], verdicts = (item, scores), verdicts or decided
    where = str(file)
    _refuse("occur twice", [id for id, count in twice.items() if count], by_id, where)
    if benchmark is None:
        items = [item for item, _ in by_id.values() if item is not None]
        if len(items) < len(by_id) or not items:
            remedy = "name the benchmark's own files as well: data.path (--data)"
            problem = f"{len(by_id)} lines with scores, which do not describe their items"
            raise DataError(problem, where=where, remedy=remedy)
        benchmark = Benchmark(name, items, where, benchmarks.gaps(name, items))
    ids = {item.id for item in benchmark.items}
    _refuse(f"are not in {benchmark.source}", [id for id in by_id if id not in ids], by_id, where)
    _refuse("have no scores", [item.id for item in benchmark.items if item.id not in by_id], ids, where)
    return StoredScores(
        benchmark, in_order(benchmark, {id: scores for id, (_, scores) in by_id.items()}, where), verdicts
    )


def in_order(benchmark: Benchmark, scores: Mapping[str, list[float]], where: str) -> list[list[float]]:
    """The scores of every item. Raises `DataError` for a wrong number of scores or a score that is not finite."""
    wrong = [item.id for item in benchmark.items if len(scores[item.id]) != item.num_responses]
    _refuse("have another number of scores than of responses", wrong, scores, where)
    broken = [id for id, values in scores.items() if not all(map(math.isfinite, values))]
    _refuse("have a score that is not a finite number", broken, scores, where)
    return [scores[item.id] for item in benchmark.items]


def _refuse(problem: str, ids: Sequence[str], all_ids: Iterable[str], where: str) -> None:
    if ids:
        count = len(list(all_ids))
        remedy = "scores and items belong together; score the benchmark again where they do not"
        raise DataError(f"{len(ids)} of {count} ids {problem}, the first is {ids[0]!r}", where=where, remedy=remedy)


def _line(row: dict[str, Any], name: str) -> tuple[str, Item | None, list[float], bool]:
    """Id, item (None if the row lacks it), scores with the right responses first, and whether they are decisions."""
    if "pair_id" in row:
        return _judgebench(row, name)
    require_fields(row, ("id", "scores"))
    item = None
    if "num_right" in row:
        item = from_record(row)
        shape = SHAPES.get(name, (item.num_right, item.num_responses))
        domains = {"judgebench": tuple(JUDGEBENCH_CATEGORIES.values()), "rm-bench": RM_BENCH_DOMAINS}
        domain = item.tags.get("domain", "").split("-")[0]
        if (item.num_right, item.num_responses) != shape or domain not in domains.get(name, (domain,)):
            raise BadRow("id", f"is of no item of {name}", item.id)
    return text("id", row["id"]), item, _numbers(row["scores"]), bool(row.get("verdicts", False))


def _judgebench(row: dict[str, Any], name: str) -> tuple[str, Item | None, list[float], bool]:
    if name != "judgebench":
        raise BadRow("pair_id", f"is a field of JudgeBench, not of {name}")
    require_fields(row, ("pair_id", "source", "label"))
    pair_id, source, label = (text(field, row[field]) for field in ("pair_id", "source", "label"))
    if label not in ("A>B", "B>A"):
        raise BadRow("label", "is neither A>B nor B>A", label)
    if "question" in row:
        item = benchmarks.PARSERS[name](row, "")
    else:
        tags = {"domain": benchmarks.category(source), "subset": source, "label": label}
        item = Item(pair_id, pair_id, 1, 2, tags)
    games = row.get("judgments")
    if games is not None and (not isinstance(games, list) or not 1 <= len(games) <= 2):
        raise BadRow("judgments", "are not one or two games", games)
    scores = row.get("scores")
    if scores is None and games and isinstance(games[0], dict) and isinstance(games[0].get("judgment"), dict):
        scores = games[0]["judgment"].get("scores")
    if scores is not None:
        numbers = _numbers(scores)
        if len(numbers) != 2:
            raise BadRow("scores", "are not those of response A and response B", scores)
        return pair_id, item, numbers if label == "A>B" else numbers[::-1], False
    if games is None:
        raise BadRow("scores", "is missing, and judgments too")
    decisions = [game.get("decision") if isinstance(game, dict) else None for game in games]
    return pair_id, item, [float(counter(label, decisions)), 0.0], True


def _numbers(scores: object) -> list[float]:
    if not isinstance(scores, list) or not all(type(value) in (int, float) for value in scores):
        raise BadRow("scores", "is not a list of numbers", scores)
    return [float(value) for value in scores]
