"""Estimators of the KL divergence: by hand, against their expectations, and at the limits."""

from __future__ import annotations

import math

import pytest
import torch

from align.ops import kl

NAN = math.nan


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [[0.5, -0.25, 0.0]]),  # x = lp - lr
        ("abs", [[0.5, 0.25, 0.0]]),
        ("k2", [[0.125, 0.03125, 0.0]]),  # x^2 / 2
        ("k3", [[math.exp(-0.5) - 0.5, math.exp(0.25) - 1.25, 0.0]]),  # exp(-x) - 1 + x
    ],
)
def test_by_hand(estimator: kl.Estimator, expected: list[list[float]]):
    logprob, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.75, -3.0]])
    torch.testing.assert_close(kl.per_token(logprob, reference, estimator), torch.tensor(expected), atol=1e-6, rtol=0)


def test_k1_and_k3_have_the_exact_divergence_as_their_mean():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for estimator in ("k1", "k3"):
        mean = (p * kl.per_token(p.log()[None], q.log()[None], estimator)[0]).sum().item()
        assert mean == pytest.approx(exact, abs=1e-12)
    # |x| is biased upwards: the token with x < 0 counts 0.2 log(1/3) twice.
    mean = (p * kl.per_token(p.log()[None], q.log()[None], "abs")[0]).sum().item()
    assert mean == pytest.approx(exact + 0.4 * math.log(3), abs=1e-12)


def test_only_k1_is_ever_negative():
    x = torch.linspace(-30, 30, 601)[None]
    zero = torch.zeros_like(x)
    assert kl.per_token(x, zero, "k1").min() < 0
    for estimator in ("abs", "k2", "k3"):
        assert kl.per_token(x, zero, estimator).min() >= 0


def test_k3_limits_the_exponent_and_nothing_else():
    x = torch.tensor([[-1000.0, -20.0, 1000.0]], dtype=torch.float64)
    estimate = kl.per_token(x, torch.zeros_like(x), "k3")[0].tolist()
    # exp(20) - 1 - 1000 (not exp(1000)), exp(20) - 21, and exp(-20) - 1 + 1000 (x itself is not limited)
    assert estimate == pytest.approx([math.exp(20) - 1001, math.exp(20) - 21, 999 + math.exp(-20)], rel=1e-12)


def test_limited_tokens_are_counted_where_there_are_tokens():
    logprob = torch.tensor([[0.0, -21.0, -20.0], [-30.0, 5.0, NAN]])
    reference = torch.tensor([[-20.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [False, True, False]])
    assert kl.num_limited(logprob, reference, mask) == 2  # 20.5 and -21; -20 is at the limit, -30 is masked


def test_reductions_differ_by_the_length_and_do_not_see_masked_tokens():
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, NAN, math.inf], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert kl.per_sequence(values, mask, "sum").tolist() == [9.0, 4.0, 0.0]
    assert kl.per_sequence(values, mask, "mean").tolist() == [3.0, 4.0, 0.0]
