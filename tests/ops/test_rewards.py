"""What becomes of scores: unfinished responses, the KL penalty, length and running normalization."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics

import pytest
import torch

from align.ops import rewards

NAN = math.nan
SCORE, FINISHED = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("treatment", "reward", "usable"),
    [
        ("mask", [1.0, -2.0, 0.5], [True, False, True]),
        ("keep", [1.0, -2.0, 0.5], [True, True, True]),
        ("penalize", [1.0, -3.5, 0.5], [True, True, True]),  # -2 - 1.5
    ],
)
def test_unfinished(treatment: rewards.Truncated, reward: list[float], usable: list[bool]):
    got_reward, got_usable = rewards.treat_truncated(SCORE, FINISHED, treatment, penalty=1.5)
    assert got_reward.tolist() == reward
    assert got_usable.tolist() == usable
    assert SCORE.tolist() == [1.0, -2.0, 0.5]
    assert FINISHED.tolist() == [True, False, True]


def test_kl_is_subtracted():
    reward = rewards.subtract_kl(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]), 0.25)
    assert reward.tolist() == [0.25, 3.0]  # 1 - 3/4, 2 + 1


MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False], [True, False, False]])


def test_the_score_lands_on_the_last_sampled_token():
    # One past it, it would be in a masked column, or gone for the row that fills the width.
    score = torch.tensor([1.0, -2.0, NAN, 0.5])
    kl = torch.tensor([[0.5, 1.0, NAN], [0.0, -2.0, 4.0], [NAN, NAN, math.inf], [2.0, NAN, NAN]])
    reward = rewards.per_token(score, kl, MASK, 0.25)
    assert reward.tolist() == [[-0.125, 0.75, 0], [0, 0.5, -3], [0, 0, 0], [0, 0, 0]]


def test_the_rewards_of_tokens_sum_to_the_reward_of_the_response():
    torch.manual_seed(0)
    mask = torch.arange(7)[None] < torch.tensor([3, 7, 1, 5])[:, None]
    score, kl = torch.randn(4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    whole = rewards.subtract_kl(score, torch.where(mask, kl, 0.0).sum(1), 0.1)
    torch.testing.assert_close(rewards.per_token(score, kl, mask, 0.1).sum(1), whole)


@pytest.mark.parametrize("width", [0, 1])
def test_responses_without_tokens_get_nothing(width: int):
    empty = torch.zeros(2, width, dtype=torch.bool)
    assert rewards.per_token(torch.ones(2), torch.ones(2, width), empty, 0.1).tolist() == [[0.0] * width] * 2


def test_overlong_by_hand():
    # Limit 10, buffer 4: free up to 6, then a quarter of 2 for each token.
    lengths = torch.tensor([0, 5, 6, 7, 8, 10, 12])
    assert rewards.overlong(lengths, 10, 4, 2.0).tolist() == [0, 0, 0, -0.5, -1, -2, -2]
    assert rewards.overlong(lengths, 10, 10, 1.0).tolist() == pytest.approx([0, -0.5, -0.6, -0.7, -0.8, -1, -1])
    assert rewards.overlong(lengths, 10, 0, 2.0).tolist() == [0] * 7


def test_overlong_is_a_float_whatever_the_lengths_are():
    for buffer in (0, 3):
        assert rewards.overlong(torch.tensor([1, 2]), 3, buffer, 1.0).dtype == torch.float32


def test_moments_by_hand():
    # 1, 3: mean 2, squares 2. With 5, 7: mean 4, squares 20 (9 + 1 + 1 + 9).
    first = rewards.Moments().updated(torch.tensor([1.0, 3.0]))
    assert first == rewards.Moments(2.0, 2.0, 2.0)
    assert first.std == 1.0
    both = first.updated(torch.tensor([5.0, 7.0]))
    assert both == rewards.Moments(4.0, 4.0, 20.0)
    assert both.std == math.sqrt(5)


@pytest.mark.parametrize(
    "values",
    [[], [3.0], [NAN], [3.0, math.inf, NAN], [0.1] * 7],  # the mean of seven 0.1 in float32 is not 0.1
)
def test_without_spread_the_divisor_is_one(values: list[float]):
    assert rewards.Moments().updated(torch.tensor(values)).std == 1.0


def test_moments_do_not_see_what_is_not_finite():
    values = torch.tensor([[1.0, NAN, 3.0], [math.inf, 5.0, -math.inf]])
    moments = rewards.Moments().updated(values)
    assert moments == rewards.Moments().updated(torch.tensor([1.0, 3.0, 5.0]))
    assert moments.updated(torch.tensor([NAN])) == moments


def test_moments_of_parts_in_any_order_are_those_of_the_whole():
    chance = random.Random(0)
    values = [chance.gauss(1000, 3) for _ in range(60)]  # far from 0, where a sum of squares would lose digits
    for split in ([60], [1] * 60, [20, 1, 39]):
        chance.shuffle(values)
        moments, seen = rewards.Moments(), 0
        for size in split:
            moments = moments.updated(torch.tensor(values[seen : seen + size], dtype=torch.float64))
            seen += size
        assert moments.count == 60
        assert moments.mean == pytest.approx(statistics.fmean(values), rel=1e-14)
        assert moments.std == pytest.approx(statistics.pstdev(values), rel=1e-11)


def test_moments_pass_through_a_checkpoint():
    moments = rewards.Moments().updated(torch.tensor([0.1, 0.7, -2.3]))
    assert rewards.Moments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments


@pytest.mark.parametrize(
    ("how", "penalty", "wanted"),
    [
        ("mean", 9.0, [2.0, 1.0]),
        ("minimum", 9.0, [1.0, -2.0]),
        ("penalized", 0.0, [2.0, 1.0]),
        ("penalized", 1.0, [2.0 - (2 / 3) ** 0.5, 1.0 - 6**0.5]),
        ("penalized", 0.5, [2.0 - 0.5 * (2 / 3) ** 0.5, 1.0 - 0.5 * 6**0.5]),
    ],
)
def test_scores_of_three_models_by_hand(how, penalty, wanted):
    """1, 2, 3 have mean 2 and variance 2/3; -2, 1, 4 have mean 1 and variance 6."""
    score_MB = torch.tensor([[1.0, 4.0], [2.0, -2.0], [3.0, 1.0]])
    found = rewards.combined(score_MB, how, penalty)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(rewards.combined(score_MB[[2, 0, 1]], how, penalty), found)


@pytest.mark.parametrize("how", ["mean", "minimum", "penalized"])
def test_a_response_without_one_score_has_none(how):
    score_MB = torch.tensor([[1.0, math.nan], [2.0, -5.0]])
    found = rewards.combined(score_MB, how, 1.0)
    assert found[0].isfinite()
    assert found[1].isnan()


def test_the_spread_of_one_model_is_0():
    assert rewards.spread(torch.tensor([[3.0, -1.0]])).tolist() == [0.0, 0.0]
