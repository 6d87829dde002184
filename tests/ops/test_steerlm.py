"""Labels, Beta bins against binomial sums, and the group objective against a slow loop and finite differences."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from align.ops import steerlm


def test_labels_are_limited_and_halves_go_to_the_even_number():
    rating = torch.tensor([[-0.7, 0.49, 0.5, 1.5, 2.5, 3.51, 4.6]])
    assert steerlm.labels(rating).tolist() == [[0, 0, 0, 2, 2, 4, 4]]


def by_sums(alpha: int) -> list[float]:
    """log P of the five bins of Beta(alpha, 24 - alpha), where F(x) = P(at least alpha of 23 trials succeed)."""

    def distribution(x: Fraction) -> Fraction:
        return sum((math.comb(23, j) * x**j * (1 - x) ** (23 - j) for j in range(alpha, 24)), Fraction(0))

    edges = [distribution(Fraction(n, 5)) for n in range(6)]
    return [math.log(high - low) for low, high in pairwise(edges)]


@pytest.mark.parametrize("alpha", [1, 2, 5, 11, 12, 13, 18, 23])
def test_bins_are_those_of_the_binomial_sum(alpha: int):
    rating = torch.tensor([[alpha / 6]], dtype=torch.float64)  # 24 r, r = rating / 4
    assert steerlm.beta_bins(rating)[0, 0].tolist() == pytest.approx(by_sums(alpha), abs=1e-9)


def test_a_bin_by_hand():
    """Beta(1, 23): F(x) = 1 - (1 - x)^23, so P(a = 4) = 0.2^23 and P(a = 0) = 1 - 0.8^23."""
    found = steerlm.beta_bins(torch.tensor([[1 / 6]], dtype=torch.float64))[0, 0]
    assert float(found[4]) == pytest.approx(23 * math.log(0.2), abs=1e-9)
    assert float(found[0]) == pytest.approx(math.log(1 - 0.8**23), abs=1e-12)


@pytest.mark.parametrize("rating", [0.003, 0.04, 0.37, 1.9999, 2.0, 2.0001, 3.2, 3.96, 3.9999])
def test_bins_are_a_distribution_and_mirrored(rating: float):
    """The densities at the ends are infinite for ratings below 1/6 and above 4 - 1/6."""
    ratings = torch.tensor([[rating, 4 - rating]], dtype=torch.float64)
    one, other = steerlm.beta_bins(ratings)[0]
    assert float(one.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(one, other.flip(0), atol=1e-8, rtol=0)
    assert int(one.argmax()) == min(4, int(rating / 4 * 5))


def test_ends_and_what_lies_beyond_them():
    found = steerlm.beta_bins(torch.tensor([[0.0, 4.0, -3.0, 9.0]]))[0].tolist()
    floor = steerlm.FLOOR
    assert found[0] == found[2] == [0.0, floor, floor, floor, floor]
    assert found[1] == found[3] == [floor, floor, floor, floor, 0.0]


def test_attributes_multiply():
    rating = torch.tensor([[1 / 6, 3.0], [3.0, math.nan], [math.inf, 3.0]], dtype=torch.float64)
    label = torch.tensor([[4, 3], [4, 3], [4, 3]])
    found = steerlm.attribute_logprob(rating, label)
    assert float(found[0]) == pytest.approx(by_sums(1)[4] + by_sums(18)[3], abs=1e-9)
    assert found[1:].isnan().all()  # never a number in place of one that is missing


USABLE = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_by_hand():
    weight = torch.tensor([[0.0, math.log(3.0), 99.0]])
    usable = torch.tensor([[True, True, False]])
    assert steerlm.shares(weight, usable)[0].tolist() == pytest.approx([0.25, 0.75, 0.0])
    spoilt = torch.where(usable, weight, math.nan)
    assert torch.equal(steerlm.shares(spoilt, usable), steerlm.shares(weight, usable))
    assert steerlm.shares(weight, ~usable.logical_or(~usable)).tolist() == [[0.0, 0.0, 0.0]]


def test_effective_samples_by_hand():
    share = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert steerlm.effective_samples(share) == pytest.approx(1.5)
    assert steerlm.effective_samples(share[2:]) == 0.0


def test_divergence_by_hand():
    target, baseline = torch.tensor([[0.25, 0.75, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    usable = torch.tensor([[True, True, False]])
    assert float(steerlm.divergence(target, baseline, usable)) == pytest.approx(expected, abs=1e-6)
    assert float(steerlm.divergence(target, target, usable)) == 0.0


def slow(weight: list[float], logprob: list[float], previous: list[float], tokens: list[int]) -> tuple[float, list]:
    """Loss of one group of usable samples and its gradient, in plain Python."""
    softmax = lambda x: [math.exp(a) / sum(map(math.exp, x)) for a in x]  # noqa: E731
    target, baseline = softmax(weight), softmax([q - p for q, p in zip(logprob, previous, strict=True)])
    mean = sum(tokens) / len(tokens)
    gradient = [-(w - b) / mean for w, b in zip(target, baseline, strict=True)]
    return sum(g * q for g, q in zip(gradient, logprob, strict=True)), gradient


def test_loss_and_gradient_are_those_of_a_loop_over_groups():
    weight, logprob, previous = numbers(1), numbers(2).requires_grad_(), numbers(3)
    tokens = torch.tensor([[3, 5, 4], [2, 100, 7], [1, 2, 3], [1, 1, 1]])
    target, baseline = steerlm.shares(weight, USABLE), steerlm.shares((logprob - previous).detach(), USABLE)
    loss = steerlm.group_loss(logprob, target, baseline, USABLE, tokens)
    loss.sum().backward()
    assert logprob.grad is not None
    for p in range(4):
        rows = [k for k in range(3) if USABLE[p, k]]
        one = [[float(x.detach()[p, k]) for k in rows] for x in (weight, logprob, previous)]
        value, gradient = slow(*one, [int(tokens[p, k]) for k in rows]) if rows else (0.0, [])
        assert float(loss.detach()[p]) == pytest.approx(value, abs=1e-12)
        assert [float(logprob.grad[p, k]) for k in rows] == pytest.approx(gradient, abs=1e-12)
        assert all(float(logprob.grad[p, k]) == 0.0 for k in range(3) if k not in rows)


def test_the_gradient_is_that_of_the_divergence():
    """Finite differences of KL(w' || b'), in which b' moves, per unusable sample none."""
    weight, logprob, previous, one = numbers(4), numbers(5), numbers(6), torch.ones(4, 3, dtype=torch.int64)
    target = steerlm.shares(weight, USABLE)

    def divergence(logprob: torch.Tensor) -> torch.Tensor:
        baseline = steerlm.shares(logprob - previous, USABLE)
        ratio = torch.where(USABLE, target / baseline, 1.0).log()
        return torch.where(USABLE, target * ratio, 0.0).sum(1)

    leaf = logprob.clone().requires_grad_()
    steerlm.group_loss(leaf, target, steerlm.shares(logprob - previous, USABLE), USABLE, one).sum().backward()
    assert leaf.grad is not None
    for k in range(3):
        step = torch.zeros(4, 3, dtype=torch.float64)
        step[:, k] = 1e-5
        slope = (divergence(logprob + step) - divergence(logprob - step)) / 2e-5
        assert torch.allclose(leaf.grad[:, k], slope, atol=1e-9)


def test_no_gradient_through_the_weights():
    logprob = numbers(7).requires_grad_()
    moving = steerlm.shares(logprob, USABLE)
    loss = steerlm.group_loss(
        logprob, steerlm.shares(numbers(8), USABLE), moving, USABLE, torch.ones_like(USABLE).long()
    )
    fixed = steerlm.group_loss(
        logprob, steerlm.shares(numbers(8), USABLE), moving.detach(), USABLE, torch.ones_like(USABLE).long()
    )
    assert torch.equal(*(torch.autograd.grad(one.sum(), logprob, retain_graph=True)[0] for one in (loss, fixed)))
