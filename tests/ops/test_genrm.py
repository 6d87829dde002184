"""Rewards and measures of a judge, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.ops import genrm

NAN = math.nan
BROKEN = [NAN, NAN, NAN]


def test_reward_by_hand():
    said = torch.tensor([[5.0, 1, 2], [3, 3, 4], [1, 5, 6], [2, 2, 2], BROKEN])
    label = torch.tensor([[5.0, 1, 2], [5, 1, 2], [5, 1, 1], [NAN, NAN, 5], [5, 1, 2]])
    # all right; 2 + 2 + 2; 4 + 4 + 5; the ranking alone, 3; nothing that could be read
    assert genrm.verdict_reward(said, label, 10.0, 1.0, 1.0).tolist() == [0, -6, -13, -3, -10]
    # 1 (2 + 2) + 2 * 2 and so on: NeMo-Gym's newer server
    assert genrm.verdict_reward(said, label, 100.0, 1.0, 2.0).tolist() == [0, -8, -18, -6, -100]


def test_errors_by_hand():
    said = torch.tensor([[5.0, 1, 2], [4, 2, 4], BROKEN, [1, 1, 1]])
    label = torch.tensor([[5.0, 3, 2], [5, 1, 1], [5, 1, 2], [NAN, NAN, 6]])
    found = genrm.verdict_errors(said, label)
    assert found == {
        "format_violations": 25.0,
        "ranking_error": pytest.approx((0 + 3 + 5) / 3),
        "score_error": pytest.approx((0 + 2 + 1 + 1) / 4),
    }
    assert genrm.verdict_errors(torch.tensor([BROKEN]), label[:1]) == {"format_violations": 100.0}
    assert "score_error" not in genrm.verdict_errors(said[3:], label[3:])


def pair(*rankings: float) -> list[list[float]]:
    return [[3.0, 3.0, one] if one else BROKEN for one in rankings]


def label(ranking: float) -> list[list[float]]:
    return [[NAN, NAN, ranking], [NAN, NAN, 7 - ranking]]


@pytest.mark.parametrize(
    ("rankings", "agreement", "first", "consistent"),
    [
        ((2, 5), 100, 100, 100),
        ((3, 6), 100, 100, 100),
        ((5, 2), 0, 0, 100),
        ((1, 1), 0, 100, 0),  # a bias for the first place cancels out, and a tie is wrong
        ((3, 1), 0, 100, 0),  # and the stronger opinion wins
        ((4, 6), 100, 0, 0),
        ((0, 5), 100, 0, None),  # one order cannot be read, the other decides
        ((2, 0), 100, 100, None),
        ((0, 0), 0, 0, None),
        ((3.5, 3.5), 0, 0, 100),  # both prefer neither
        ((3.5, 5), 100, 0, 0),
    ],
)
def test_agreement_of_one_pair(rankings: tuple[float, float], agreement: int, first: int, consistent: int | None):
    """People prefer the first response, and then the second."""
    found = genrm.verdict_agreement(torch.tensor(pair(*rankings)), torch.tensor(label(1)))
    known = {} if consistent is None else {"order_consistency": consistent}
    assert found == {"agreement": agreement, "first_order": first} | known
    turned = torch.tensor(pair(*(7 - one if one else 0 for one in rankings)))
    assert genrm.verdict_agreement(turned, torch.tensor(label(6))) == found


def test_agreement_is_in_percent_of_pairs():
    said = torch.tensor(pair(2, 5) + pair(5, 2) + pair(2, 5) + pair(0, 0))
    wanted = torch.tensor(label(3) * 4)
    assert genrm.verdict_agreement(said, wanted) == {"agreement": 50.0, "first_order": 50.0, "order_consistency": 100.0}
