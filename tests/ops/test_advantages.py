"""Advantages: by hand, against loops over the papers' formulas, and their invariances."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from torch import Tensor

from align.ops import advantages
from align.ops.advantages import leave_one_out

NAN = math.nan


def slow(rewards: list[list[float]], usable: list[list[bool]]) -> tuple[list[list[float]], list[list[bool]]]:
    """The definition, sample by sample."""
    advantages, learnable = [], []
    for group, ok in zip(rewards, usable, strict=True):
        row, can = [], []
        for i, reward in enumerate(group):
            others = [group[j] for j in range(len(group)) if j != i and ok[j]]
            can.append(ok[i] and len(others) > 0)
            row.append(reward - sum(others) / len(others) if can[-1] else 0.0)
        advantages.append(row)
        learnable.append(can)
    return advantages, learnable


def test_by_hand():
    # [4, 1, 1]: 4 - (1 + 1)/2 = 3; 1 - (4 + 1)/2 = -1.5 twice. The mean of all three would give 2, -1, -1, and the
    # others divided by K = 3 instead of by K - 1 would give 10/3, -2/3, -2/3.
    advantage, learnable = leave_one_out(torch.tensor([[4.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert advantage.tolist() == [[3.0, -1.5, -1.5]]
    assert learnable.tolist() == [[True, True, True]]


def test_two_samples_are_each_others_baseline():
    advantage, _ = leave_one_out(torch.tensor([[1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert advantage.tolist() == [[3.0, -3.0]]


@pytest.mark.parametrize("junk", [NAN, math.inf, -1e30])
def test_an_unusable_sample_is_in_nobodys_baseline(junk: float):
    # 8 and 2 remain: 8 - 2 and 2 - 8.
    advantage, learnable = leave_one_out(torch.tensor([[8.0, junk, 2.0]]), torch.tensor([[True, False, True]]))
    assert advantage.tolist() == [[6.0, 0.0, -6.0]]
    assert learnable.tolist() == [[True, False, True]]


def test_a_group_with_fewer_than_two_usable_samples_contributes_nothing():
    usable = torch.tensor([[False, True, False], [False, False, False], [True, True, False]])
    advantage, learnable = leave_one_out(torch.tensor([[NAN, 5.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, NAN]]), usable)
    assert advantage.tolist() == [[0, 0, 0], [0, 0, 0], [-1, 1, 0]]
    assert learnable.tolist() == [[False] * 3, [False] * 3, [True, True, False]]


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_against_a_loop(K: int):
    chance = random.Random(K)
    rewards = [[chance.gauss(0, 2) for _ in range(K)] for _ in range(40)]
    usable = [[chance.random() < 0.6 for _ in range(K)] for _ in range(40)]
    advantage, learnable = leave_one_out(torch.tensor(rewards, dtype=torch.float64), torch.tensor(usable))
    expected_advantage, expected_learnable = slow(rewards, usable)
    torch.testing.assert_close(advantage, torch.tensor(expected_advantage, dtype=torch.float64))
    assert learnable.tolist() == expected_learnable


def test_groups_are_rows_though_their_rewards_are_alike():
    # Two groups of the same prompt stay apart: one baseline over all four would be (3 + 1 + 3)/3 for the first sample.
    advantage, _ = leave_one_out(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.ones(2, 2, dtype=torch.bool))
    assert advantage.tolist() == [[-2.0, 2.0], [-2.0, 2.0]]


def test_a_constant_added_to_a_group_changes_nothing_and_advantages_sum_to_zero():
    torch.manual_seed(0)
    reward, usable = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4) < 0.7
    advantage, _ = leave_one_out(reward, usable)
    moved, _ = leave_one_out(reward + torch.randn(6, 1, dtype=torch.float64) * 10, usable)
    torch.testing.assert_close(moved, advantage)
    torch.testing.assert_close(advantage.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert advantage.abs().sum() > 1


GROUPS = {"standardized": advantages.group_standardized, "centred": advantages.group_centered}


def test_groups_by_hand():
    # [1, 3, 8]: mean 4, deviations -3, -1, 4, variance (9 + 1 + 16)/2 = 13 over K - 1.
    reward, usable = torch.tensor([[1.0, 3.0, 8.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    assert advantages.group_centered(reward, usable)[0].tolist() == [[-3, -1, 4]]
    deviation = math.sqrt(13) + 1e-6
    expected = [-3 / deviation, -1 / deviation, 4 / deviation]
    assert advantages.group_standardized(reward, usable)[0][0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_leave_out_what_is_unusable(name: str):
    usable = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    reward = torch.tensor([[1.0, NAN, 3.0, 8.0], [math.inf, 5.0, 1.0, NAN], [1.0, 2.0, 3.0, NAN]])
    advantage, learnable = GROUPS[name](reward, usable)
    alone, _ = GROUPS[name](torch.tensor([[1.0, 3.0, 8.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert advantage[0, [0, 2, 3]].equal(alone[0])
    assert advantage[0, 1] == 0
    assert (advantage[1:] == 0).all()  # fewer than two usable
    assert learnable.tolist() == [usable[0].tolist(), [False] * 4, [False] * 4]
    assert advantage.dtype == torch.float32


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_groups_against_a_loop(K: int):
    chance = random.Random(K)
    rewards = [[chance.gauss(0, 2) for _ in range(K)] for _ in range(40)]
    usable = [[chance.random() < 0.6 for _ in range(K)] for _ in range(40)]
    for name, group in GROUPS.items():
        advantage, learnable = group(torch.tensor(rewards, dtype=torch.float64), torch.tensor(usable))
        for p in range(40):
            kept = [rewards[p][k] for k in range(K) if usable[p][k]]
            for k in range(K):
                can = usable[p][k] and len(kept) > 1
                expected = rewards[p][k] - statistics.fmean(kept) if can else 0.0
                if can and name == "standardized":
                    expected /= statistics.stdev(kept) + 1e-6
                assert advantage[p, k].item() == pytest.approx(expected, abs=1e-12)
                assert learnable[p, k].item() is can


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("reward", [0.1, 1e-3, -7.3, 12345.678])
def test_equal_rewards_have_no_advantage(name: str, reward: float):
    # In float32 the mean of several 0.1 is not 0.1, and the difference divided by its own size is.
    for K in (2, 3, 5, 7, 8):
        advantage, learnable = GROUPS[name](torch.full((1, K), reward), torch.ones(1, K, dtype=torch.bool))
        assert (advantage == 0).all()
        assert learnable.all()


def test_centred_is_leave_one_out_made_smaller():
    # R_i - mean = (1 - 1/n)(R_i - mean of the others)
    torch.manual_seed(1)
    reward, usable = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.bool)
    torch.testing.assert_close(
        advantages.group_centered(reward, usable)[0], leave_one_out(reward, usable)[0] * 3 / 4, atol=1e-12, rtol=0
    )


def test_standardized_does_not_change_with_scale_nor_with_the_order_of_samples():
    torch.manual_seed(2)
    reward, usable = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, 6) < 0.8
    advantage, _ = advantages.group_standardized(reward, usable)
    moved, _ = advantages.group_standardized(reward * 100 - 7, usable)
    torch.testing.assert_close(moved, advantage, atol=1e-5, rtol=0)
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    shuffled, _ = advantages.group_standardized(reward[:, order], usable[:, order])
    torch.testing.assert_close(shuffled, advantage[:, order], atol=1e-12, rtol=0)


# Tokens

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
REWARD = torch.tensor([[1.0, 0.0, 2.0], [3.0, NAN, NAN], [NAN, NAN, NAN]])
VALUE = torch.tensor([[4.0, 2.0, 6.0], [1.0, NAN, math.inf], [NAN, NAN, NAN]])


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lambda_: float) -> list[list[float]]:
    return advantages.gae(reward, value, mask, gamma, lambda_)[0].tolist()


def test_gae_by_hand():
    # gamma = lambda = 1/2. delta: 1 + 2/2 - 4 = -2, 0 + 6/2 - 2 = 1, 2 + 0 - 6 = -4.
    # A: -4; 1 - 4/4 = 0; -2 + 0/4 = -2. The second row: 3 - 1.
    advantage, returns = advantages.gae(REWARD, VALUE, MASK, 0.5, 0.5)
    assert advantage.tolist() == [[-2, 0, -4], [2, 0, 0], [0, 0, 0]]
    assert returns.tolist() == [[2, 2, 2], [3, 0, 0], [0, 0, 0]]


def test_gae_with_values_taken_after_the_token_gives_other_numbers():
    # What a critic that is read one token late would pass: V_t is the value after token t.
    late = torch.tensor([[2.0, 6.0, 0.0]])
    mask, reward = MASK[:1], REWARD[:1]
    # delta: 1 + 6/2 - 2 = 2, 0 + 0 - 6 = -6, 2.
    assert gae(reward, late, mask, 0.5, 0.5) == [[0.625, -5.5, 2.0]]
    assert gae(reward, VALUE[:1], mask, 0.5, 0.5) == [[-2.0, 0.0, -4.0]]


def test_gae_at_both_ends_of_lambda():
    mask = torch.ones(1, 3, dtype=torch.bool)
    reward, value = REWARD[:1], VALUE[:1]
    # lambda 0 is delta, with gamma 1: 1 + 2 - 4, 0 + 6 - 2, 2 - 6; lambda 1 is return-to-go minus value.
    assert gae(reward, value, mask, 1.0, 0.0) == [[-1, 4, -4]]
    assert gae(reward, value, mask, 1.0, 1.0) == [[3 - 4, 2 - 2, 2 - 6]]
    go = advantages.returns_to_go(reward, mask, 1.0)
    assert advantages.gae(reward, value, mask, 1.0, 1.0)[1].equal(go)


def test_a_critic_that_is_right_leaves_no_advantage():
    torch.manual_seed(3)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 0, 4])[:, None]
    reward = torch.randn(4, 6, dtype=torch.float64)
    value = advantages.returns_to_go(reward, mask, 0.9)
    advantage, returns = advantages.gae(reward, value, mask, 0.9, 0.7)
    torch.testing.assert_close(advantage, torch.zeros_like(advantage), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, value, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.3)])
def test_gae_and_returns_against_the_sums_of_the_papers(gamma: float, lambda_: float):
    torch.manual_seed(4)
    lengths = [5, 1, 0, 8, 3]
    mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    reward, value = torch.randn(2, 5, 8, dtype=torch.float64)
    advantage, returns = advantages.gae(reward, value, mask, gamma, lambda_)
    go = advantages.returns_to_go(reward, mask, gamma)
    for b, n in enumerate(lengths):
        r, v = reward[b, :n].tolist(), [*value[b, :n].tolist(), 0.0]
        for t in range(8):
            deltas = [r[s] + gamma * v[s + 1] - v[s] for s in range(t, n)]
            expected = sum((gamma * lambda_) ** i * delta for i, delta in enumerate(deltas))
            assert advantage[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < n else 0.0, abs=1e-12)
            assert go[b, t].item() == pytest.approx(sum(gamma ** (s - t) * r[s] for s in range(t, n)), abs=1e-12)


def test_returns_to_go_by_hand():
    # 2; 0 + 2/2; 1 + 1/2. Without discount 2, 2, 3.
    assert advantages.returns_to_go(REWARD, MASK, 0.5).tolist() == [[1.5, 1, 2], [3, 0, 0], [0, 0, 0]]
    assert advantages.returns_to_go(REWARD, MASK, 1.0).tolist() == [[3, 2, 2], [3, 0, 0], [0, 0, 0]]


def test_padding_changes_no_bit():
    torch.manual_seed(5)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 4])[:, None]
    reward, value = torch.randn(2, 3, 5)
    wide = [torch.nn.functional.pad(x, (0, 4), value=NAN) for x in (reward, value)]
    wide_mask = torch.nn.functional.pad(mask, (0, 4))
    for narrow, padded in zip(
        (*advantages.gae(reward, value, mask, 0.9, 0.9), advantages.whiten(reward, mask)),
        (*advantages.gae(*wide, wide_mask, 0.9, 0.9), advantages.whiten(wide[0], wide_mask)),
        strict=True,
    ):
        assert padded[:, :5].equal(narrow)
        assert (padded[:, 5:] == 0).all()


def test_whiten_by_hand():
    # 1, 3, 8, 4: mean 4, squares 9 + 1 + 16 + 0 over 4 (not over 3): sqrt(6.5).
    x = torch.tensor([[1.0, 3.0, 8.0], [4.0, NAN, math.inf], [NAN, NAN, NAN]])
    white = advantages.whiten(x, MASK)
    root = math.sqrt(6.5)
    torch.testing.assert_close(white, torch.tensor([[-3 / root, -1 / root, 4 / root], [0, 0, 0], [0, 0, 0]]))
    assert white.dtype == torch.float32


def test_each_rank_whitening_its_half_is_something_else():
    # Halves [1, 3] and [7, 9] would both become [-1, 1]; the whole has mean 5 and variance (16 + 4 + 4 + 16)/4 = 10.
    x, mask = torch.tensor([[1.0, 3.0], [7.0, 9.0]]), torch.ones(2, 2, dtype=torch.bool)
    halves = torch.cat([advantages.whiten(x[:1], mask[:1]), advantages.whiten(x[1:], mask[1:])])
    torch.testing.assert_close(halves, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    whole = torch.tensor([[-4.0, -2.0], [2.0, 4.0]]) / math.sqrt(10)
    torch.testing.assert_close(advantages.whiten(x, mask), whole)


def test_moments_of_whitening_are_taken_in_float64():
    # Around 1e4 neighbours in float32 are 1e-3 apart: a mean in float32 is off by a tenth of this spread.
    torch.manual_seed(7)
    x, mask = 1e4 + torch.randn(3, 7) * 0.003, torch.ones(3, 7, dtype=torch.bool)
    values = x.flatten().tolist()
    mean, root = statistics.fmean(values), math.sqrt(statistics.pvariance(values) + 1e-8)
    expected = torch.tensor([(value - mean) / root for value in values]).view(3, 7)
    torch.testing.assert_close(advantages.whiten(x, mask), expected, atol=1e-6, rtol=1e-6)


def test_whitening_numbers_without_spread_and_no_numbers_at_all():
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert advantages.whiten(torch.full((1, 7), 0.1), mask).tolist() == [[0] * 7]
    assert advantages.whiten(torch.ones(1, 7), ~mask).tolist() == [[0] * 7]


def test_whitened_numbers_have_mean_0_and_variance_1_in_any_order():
    torch.manual_seed(6)
    mask = torch.arange(9)[None] < torch.tensor([5, 9, 0, 7])[:, None]
    x = torch.randn(4, 9, dtype=torch.float64) * 3 + 2
    white = advantages.whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert white[mask].square().mean().item() == pytest.approx(1.0, abs=1e-8)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(advantages.whiten(x[order], mask[order]), white[order], atol=1e-12, rtol=0)


def test_spread_by_hand():
    assert advantages.broadcast_to_tokens(torch.tensor([2.0, -1.0, NAN]), MASK).tolist() == [
        [2, 2, 2],
        [-1, 0, 0],
        [0, 0, 0],
    ]
