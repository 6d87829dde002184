"""Compute benchmark metrics from verdicts.

Pairs (Arena-Hard). Two games a question, with the answers in both orders. A win is 1, a tie 1/2, a loss 0; a strong
verdict (``A>>B``) counts three times:

    win rate = 100 * sum of weight * outcome / sum of weight,  over the games of the questions

Marks. MT-Bench: the mean over all turns. WildBench: WB-Score = 20 * (mean mark - 5), for all questions and for each
task group, and the mean over task groups with the weights of its leaderboard.

Every metric is bootstrapped over questions: a resample contains both games, or both turns, of a question. All metrics
exclude a question if any of its games or turns lacks a readable verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from align.eval import metrics
from align.eval.policy import style
from align.eval.policy.questions import Question
from align.eval.protocols import Numbers

STRONG = 3
"""Weight of a strong verdict (Arena-Hard)."""
OUTCOMES = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
"""Outcome for A, and weight, of each verdict."""

TASK_WEIGHTS = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}
"""Weights of the task groups on the WildBench leaderboard."""

Unit = Literal["percent", "mark", "points", "log odds"]


@dataclass(frozen=True)
class StatisticGroup:
    """Metrics that share a table of the report."""

    name: str
    unit: Unit
    numbers: dict[str, metrics.Interval]


@dataclass(frozen=True)
class Statistic:
    """A metric; its bootstrap samples have the key ``group/name``."""

    group: str
    unit: Unit
    name: str
    count: int
    """Number of questions or marks in the mean."""


@dataclass(frozen=True)
class Resampling:
    """Settings of the bootstrap."""

    resamples: int
    confidence: float
    seed: int


def _groups(
    statistics: Sequence[Statistic],
    numbers: Callable[[np.ndarray], Numbers],
    items: Sequence[Question],
    chance: Resampling,
) -> list[StatisticGroup]:
    """Bootstrap intervals of the requested metrics, by group."""
    ids = [statistic.id for statistic in items]
    intervals = metrics.bootstrap(numbers, ids, chance.resamples, chance.confidence, chance.seed)
    groups: dict[str, StatisticGroup] = {}
    for statistic in statistics:
        value, low, high = intervals[f"{statistic.group}/{statistic.name}"]
        group = groups.setdefault(statistic.group, StatisticGroup(statistic.group, statistic.unit, {}))
        group.numbers[statistic.name] = metrics.Interval(value, statistic.count, low, high)
    return [*groups.values()]


def _members(items: Sequence[Question]) -> dict[str, np.ndarray]:
    """Mask of the questions of each category; empty if all questions share a category."""
    members = {
        name: np.array([item.category == name for item in items]) for name in dict.fromkeys(q.category for q in items)
    }
    return members if len(members) > 1 else {}


def win_rate(outcome_QG: np.ndarray, strength_QG: np.ndarray, weight_RQ: np.ndarray) -> np.ndarray:
    """The win rate above for each row of weights of questions; NaN where all are 0."""
    won_Q, all_Q = (strength_QG * outcome_QG).sum(1), strength_QG.sum(1)
    with np.errstate(invalid="ignore"):
        return 100 * (weight_RQ @ won_Q) / (weight_RQ @ all_Q)


def pairs(
    items: Sequence[Question],
    games: Sequence[tuple[str, str]],
    answers: tuple[Sequence[str], Sequence[str]],
    chance: Resampling,
) -> list[StatisticGroup]:
    """Win rates of the policy, raw and at equal style, overall and by category, and the style coefficients.

    ``games`` holds the verdicts on each question: first with the policy's answer as B, then with it as A. ``answers``
    holds the answers of the policy and of the baseline.
    """
    judged = np.array([[OUTCOMES[first], OUTCOMES[second]] for first, second in games])
    outcome_QG, strength_QG = judged[:, :, 0], judged[:, :, 1]
    outcome_QG[:, 0] = 1 - outcome_QG[:, 0]
    feature_QF = style.scaled(style.differences(*answers))
    sets = {"": np.ones(len(items), dtype=bool), **_members(items)}
    statistics: list[Statistic] = []
    for name, member_Q in sets.items():
        groups = ("by category", "by category, equal style") if name else ("overall", "overall")
        rates = (name, name) if name else ("win rate", "win rate, equal style")
        statistics += [
            Statistic(group, "percent", rate, int(member_Q.sum())) for group, rate in zip(groups, rates, strict=True)
        ]
    statistics += [Statistic("what style does", "log odds", name, len(items)) for name in style.FEATURES]

    def numbers(weight_RQ: np.ndarray) -> Numbers:
        values: Numbers = {}
        for name, member_Q in sets.items():
            plain, equal = (
                (f"by category/{name}", f"by category, equal style/{name}")
                if name
                else ("overall/win rate", "overall/win rate, equal style")
            )
            part_RQ = weight_RQ[:, member_Q]
            values[plain] = win_rate(outcome_QG[member_Q], strength_QG[member_Q], part_RQ)
            fitted_RC = _at_equal_style(feature_QF[member_Q], outcome_QG[member_Q], strength_QG[member_Q], part_RQ)
            values[equal] = np.where(part_RQ.any(1), 100 / (1 + np.exp(-fitted_RC[:, 0])), np.nan)
            if not name:
                effects = zip(style.FEATURES, fitted_RC[:, 1:].T, strict=True)
                values |= {f"what style does/{feature}": effect_R for feature, effect_R in effects}
        return values

    return _groups(statistics, numbers, items, chance)


def _at_equal_style(
    feature_QF: np.ndarray, outcome_QG: np.ndarray, strength_QG: np.ndarray, weight_RQ: np.ndarray
) -> np.ndarray:
    """Apply `style.fit` to both games of each question."""
    return style.fit(
        np.repeat(feature_QF, 2, axis=0), outcome_QG.ravel(), np.repeat(weight_RQ, 2, axis=1) * strength_QG.ravel()
    )


def _mean(mark_Q: np.ndarray, weight_RQ: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (weight_RQ @ mark_Q) / weight_RQ.sum(1)


def marks(items: Sequence[Question], given: Sequence[Sequence[float]], chance: Resampling) -> list[StatisticGroup]:
    """Mean marks over all turns, by turn if there are several, and by category.

    ``given`` holds the marks of each question by turn; all questions have the same number of turns.
    """
    mark_QT = np.array(given, dtype=np.float64)
    mean_Q, members, turns = mark_QT.mean(1), _members(items), ("first turn", "second turn")
    statistics = [Statistic("overall", "mark", "mark", mark_QT.size)]
    statistics += [
        Statistic("by turn", "mark", name, len(items))
        for name in turns[: mark_QT.shape[1] if mark_QT.shape[1] > 1 else 0]
    ]
    statistics += [
        Statistic("by category", "mark", name, int(member_Q.sum()) * mark_QT.shape[1])
        for name, member_Q in members.items()
    ]

    def numbers(weight_RQ: np.ndarray) -> Numbers:
        values = {"overall/mark": _mean(mean_Q, weight_RQ)}
        values |= {f"by turn/{name}": _mean(mark_Q, weight_RQ) for name, mark_Q in zip(turns, mark_QT.T, strict=False)}
        for name, member_Q in members.items():
            values[f"by category/{name}"] = _mean(mean_Q[member_Q], weight_RQ[:, member_Q])
        return values

    return _groups(statistics, numbers, items, chance)


def wb_score(mark: Any) -> Any:
    """WB-Score of a mean mark: 5 maps to 0, 10 to 100."""
    return 20 * (mark - 5)


def wildbench(items: Sequence[Question], given: Sequence[Sequence[float]], chance: Resampling) -> list[StatisticGroup]:
    """WB-Score over all questions, weighted over task groups, and of each task group; and the mean mark.

    A question belongs to the groups of its primary and secondary tags.
    """
    mark_Q = np.array(given, dtype=np.float64)[:, 0]
    members = {name: np.array([name in item.tasks for item in items]) for name in TASK_WEIGHTS}
    members = {name: member_Q for name, member_Q in members.items() if member_Q.any()}
    weight_T = np.array([TASK_WEIGHTS[name] for name in members])
    statistics = [
        Statistic("overall", "points", "WB-Score", len(items)),
        Statistic("overall", "points", "WB-Score, tasks weighed", len(items)),
        Statistic("marks", "mark", "mark", len(items)),
    ]
    statistics += [Statistic("by task", "points", name, int(member_Q.sum())) for name, member_Q in members.items()]

    def numbers(weight_RQ: np.ndarray) -> Numbers:
        values: Numbers = {"marks/mark": _mean(mark_Q, weight_RQ)}
        by_task = {name: wb_score(_mean(mark_Q[m_Q], weight_RQ[:, m_Q])) for name, m_Q in members.items()}
        values["overall/WB-Score"] = wb_score(values["marks/mark"])
        values["overall/WB-Score, tasks weighed"] = weight_T @ np.array([*by_task.values()]) / weight_T.sum()
        return values | {f"by task/{name}": score_R for name, score_R in by_task.items()}

    return _groups(statistics, numbers, items, chance)


def agreement(games: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Consistency of the judge over both orders: fraction of questions with the same winner (or a tie) in both,
    fraction of games that are ties, and fraction of games that the first answer wins."""
    sides = [[OUTCOMES[verdict][0] for verdict in both] for both in games]  # outcome of the first answer
    first = [side for both in sides for side in both]
    return {
        "same winner in both orders": sum(a == 1 - b for a, b in sides) / len(sides),
        "ties": first.count(0.5) / len(first),
        "won by the first": first.count(1.0) / len(first),
    }
