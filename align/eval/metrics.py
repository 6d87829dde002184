"""Metrics common to all reward benchmarks, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from align.eval.items import Item
from align.eval.protocols import Numbers
from align.ops import losses

LENGTHS = {
    "right one under half as long": (0.0, 0.5),
    "right one shorter": (0.5, 0.9),
    "alike (0.9 to 1.1)": (0.9, 1.1),
    "right one longer": (1.1, 2.0),
    "right one at least twice as long": (2.0, np.inf),
}
"""Ratio of characters, right response to wrong response: lower bound (inclusive), upper bound (exclusive)."""
MARGIN_BINS = 24
"""Approximate number of histogram bins; zero is a bin edge."""
MARGIN_TAIL = 0.01
"""Fraction of the margins at each end that falls into the outermost bins."""
MOST_WEIGHTS = 1 << 23
"""Maximum number of weights in memory: 64 MiB."""


@dataclass(frozen=True)
class Interval:
    """A metric, the number of items or pairs in its mean, and its percentile interval; None without resamples."""

    value: float
    count: int
    low: float | None
    high: float | None


def bootstrap(
    numbers: Callable[[np.ndarray], Numbers], prompts: Sequence[str], resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float | None, float | None]]:
    """Value and percentile interval of every metric (cluster bootstrap, Efron 1979).

    Each resample draws as many prompts as there are, with replacement; the weight of an item is the number of draws of
    its prompt. ``numbers`` maps weights (R, I) to metrics. The interval of a metric excludes resamples without items of
    that metric.
    """
    values = {name: float(intervals[0]) for name, intervals in numbers(np.ones((1, len(prompts)))).items()}
    if not resamples:
        return {name: (value, None, None) for name, value in values.items()}
    unique, cluster_I = np.unique(np.asarray(prompts), return_inverse=True)
    rng, drawn = np.random.default_rng(seed), []
    at_once = max(1, MOST_WEIGHTS // len(prompts))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        count_RC = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=rows)
        drawn.append(numbers(count_RC[:, cluster_I].astype(np.float64)))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name, value in values.items():
        sample = np.concatenate([part[name] for part in drawn])
        sample = sample[np.isfinite(sample)]
        low, high = map(float, np.quantile(sample, tails)) if len(sample) else (None, None)
        intervals[name] = (value, low, high)
    return intervals


@dataclass(frozen=True)
class ScorePairs:
    """Pairs of a right and a wrong response: pair p belongs to item ``item_P[p]``."""

    item_P: np.ndarray
    difference_P: np.ndarray
    """Score of the right response minus score of the wrong response."""
    ratio_P: np.ndarray
    """Ratio of characters, right response to wrong response; NaN if lengths are unknown."""


def pairs(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> ScorePairs:
    """Pair every right response of an item with every wrong response. Excludes the Ties items of RewardBench 2, whose
    score needs more than an order."""
    rows = []
    for index, (item, score) in enumerate(zip(items, scores, strict=True)):
        if item.tags.get("subset") == "Ties":
            continue
        for good, bad in product(range(item.num_right), range(item.num_right, item.num_responses)):
            ratio = max(1, item.lengths[good]) / max(1, item.lengths[bad]) if item.lengths else np.nan
            rows.append((index, score[good] - score[bad], ratio))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return ScorePairs(columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])


def slices(items: Sequence[Item], pairs: ScorePairs) -> dict[str, dict[str, np.ndarray]]:
    """Mask of the pairs of each slice, by kind and name; omits kinds whose slices all hold every pair."""
    by_kind: dict[str, dict[str, np.ndarray]] = {}
    strength_P = np.array([item.strength for item in items])[pairs.item_P]
    by_kind["strength"] = {str(s): strength_P == s for s in np.unique(strength_P[strength_P > 0])}
    for kind in ("domain", "subset", "language"):
        tag_P = np.array([item.tags.get(kind, "") for item in items])[pairs.item_P]
        by_kind[kind] = {str(name): tag_P == name for name in np.unique(tag_P[tag_P != ""])}
    by_length = {name: (pairs.ratio_P >= low) & (pairs.ratio_P < high) for name, (low, high) in LENGTHS.items()}
    by_kind["length"] = {name: member_P for name, member_P in by_length.items() if member_P.any()}
    return {kind: members for kind, members in by_kind.items() if not all(map(np.all, members.values()))}


def accuracies(
    items: Sequence[Item], pairs: ScorePairs, resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, Interval]]:
    """Fraction of the pairs of each slice whose right response has the higher score; every pair counts once."""
    by_kind, right_P = slices(items, pairs), pairs.difference_P > 0
    named = [(kind, name, member) for kind, members in by_kind.items() for name, member in members.items()]
    per_item = partial(np.bincount, minlength=len(items))
    right_IS = [per_item(pairs.item_P[member_P & right_P]) for _, _, member_P in named]
    total_IS = [per_item(pairs.item_P[member_P]) for _, _, member_P in named]

    def numbers(weight_RI: np.ndarray) -> Numbers:
        with np.errstate(invalid="ignore"):
            accuracy_RS = (weight_RI @ np.transpose(right_IS)) / (weight_RI @ np.transpose(total_IS))
        return {f"{kind}/{name}": accuracy_RS[:, s] for s, (kind, name, _) in enumerate(named)}

    measured = bootstrap(numbers, [item.prompt for item in items], resamples, confidence, seed) if named else {}
    results: dict[str, dict[str, Interval]] = {kind: {} for kind in by_kind}
    for kind, name, member_P in named:
        value, low, high = measured[f"{kind}/{name}"]
        results[kind][name] = Interval(value, int(member_P.sum()), low, high)
    return results


def calibration(pairs: ScorePairs) -> dict[str, Any]:
    """Expected calibration error (`align.ops.losses`), and the bins of the reliability diagram."""
    difference_P = torch.from_numpy(pairs.difference_P)
    edges = np.linspace(0.5, 1.0, losses.NUM_BINS + 1).tolist()
    bins = [
        {"from": low, "to": high, "count": int(count), "confidence": total / count, "accuracy": right / count}
        for low, high, (count, total, right) in zip(
            edges, edges[1:], losses.reliability(difference_P).tolist(), strict=False
        )
        if count
    ]
    return {"expected_calibration_error": losses.expected_calibration_error(difference_P), "bins": bins}


def margins(pairs: ScorePairs) -> dict[str, Any]:
    """Mean, median and histogram of right minus wrong score; the outermost bins include all margins beyond them. Ties
    are in the bin above 0."""
    low, high = np.quantile(pairs.difference_P, [MARGIN_TAIL, 1 - MARGIN_TAIL])
    width = (max(high, 0.0) - min(low, 0.0)) / MARGIN_BINS or 1.0
    edges = width * np.arange(np.floor(min(low, 0.0) / width), np.ceil(max(high, 0.0) / width) + 1)  # 0 is an edge
    edges = edges if len(edges) > 1 else np.array([0.0, 1.0])
    counts, _ = np.histogram(pairs.difference_P.clip(edges[0], edges[-1]), edges)
    return {
        "mean": float(pairs.difference_P.mean()),
        "median": float(np.median(pairs.difference_P)),
        "ties": int((pairs.difference_P == 0).sum()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def sizes(items: Sequence[Item]) -> dict[str, int]:
    """Numbers of items, prompts and responses."""
    return {
        "items": len(items),
        "prompts": len({item.prompt for item in items}),
        "responses": sum(item.num_responses for item in items),
    }
