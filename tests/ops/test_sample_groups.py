"""Choosing among samples and among groups of them: by hand, and against a loop."""

from __future__ import annotations

import math
import random

import torch

from align.ops import advantages

NAN, INF = math.nan, math.inf


def test_groups_with_spread_in_order():
    reward = torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.0, -0.0], [-1.0, 5.0], [NAN, 1.0], [INF, 1.0], [-INF, -INF]])
    assert advantages.groups_with_spread(reward).tolist() == [0, 3]
    assert advantages.groups_with_spread(reward[1:3]).tolist() == []
    assert advantages.groups_with_spread(reward[:0]).tolist() == []


def test_equal_rewards_that_no_sum_can_hold_exactly_have_no_spread():
    # Their variance is not 0 in float32, where the mean of seven 0.1 is not 0.1.
    assert advantages.groups_with_spread(torch.full((1, 7), 0.1)).tolist() == []
    assert advantages.groups_with_spread(torch.tensor([[1e8, 1e8 + 8.0]])).tolist() == [0]


def test_a_single_sample_has_no_spread():
    assert advantages.groups_with_spread(torch.tensor([[1.0], [2.0]])).tolist() == []


def test_best_and_worst_by_hand():
    reward = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 1.0], [1.0, 2.0, 1.0], [4.0, 4.0, 4.0], [NAN, -INF, 3.0]])
    best, worst, gap = advantages.best_and_worst(reward, torch.tensor([[True] * 3] * 4 + [[False, False, True]]))
    assert best.tolist() == [1, 0, 1, 0, 2]  # the first of equals
    assert worst.tolist()[:4] == [0, 2, 0, 0]
    assert gap.tolist() == [4, 1, 1, 0, 0]  # one sample has nothing to be compared with


def test_what_is_not_usable_is_neither_best_nor_worst():
    reward = torch.tensor([[9.0, 5.0, -9.0, 3.0], [NAN, 1.0, 2.0, INF], [1.0, 2.0, 3.0, 4.0]])
    usable = torch.tensor([[False, True, False, True], [False, True, True, False], [False] * 4])
    best, worst, gap = advantages.best_and_worst(reward, usable)
    assert (best.tolist()[:2], worst.tolist()[:2], gap.tolist()) == ([1, 2], [3, 1], [2, 1, 0])


def test_best_and_worst_against_a_loop():
    chance = random.Random(0)
    for _ in range(200):
        reward = [float(chance.randrange(4)) for _ in range(5)]
        usable = [chance.random() < 0.6 for _ in range(5)]
        kept = [(r, k) for k, (r, ok) in enumerate(zip(reward, usable, strict=True)) if ok]
        best, worst, gap = (x.item() for x in advantages.best_and_worst(torch.tensor([reward]), torch.tensor([usable])))
        if kept:
            high, low = max(r for r, _ in kept), min(r for r, _ in kept)
            assert best == min(k for r, k in kept if r == high)
            assert worst == min(k for r, k in kept if r == low)
            assert gap == high - low
        else:
            assert gap == 0


def test_rows_of_samples():
    assert advantages.sequence_index(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3]), 4).tolist() == [1, 8, 11]
    empty = torch.tensor([], dtype=torch.int64)
    assert advantages.sequence_index(empty, empty, 4).tolist() == []


def test_pairs_are_interleaved():
    assert advantages.interleave(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).tolist() == [1, 3, 2, 4]
    assert advantages.interleave(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_numbers_of_several_requests_are_joined():
    assert advantages.concatenate((torch.tensor([1.0]), torch.tensor([2.0, 3.0]))).tolist() == [1, 2, 3]
