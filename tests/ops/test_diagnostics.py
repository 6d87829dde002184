"""Signs of reward hacking: worked by hand, against loops, and against published intervals."""

from __future__ import annotations

import math
import random

import pytest
import torch

from align.ops import diagnostics
from align.types import Packed

NAN, INF = math.nan, math.inf
Z = 1.959963984540054
ROWS = Packed.from_lists([[1, 2, 1, 2], [1, 2], [], [3]])


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def outcomes(wins: int, ties: int, losses: int) -> diagnostics.WinRate:
    own = torch.tensor([1.0] * wins + [0.0] * ties + [-1.0] * losses)
    return diagnostics.win_rate(own, torch.zeros_like(own))


def wilson(p: float, n: int) -> tuple[float, float]:
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return (centre - half) / (1 + Z**2 / n), (centre + half) / (1 + Z**2 / n)


def squared_score(wins: int, ties: int, losses: int, delta: float) -> float:
    """(W - L - n delta)^2 / Var with P(loss) found by searching for the greatest likelihood given delta."""

    def loglik(loss: float) -> float:
        cells = ((wins, loss + delta), (losses, loss), (ties, 1 - 2 * loss - delta))
        return sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if loglik(a) < loglik(b) else (low, b)
    n = wins + ties + losses
    return (wins - losses - n * delta) ** 2 / (n * (low + low + delta - delta**2))


# correlation


def test_correlation_by_hand():
    # Deviations -1.5, -0.5, 0.5, 1.5 and -1.5, 0.5, -0.5, 1.5: products sum to 4, squares to 5 and 5.
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert diagnostics.correlation(x, y) == pytest.approx(0.8, abs=1e-15)
    assert diagnostics.correlation(x, -3 * y) == pytest.approx(-0.8, abs=1e-15)
    # float32 holds 2^20 + x exactly but not its square
    assert diagnostics.correlation(x + 2**20, y.double()) == pytest.approx(0.8, abs=1e-15)


def test_correlation_leaves_out_pairs_that_are_not_finite():
    x = torch.tensor([NAN, 1.0, 2.0, 50.0, 3.0, 4.0, INF])
    y = torch.tensor([9.0, 1.0, 3.0, -INF, 2.0, 4.0, NAN])
    assert diagnostics.correlation(x, y) == pytest.approx(0.8, abs=1e-15)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (f64(), f64()),
        (f64(1), f64(2)),
        (f64(1, NAN, 3), f64(2, 2, NAN)),
        (f64(0.1, 0.1, 0.1), f64(1, 2, 3)),  # the mean is not 0.1: the variance is not 0
        (f64(1, 2, 3), f64(0.1, 0.1, 0.1)),
    ],
)
def test_correlation_without_spread_is_0(x: torch.Tensor, y: torch.Tensor):
    assert diagnostics.correlation(x, y) == 0.0


def test_correlation_does_not_exceed_1():
    torch.manual_seed(0)
    for _ in range(200):
        x = torch.randn(7)
        assert diagnostics.correlation(x, x * 3) == pytest.approx(1, abs=1e-6)
        assert diagnostics.correlation(x, -x) >= -1 and diagnostics.correlation(x, x) <= 1


# n-grams


@pytest.mark.parametrize(
    ("n", "distinct", "repeated"),
    [
        (1, 3 / 7, 1 / 6),  # 1, 2, 3 of 7 tokens; (2/4 + 0 + 0) / 3, the empty response left out
        (2, 2 / 4, 1 / 6),  # 12, 21 of 12, 21, 12, 12; (1/3 + 0) / 2
        (3, 1.0, 0.0),  # 121, 212
        (5, 0.0, 0.0),  # none
        (8, 0.0, 0.0),  # more than all tokens together
    ],
)
def test_ngrams_by_hand(n: int, distinct: float, repeated: float):
    assert diagnostics.distinct(ROWS, n) == pytest.approx(distinct, abs=1e-15)
    assert diagnostics.repeated(ROWS, n) == pytest.approx(repeated, abs=1e-15)


def test_a_loop_is_repeated_and_two_equal_responses_are_not():
    loop, twins = Packed.from_lists([[7] * 10]), Packed.from_lists([[1, 2, 3, 4]] * 2)
    assert diagnostics.repeated(loop, 3) == 7 / 8  # 8 trigrams, 1 of them different
    assert diagnostics.repeated(twins, 3) == 0.0
    assert diagnostics.distinct(twins, 3) == 0.5


def test_ngrams_without_responses():
    none, empty = Packed.from_lists([]), Packed.from_lists([[], []])
    assert [f(p, 1) for f in (diagnostics.distinct, diagnostics.repeated) for p in (none, empty)] == [0.0] * 4


def test_an_ngram_has_a_token():
    for function in (diagnostics.distinct, diagnostics.repeated):
        with pytest.raises(ValueError, match="not 0"):
            function(ROWS, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ngrams_against_a_loop(n: int):
    chance = random.Random(n)
    ids = [0, 5, 2**31, 2**62]  # ids are names: their size must not matter
    rows = [[chance.choice(ids) for _ in range(chance.randrange(0, 30))] for _ in range(60)]
    each = [g for g in (grams(row, n) for row in rows) if g]
    every = [gram for g in each for gram in g]
    packed = Packed.from_lists(rows)
    assert diagnostics.distinct(packed, n) == pytest.approx(len(set(every)) / len(every), abs=1e-14)
    expected = sum(1 - len(set(g)) / len(g) for g in each) / len(each)
    assert diagnostics.repeated(packed, n) == pytest.approx(expected, abs=1e-14)


# disagreement


def test_disagreement_by_hand():
    # Prompt 1: samples 2 and 3 are swapped, one of three pairs. Prompt 2: a tie in each model leaves one pair, alike.
    first, second = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 1.0]])
    assert diagnostics.disagreement(first, second) == 1 / 4
    assert diagnostics.disagreement(second, first) == 1 / 4
    assert diagnostics.disagreement(first, first) == 0.0
    assert diagnostics.disagreement(first, -first) == 1.0


def test_samples_to_different_prompts_are_no_pair():
    # All four together would give opposite pairs: the second model scores the prompts the other way round.
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert diagnostics.disagreement(first, second) == 0.0


def test_disagreement_without_a_pair_is_0():
    ordered = torch.tensor([[1.0, 2.0]])
    assert diagnostics.disagreement(ordered, torch.ones(1, 2)) == 0.0
    assert diagnostics.disagreement(torch.tensor([[NAN, 2.0]]), -ordered) == 0.0
    assert diagnostics.disagreement(torch.ones(3, 1), torch.ones(3, 1)) == 0.0
    assert diagnostics.disagreement(torch.ones(0, 2), torch.ones(0, 2)) == 0.0


def test_disagreement_against_a_loop():
    chance = random.Random(0)
    first = [[chance.choice([0, 1, 2, 3, NAN]) for _ in range(5)] for _ in range(30)]
    second = [[chance.choice([0, 1, 2, 3, INF]) for _ in range(5)] for _ in range(30)]
    alike = opposite = 0
    for a, b in zip(first, second, strict=True):
        for i in range(5):
            for j in range(i):
                same = (a[i] > a[j]) - (a[i] < a[j])
                other = (b[i] > b[j]) - (b[i] < b[j])
                alike, opposite = alike + (same * other > 0), opposite + (same * other < 0)
    got = diagnostics.disagreement(torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32))
    assert got == opposite / (alike + opposite)


# win rate


def test_a_tie_is_half_a_win():
    result = diagnostics.win_rate(torch.tensor([2.0, 1.0, 0.0, INF]), torch.tensor([1.0, 1.0, 3.0, 0.0]))
    assert (result.wins, result.ties, result.losses, result.rate) == (2, 1, 1, 0.625)
    assert 0 < result.low < 0.625 < result.high < 1


@pytest.mark.parametrize(("wins", "n"), [(8, 10), (1, 3), (64, 128), (0, 5), (5, 5), (999, 1000)])
def test_without_ties_the_interval_is_wilsons(wins: int, n: int):
    result = outcomes(wins, 0, n - wins)
    assert (result.low, result.high) == pytest.approx(wilson(wins / n, n), abs=1e-9)


def test_the_ends_do_not_collapse():
    # All won: 1 - p = z^2 p / n, so p = n / (n + z^2). All tied: n d = z^2 (1 - d) for d = 2 p - 1.
    assert outcomes(10, 0, 0).low == pytest.approx(10 / (10 + Z**2), abs=1e-12)
    assert outcomes(10, 0, 0).high == outcomes(10, 0, 0).rate == 1.0
    assert outcomes(0, 0, 10).high == pytest.approx(Z**2 / (10 + Z**2), abs=1e-12)
    assert outcomes(0, 0, 10).low == outcomes(0, 0, 10).rate == 0.0
    tied = outcomes(0, 10, 0)
    assert tied.high == pytest.approx(0.5 + Z**2 / (10 + Z**2) / 2, abs=1e-12)
    assert tied.low == pytest.approx(0.5 - Z**2 / (10 + Z**2) / 2, abs=1e-12)


def test_equal_wins_and_losses_by_hand():
    # With s the share of prompts not tied and g = (n + z^2) / z^2, the score equation for d = 2 p - 1 is
    # g d^2 - s / 2 = sqrt(s^2 / 4 + (1 - s) d^2), so d^2 = (1 - s + g s) / g^2.
    s, g = 6 / 16, (16 + Z**2) / Z**2
    half = math.sqrt(1 - s + g * s) / g / 2
    result = outcomes(3, 10, 3)
    assert (result.rate, result.low, result.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-12)


def test_published_intervals_of_90_percent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnostics, "Z_95", 1.6448536269514722)
    # Tango 1998, section 6.1: of 44 pairs 1 is lost and none won; the lower limit of the difference is -0.096.
    assert 2 * outcomes(0, 43, 1).low - 1 == pytest.approx(-0.096, abs=5e-4)
    # The R package PropCIs, scoreci.mp(25, 28, 618): -0.0148 to 0.0247.
    result = outcomes(28, 565, 25)
    assert (2 * result.low - 1, 2 * result.high - 1) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


def test_the_limits_are_where_the_score_test_starts_to_reject():
    chance = random.Random(0)
    for _ in range(60):
        wins, ties, losses = chance.randrange(12), chance.randrange(1, 12), chance.randrange(12)
        result, mirrored = outcomes(wins, ties, losses), outcomes(losses, ties, wins)
        for limit in (result.low, result.high):
            assert squared_score(wins, ties, losses, 2 * limit - 1) == pytest.approx(Z**2, rel=1e-4)
        assert 0 <= result.low < result.rate < result.high <= 1
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((result.low, result.high), abs=1e-12)


def test_ties_narrow_the_interval():
    low, high = wilson(0.5, 64)
    assert outcomes(13, 38, 13).high - outcomes(13, 38, 13).low < 0.7 * (high - low)


def test_a_win_rate_needs_prompts_with_scores():
    with pytest.raises(ValueError, match="no prompts"):
        diagnostics.win_rate(torch.zeros(0), torch.zeros(0))
    for own, other in ((NAN, 1.0), (1.0, NAN)):
        with pytest.raises(ValueError, match="NaN"):
            diagnostics.win_rate(torch.tensor([own, 1.0]), torch.tensor([other, 1.0]))


# explained variance


def test_explained_variance_by_hand():
    # Returns 1, 2, 3, 6 have mean 3 and squared deviations 4 + 1 + 0 + 9 = 14. Errors 1, 0, 0, 3 with mean 1: 6.
    returns, values = torch.tensor([[1.0, 2.0, NAN], [3.0, 6.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [3.0, 3.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert diagnostics.explained_variance(values, returns, mask) == pytest.approx(1 - 6 / 14, abs=1e-15)
    assert diagnostics.explained_variance(returns - 5, returns, mask) == 1.0
    assert diagnostics.explained_variance(torch.ones(2, 3), returns, mask) == 0.0
    assert diagnostics.explained_variance(-returns, returns, mask) == -3.0  # Var(2 R) = 4 Var(R)


def test_explained_variance_of_equal_returns_is_0():
    returns = torch.full((1, 3), 0.1, dtype=torch.float64)  # their mean is not 0.1
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert diagnostics.explained_variance(f64(1, 2, 3)[None], returns, everywhere) == 0.0
    assert diagnostics.explained_variance(returns, f64(1, 2, 3)[None], ~everywhere) == 0.0


def test_a_return_that_is_not_a_number_is_not_hidden():
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    assert math.isnan(diagnostics.explained_variance(torch.zeros(1, 2), torch.tensor([[NAN, 1.0]]), everywhere))


# all together


def test_policy_statistics_by_hand():
    # Lengths 4, 2, 0, 1; the response whose score is NaN is not in the correlations.
    statistics = diagnostics.policy_statistics(
        ROWS,
        torch.tensor([2.0, 1.0, NAN, 0.0]),
        torch.tensor([1.0, 2.0, 7.0, 3.0]),
        torch.tensor([False, True, True, True]),
    )
    assert statistics == pytest.approx(
        {
            "correlation/reward_length": 3 / math.sqrt(2 * 14 / 3),  # deviations 1, 0, -1 and 5/3, -1/3, -4/3
            "correlation/reward_kl": -1.0,
            "distinct_1": 3 / 7,
            "distinct_2": 1 / 2,
            "repeated_3": 0.0,
            "truncated": 1 / 4,
            "response_tokens": 7 / 4,
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in statistics.values())


def test_policy_statistics_need_a_response():
    nothing = torch.zeros(0)
    with pytest.raises(ValueError, match="no responses"):
        diagnostics.policy_statistics(Packed.from_lists([]), nothing, nothing, nothing.bool())
