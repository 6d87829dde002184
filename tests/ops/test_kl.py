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


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [("k2", lambda x: x), ("k3", lambda x: 1 - math.exp(-x)), ("abs", lambda x: math.copysign(1, x))],
)
def test_gradients_in_the_loss_by_hand_and_by_finite_differences(estimator: kl.Estimator, slope):
    torch.manual_seed(0)
    logprob, reference = torch.randn(2, 3, 4, dtype=torch.float64) * 3
    logprob.requires_grad_()
    kl.per_token(logprob, reference, estimator).sum().backward()
    h = 1e-6
    low, high = (kl.per_token(logprob.detach() + step, reference, estimator) for step in (-h, h))
    torch.testing.assert_close(logprob.grad, (high - low) / (2 * h), atol=1e-7, rtol=1e-6)
    expected = (logprob - reference).detach().clone().apply_(slope)
    torch.testing.assert_close(logprob.grad, expected)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_in_the_loss_a_masked_token_has_no_gradient(estimator: kl.Estimator, reduction: kl.Reduction):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    gradients = []
    for junk in (0.0, NAN, math.inf):
        logprob = torch.where(mask, torch.tensor([[-1.0, -2.0, 0], [0, 0, 0]]), junk).requires_grad_()
        reference = torch.where(mask, torch.tensor([[-1.5, -1.0, 0], [0, 0, 0]]), junk)
        kl.per_sequence(kl.per_token(logprob, reference, estimator), mask, reduction).sum().backward()
        gradients.append(logprob.grad)
    assert gradients[1].isfinite().all()
    assert gradients[1].equal(gradients[0])
    assert gradients[2].equal(gradients[0])
    assert (gradients[0] != 0).equal(mask)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_a_difference_that_is_not_finite_is_not_hidden(estimator: kl.Estimator):
    estimate = kl.per_token(torch.tensor([[NAN, math.inf, 0.0]]), torch.tensor([[0.0, 0.0, NAN]]), estimator)[0]
    assert estimate.isnan().tolist() == [True, False, True]
    assert estimate[1].item() == math.inf


@pytest.mark.parametrize(
    ("divergence", "coefficient"),
    [
        # Target 6, 100 sequences of a horizon of 1000: the error counts a tenth.
        (6.0, 0.5),
        (6.6, 0.505),  # error 0.1
        (5.4, 0.495),
        (60.0, 0.51),  # error 9, limited to 0.2
        (0.0, 0.49),  # error -1, limited to -0.2
        (-3.0, 0.49),  # the mean of k1 may be negative
        (NAN, 0.5),
        (math.inf, 0.5),
        (-math.inf, 0.5),
    ],
)
def test_adaptive_coefficient_by_hand(divergence: float, coefficient: float):
    assert kl.adapted(0.5, divergence, 6.0, 1000, 100) == pytest.approx(coefficient, abs=1e-12)


def test_the_adaptive_coefficient_settles_where_the_divergence_is_the_target():
    # A policy whose divergence is 3 / coefficient meets the target 6 at 0.5.
    coefficient = 0.1
    for _ in range(400):
        coefficient = kl.adapted(coefficient, 3.0 / coefficient, 6.0, 1000, 100)
    assert coefficient == pytest.approx(0.5, rel=1e-6)
