"""Win rates at equal style: where the truth is known, and against a slow descent."""

import numpy as np
import pytest

from align.eval.policy import style


def simulated(count: int, coefficients: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Style differences with a mean of 0.7, and outcomes drawn with these odds."""
    rng = np.random.default_rng(seed)
    feature = rng.normal(0.7, 1.0, (count, len(coefficients) - 1))
    chance = 1 / (1 + np.exp(-(coefficients[0] + feature @ coefficients[1:])))
    return feature, (rng.random(count) < chance).astype(float)


def test_the_coefficients_of_simulated_games_are_found_again():
    """20,000 games: standard errors are near 0.02. Without control the rate is that of the policy's own style."""
    truth = [-0.5, 1.0, -0.3, 0.0, 0.6]
    feature, outcome = simulated(20000, truth)
    (found,) = style.fit(feature, outcome, np.ones((1, 20000)))
    assert found == pytest.approx(truth, abs=0.08)
    assert outcome.mean() > 0.55 and 1 / (1 + np.exp(-found[0])) == pytest.approx(0.378, abs=0.02)


def test_it_is_the_minimum_that_a_slow_descent_finds():
    feature, outcome = simulated(40, [0.2, 1.0, -1.0])
    outcome[::5] = 0.5
    weight = np.where(np.arange(40) % 3, 1.0, 3.0)
    design, slow = np.column_stack([np.ones(40), feature]), np.zeros(3)
    for _ in range(4000):
        chance = 1 / (1 + np.exp(-design @ slow))
        slow -= 0.02 * (design.T @ (weight * (chance - outcome)) + style.RIDGE * slow)
    (fast,) = style.fit(feature, outcome, weight[None])
    assert fast == pytest.approx(slow, abs=1e-8)


def test_each_row_of_weights_is_fitted_by_itself():
    feature, outcome = simulated(30, [0.0, 1.0])
    weight = np.random.default_rng(1).integers(0, 3, (5, 30)).astype(float)
    together = style.fit(feature, outcome, weight)
    for row, found in zip(weight, together, strict=True):
        chosen = np.repeat(np.arange(30), row.astype(int))  # a weight of 2 is a game twice
        (alone,) = style.fit(feature[chosen], outcome[chosen], np.ones((1, len(chosen))))
        assert found == pytest.approx(alone, abs=1e-7)


@pytest.mark.parametrize("feature", [np.zeros((50, 1)), np.linspace(-1, 1, 50)[:, None]])
def test_games_that_can_be_told_apart_give_finite_numbers(feature: np.ndarray):
    outcome = np.ones(50) if not feature.any() else (feature[:, 0] > 0).astype(float)
    (found,) = style.fit(feature, outcome, np.ones((1, 50)))
    assert np.isfinite(found).all()
    chance = 1 / (1 + np.exp(-(found[0] + feature @ found[1:])))
    assert np.abs(chance - outcome).max() < 0.5  # every game on its own side


def test_no_weights_give_an_even_rate():
    assert style.fit(np.ones((3, 2)), np.ones(3), np.zeros((1, 3))).tolist() == [[0, 0, 0]]


def test_marks_of_style_are_counted_outside_code():
    text = "# head\n#no head\n- item\n 2. item\n* item\n**bold** and __bold__\n```\n# comment\n- x **y**\n```\n"
    assert style.counts(text) == (len(text), 1, 3, 2)


def test_differences_by_hand():
    """30 and 10 characters; densities of headings 1/30 and 0, of bold 0 and 1/10."""
    answer, other = "# " + "x" * 28, "**b** 6789"
    found = style.differences([answer, ""], [other, ""])
    assert found[0] == pytest.approx([20 / 40, (1 / 30) / (1 / 30 + 1), 0, -(1 / 10) / (1 / 10 + 1)])
    assert found[1].tolist() == [0, 0, 0, 0]
    assert style.differences([other], [answer]) == pytest.approx(-found[:1])


def test_scaling_keeps_zero_where_it_is():
    scaled = style.scaled(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert scaled.tolist() == [[1, 0], [3, 0]]


def test_games_of_one_style_are_not_controlled():
    """With no difference in style the rate is the plain one, but for the ridge."""
    outcome = np.array([1.0, 1, 1, 0, 0.5] * 40)
    (found,) = style.fit(np.zeros((200, 4)), outcome, np.ones((1, 200)))
    assert 1 / (1 + np.exp(-found[0])) == pytest.approx(0.7, abs=1e-4)
