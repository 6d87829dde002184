"""Numbers of benchmarks against numbers worked out by hand."""

import numpy as np
import pytest

from align.data.chat import Message
from align.eval.policy import metrics
from align.eval.policy.metrics import Resampling, StatisticGroup
from align.eval.policy.questions import Question

PLAIN = Resampling(0, 0.9, 0)
DRAWN = Resampling(100, 0.9, 0)


def items(
    count: int, categories: tuple[str, ...] = ("a",), tasks: tuple[tuple[str, ...], ...] = ((),)
) -> list[Question]:
    return [
        Question(str(n), categories[n % len(categories)], (Message("user", "?"),), tasks=tasks[n % len(tasks)])
        for n in range(count)
    ]


def values(groups: list[StatisticGroup]) -> dict[str, float]:
    return {f"{group.name}/{name}": one.value for group in groups for name, one in group.numbers.items()}


class TestPairs:
    def test_a_strong_verdict_counts_three_times(self):
        """The policy is B in the first game. Won strongly and weakly: 3 + 1 of 4; a tie and a strong loss: 1/2 of 4."""
        requests_of = [("B>>A", "A>B"), ("A=B", "B>>A")]
        found = metrics.pairs(items(2, ("a", "b")), requests_of, (["x"] * 2, ["y"] * 2), PLAIN)
        assert values(found)["overall/win rate"] == pytest.approx(100 * 4.5 / 8)
        assert values(found)["by category/a"] == 100 and values(found)["by category/b"] == pytest.approx(12.5)
        assert [one.count for one in found[1].numbers.values()] == [1, 1]

    def test_turning_the_sides_turns_the_rate(self):
        requests_of = [("B>>A", "A=B"), ("A>B", "B>A"), ("B>A", "A>>B"), ("A=B", "B>A")]
        texts = ["# a\n" * n for n in (1, 2, 3, 5)], ["b" * n for n in (9, 2, 4, 1)]
        turned = [(second, first) for first, second in requests_of]  # the policy's game as A becomes the baseline's
        one = values(metrics.pairs(items(4), requests_of, texts, PLAIN))
        other = values(metrics.pairs(items(4), turned, texts[::-1], PLAIN))
        for name in ("overall/win rate", "overall/win rate, equal style"):
            assert one[name] + other[name] == pytest.approx(100)

    def test_on_constant_data_the_interval_is_a_point(self):
        found = metrics.pairs(items(9), [("B>A", "A>B")] * 9, (["x"] * 9, ["y"] * 9), DRAWN)
        rate = found[0].numbers["win rate"]
        assert rate.value == rate.low == rate.high == 100

    def test_games_of_a_question_are_drawn_together(self):
        """Each question is won once and lost once: whatever is drawn, the rate is a half."""
        found = metrics.pairs(items(20), [("B>A", "B>A")] * 20, (["x"] * 20, ["y"] * 20), DRAWN)
        rate = found[0].numbers["win rate"]
        assert rate.value == rate.low == rate.high == 50

    def test_the_interval_is_that_of_the_mean(self):
        """300 questions, half of them won in both games: from 5 to 95 % is 2 * 1.645 * 50 / sqrt(300) = 9.5 wide."""
        requests_of = [("B>A", "A>B"), ("A>B", "B>A")] * 150
        rate = metrics.pairs(items(300), requests_of, (["x"] * 300, ["y"] * 300), Resampling(2000, 0.9, 1))[0].numbers[
            "win rate"
        ]
        assert rate.low is not None and rate.high is not None
        assert rate.high - rate.low == pytest.approx(9.5, rel=0.08)

    def test_a_fast_rate_is_that_of_a_slow_loop(self):
        rng = np.random.default_rng(0)
        outcome, strength = rng.choice([0, 0.5, 1], (7, 2)), rng.choice([1, 3], (7, 2))
        weight = rng.integers(0, 3, (4, 7)).astype(float)
        for row, rate in zip(weight, metrics.win_rate(outcome, strength, weight), strict=True):
            won = sum(row[q] * strength[q, g] * outcome[q, g] for q in range(7) for g in range(2))
            assert rate == pytest.approx(100 * won / sum(row[q] * strength[q, g] for q in range(7) for g in range(2)))


class TestMarks:
    def test_turns_and_categories(self):
        found = values(metrics.marks(items(3, ("a", "b", "b")), [[10, 8], [6, 4], [1, 1]], PLAIN))
        assert found == {
            "overall/mark": 5,
            "by turn/first turn": pytest.approx(17 / 3),
            "by turn/second turn": pytest.approx(13 / 3),
            "by category/a": 9,
            "by category/b": 3,
        }

    def test_one_turn_and_one_category_are_no_groups(self):
        assert values(metrics.marks(items(2), [[3], [4]], PLAIN)) == {"overall/mark": 3.5}

    def test_wildbench_rescales_and_weighs_tasks(self):
        """Marks 10 and 5 are 100 and 0. Creative (0.5) has the first, Math (1) both: (0.5 * 100 + 1 * 50) / 1.5."""
        tasks = (("Creative Tasks", "Math & Data Analysis"), ("Math & Data Analysis",))
        found = values(metrics.wildbench(items(2, tasks=tasks), [[10], [5]], PLAIN))
        assert found == {
            "overall/WB-Score": 50,
            "overall/WB-Score, tasks weighed": pytest.approx(100 / 1.5),
            "marks/mark": 7.5,
            "by task/Creative Tasks": 100,
            "by task/Math & Data Analysis": 50,
        }
        assert metrics.wb_score(1) == -80


def test_agreement_of_both_orders():
    """Consistent, a tie in both, a favourite place, a tie against a win."""
    requests_of = [("B>>A", "A>B"), ("A=B", "A=B"), ("A>B", "A>B"), ("A=B", "A>B")]
    assert metrics.agreement(requests_of) == {"same winner in both orders": 0.5, "ties": 3 / 8, "won by the first": 0.5}
