"""Leave-one-out: by hand, against a loop, and its invariances."""

from __future__ import annotations

import math
import random

import pytest
import torch

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
    # [4, 1, 1]: 4 - (1 + 1)/2 = 3; 1 - (4 + 1)/2 = -1.5 twice. The mean of all three would give 2, -1, -1.
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
