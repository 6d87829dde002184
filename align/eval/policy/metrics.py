"""From verdicts to the numbers of a benchmark.

Pairs (Arena-Hard). Two games a question, with the answers in both orders. A win is 1, a tie 1/2, a loss 0; a strong
verdict (``A>>B``) counts three times:

    win rate = 100 * sum of weight * outcome / sum of weight,  over the games of the questions

Marks. MT-Bench: the mean over all turns. WildBench: WB-Score = 20 * (mean mark - 5), that of a group of tasks in the
same way over its questions, and the mean over groups weighed as on its leaderboard.

Every number is bootstrapped over questions: both games, or both turns, of a question are drawn together. A question
without a readable verdict in one of its games or turns has no part in any number.
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
"""Outcome for A and weight of each verdict."""

TASK_WEIGHTS = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}
"""Weights of WildBench's groups of tasks on its leaderboard."""

Unit = Literal["percent", "mark", "points", "log odds"]


@dataclass(frozen=True)
class StatisticGroup:
    """Numbers of one kind: a table of the report."""

    name: str
    unit: Unit
    numbers: dict[str, metrics.Interval]


@dataclass(frozen=True)
class Statistic:
    """A number that is bootstrapped under ``group/name``."""

    group: str
    unit: Unit
    name: str
    count: int
    """Questions or marks that it is a mean of."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn."""

    resamples: int
    confidence: float
    seed: int


def _groups(
    statistics: Sequence[Statistic],
    numbers: Callable[[np.ndarray], Numbers],
    items: Sequence[Question],
    chance: Resampling,
) -> list[StatisticGroup]:
    """Groups of intervals of the numbers that are wanted."""
    ids = [statistic.id for statistic in items]
    intervals = metrics.bootstrap(numbers, ids, chance.resamples, chance.confidence, chance.seed)
    groups: dict[str, StatisticGroup] = {}
    for statistic in statistics:
        value, low, high = intervals[f"{statistic.group}/{statistic.name}"]
        group = groups.setdefault(statistic.group, StatisticGroup(statistic.group, statistic.unit, {}))
        group.numbers[statistic.name] = metrics.Interval(value, statistic.count, low, high)
    return [*groups.values()]


def _members(items: Sequence[Question]) -> dict[str, np.ndarray]:
    """Which questions belong to each category; none where there is only one."""
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
    """Win rates of the policy, as they are and at equal style, over all questions and by category; and what style does.

    ``games`` are the verdicts on each question: the first with the policy's answer as B, the second with it as A.
    ``answers`` are those of the policy and of the baseline.
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
    """`style.fit` over both games of each question."""
    return style.fit(
        np.repeat(feature_QF, 2, axis=0), outcome_QG.ravel(), np.repeat(weight_RQ, 2, axis=1) * strength_QG.ravel()
    )


def _mean(mark_Q: np.ndarray, weight_RQ: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (weight_RQ @ mark_Q) / weight_RQ.sum(1)


def marks(items: Sequence[Question], given: Sequence[Sequence[float]], chance: Resampling) -> list[StatisticGroup]:
    """Mean marks over all turns, by turn where there are several, and by category.

    ``given`` are the marks of each question by turn; all questions have as many turns.
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
    """WildBench's score of a mean mark: 5 is 0, 10 is 100."""
    return 20 * (mark - 5)


def wildbench(items: Sequence[Question], given: Sequence[Sequence[float]], chance: Resampling) -> list[StatisticGroup]:
    """WB-Score over all questions, over groups of tasks by their weights, and of each group; and the mean mark.

    A question belongs to the groups of its primary tag and of its secondary ones.
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
    """What the two orders say of the judge: parts of questions in which both name the same winner or both a tie, and of
    all games those that are ties, and those won by the answer that stands first."""
    sides = [[OUTCOMES[verdict][0] for verdict in both] for both in games]  # of the answer that stands first
    first = [side for both in sides for side in both]
    return {
        "same winner in both orders": sum(a == 1 - b for a, b in sides) / len(sides),
        "ties": first.count(0.5) / len(first),
        "won by the first": first.count(1.0) / len(first),
    }
