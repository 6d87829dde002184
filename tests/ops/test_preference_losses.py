"""Losses of direct preference optimization: by hand, their gradients, their limits, and Bernoulli divergences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from align import ops
from align.ops import losses, preference_losses

DIFFERENCE, STRENGTH = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 3.0, 2.0])
GOLD = torch.tensor([1.0, -0.5, 2.0])
WIDE = torch.tensor([-7.0, -2.5, -0.3, 0.0, 0.4, 1.9, 8.0], dtype=torch.float64)
LOG_3 = math.log(3)


def softplus(x: float) -> float:
    """``log(1 + exp(x)) = -log sigmoid(-x)``."""
    return math.log1p(math.exp(x))


def close(loss_P: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(loss_P, torch.tensor(expected, dtype=loss_P.dtype), atol=1e-6, rtol=1e-6)


def test_rows_2i_and_2i_plus_1_are_a_pair():
    value = torch.tensor([5.0, 2.0, -1.0, 3.0], requires_grad=True)
    difference = preference_losses.pair_difference(value)
    assert difference.tolist() == [3.0, -4.0]
    (difference * torch.tensor([10.0, 1.0])).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [10, -10, 1, -1]
    assert preference_losses.pair_difference(torch.empty(0)).shape == (0,)
    with pytest.raises(RuntimeError):
        preference_losses.pair_difference(torch.zeros(3))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # beta = 1/2, so beta d = 0, 1, -1/2
        (partial(preference_losses.dpo, beta=0.5), [math.log(2), softplus(-1), softplus(0.5)]),
        # a quarter of the labels is wrong
        (
            partial(preference_losses.cdpo, beta=0.5, smoothing=0.25),
            [
                math.log(2),
                0.75 * softplus(-1) + 0.25 * softplus(1),
                0.75 * softplus(0.5) + 0.25 * softplus(-0.5),
            ],
        ),
        (
            partial(preference_losses.robust, beta=0.5, smoothing=0.25),
            [
                math.log(2),  # (3/4 - 1/4) / (1/2)
                1.5 * softplus(-1) - 0.5 * softplus(1),
                1.5 * softplus(0.5) - 0.5 * softplus(-0.5),
            ],
        ),
        (partial(preference_losses.ipo, beta=0.25), [4.0, 0.0, 9.0]),  # target 1 / (2/4) = 2
        (partial(preference_losses.hinge, beta=0.25), [1.0, 0.5, 1.25]),
        (partial(preference_losses.hinge, beta=2.0), [1.0, 0.0, 3.0]),
        (partial(preference_losses.margin, strength_P=STRENGTH, beta=0.5), [softplus(1), softplus(2), softplus(2.5)]),
        (
            partial(preference_losses.scaled, strength_P=STRENGTH, beta=0.5),
            [math.log(2), 3 * softplus(-1), 2 * softplus(0.5)],
        ),
        # eta d* = 3, -1.5, 6
        (partial(preference_losses.rpo_sq, gold_P=GOLD, beta=0.5, eta=3.0), [9.0, 6.25, 42.25]),
        (partial(preference_losses.simpo, beta=2.0, gamma=0.5), [softplus(0.5), softplus(-3.5), softplus(2.5)]),
    ],
)
def test_by_hand(loss: Callable[[Tensor], Tensor], expected: list[float]):
    close(loss(DIFFERENCE), expected)


def test_divergences_of_probabilities_by_hand():
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4; beta = 2 and eta = 1/2 are undone by d and d*.
    difference = torch.tensor([LOG_3, 0.0, LOG_3, LOG_3], dtype=torch.float64) / 2
    gold = torch.tensor([0.0, LOG_3, -LOG_3, LOG_3], dtype=torch.float64) * 2
    halves = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # KL(3/4 || 1/2)
    quarters = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # KL(1/2 || 3/4)
    apart = 0.5 * LOG_3  # KL(3/4 || 1/4) = 3/4 log 3 - 1/4 log 3
    close(preference_losses.rpo_fwd_kl(difference, gold, beta=2.0, eta=0.5), [halves, quarters, apart, 0.0])
    close(preference_losses.rpo_bwd_kl(difference, gold, beta=2.0, eta=0.5), [quarters, halves, apart, 0.0])


STRONG = torch.linspace(0.5, 3.0, 7, dtype=torch.float64)
RISING = torch.linspace(-2.0, 3.0, 7, dtype=torch.float64)

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dpo": (partial(preference_losses.dpo, beta=0.7), lambda d: -0.7 * torch.sigmoid(-0.7 * d)),
    "cdpo": (partial(preference_losses.cdpo, beta=0.7, smoothing=0.1), lambda d: 0.7 * (torch.sigmoid(0.7 * d) - 0.9)),
    "robust": (
        partial(preference_losses.robust, beta=0.7, smoothing=0.1),
        lambda d: -0.7 * (0.9 * torch.sigmoid(-0.7 * d) + 0.1 * torch.sigmoid(0.7 * d)) / 0.8,
    ),
    "ipo": (partial(preference_losses.ipo, beta=0.7), lambda d: 2 * (d - 1 / 1.4)),
    "hinge": (partial(preference_losses.hinge, beta=0.7), lambda d: -0.7 * (0.7 * d < 1).double()),
    "margin": (
        partial(preference_losses.margin, strength_P=STRONG, beta=0.7),
        lambda d: -0.7 * torch.sigmoid(STRONG - 0.7 * d),
    ),
    "scaled": (
        partial(preference_losses.scaled, strength_P=STRONG, beta=0.7),
        lambda d: -0.7 * STRONG * torch.sigmoid(-0.7 * d),
    ),
    "rpo_sq": (
        partial(preference_losses.rpo_sq, gold_P=RISING, beta=0.7, eta=1.5),
        lambda d: 1.4 * (0.7 * d - 1.5 * RISING),
    ),
    # d KL(p || q) / dx = p (1 - p) (x - y)
    "rpo_fwd_kl": (
        partial(preference_losses.rpo_fwd_kl, gold_P=RISING, beta=0.7, eta=1.5),
        lambda d: 0.7 * torch.sigmoid(0.7 * d) * torch.sigmoid(-0.7 * d) * (0.7 * d - 1.5 * RISING),
    ),
    # d KL(q || p) / dx = p - q
    "rpo_bwd_kl": (
        partial(preference_losses.rpo_bwd_kl, gold_P=RISING, beta=0.7, eta=1.5),
        lambda d: 0.7 * (torch.sigmoid(0.7 * d) - torch.sigmoid(1.5 * RISING)),
    ),
    "simpo": (partial(preference_losses.simpo, beta=0.7, gamma=0.3), lambda d: -0.7 * torch.sigmoid(0.3 - 0.7 * d)),
}
"""Each loss with its derivative, at seven pairs."""


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_closed_form_and_by_finite_differences(name: str):
    loss, slope = LOSSES[name]
    difference, h = WIDE.clone(), 1e-5
    numeric = (loss(difference + h) - loss(difference - h)) / (2 * h)
    torch.testing.assert_close(numeric, slope(difference), atol=1e-8, rtol=1e-7)
    difference.requires_grad_()
    loss(difference).sum().backward()
    torch.testing.assert_close(difference.grad, slope(difference.detach()), atol=1e-12, rtol=1e-9)


def test_no_loss_is_left_out():
    public = {
        name for name, value in vars(preference_losses).items() if hasattr(value, "__wrapped__") and name[0] != "_"
    }
    assert public == {*LOSSES, "pair_difference"}
    assert ops.preference_losses is preference_losses


def test_limits_are_dpo():
    difference = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 5
    one, none = torch.ones(50), torch.zeros(50)
    dpo = preference_losses.dpo(difference, 0.3)
    for same in (
        preference_losses.cdpo(difference, 0.3, 0.0),
        preference_losses.robust(difference, 0.3, 0.0),
        preference_losses.scaled(difference, one, 0.3),
        preference_losses.margin(difference, none, 0.3),
        preference_losses.simpo(difference, 0.3, 0.0),
    ):
        assert same.equal(dpo)


def test_the_losses_of_reward_models_are_those_of_implicit_rewards():
    torch.testing.assert_close(preference_losses.dpo(DIFFERENCE, 0.5), losses.bradley_terry(0.5 * DIFFERENCE))
    margin = losses.margin_bradley_terry(0.5 * DIFFERENCE, STRENGTH)
    torch.testing.assert_close(preference_losses.margin(DIFFERENCE, STRENGTH, 0.5), margin)
    scaled = losses.scaled_bradley_terry(0.5 * DIFFERENCE, STRENGTH)
    torch.testing.assert_close(preference_losses.scaled(DIFFERENCE, STRENGTH, 0.5), scaled)


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.45])
def test_robust_is_dpo_on_average_over_flipped_labels(smoothing: float):
    right, flipped = preference_losses.robust(WIDE, 0.7, smoothing), preference_losses.robust(-WIDE, 0.7, smoothing)
    torch.testing.assert_close((1 - smoothing) * right + smoothing * flipped, preference_losses.dpo(WIDE, 0.7))


def test_cdpo_is_smallest_where_the_preference_is_as_sure_as_its_label():
    best = torch.tensor([math.log(0.8 / 0.2) / 0.4], dtype=torch.float64, requires_grad=True)
    lowest = preference_losses.cdpo(best, 0.4, 0.2)
    lowest.backward()
    torch.testing.assert_close(best.grad, torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    close(lowest.detach(), [entropy])


def test_rpo_backward_is_cdpo_less_the_entropy_of_the_label():
    # sigmoid(eta d*) = 0.9: the label is wrong with probability 0.1.
    gold = torch.full((7,), math.log(9) / 1.5, dtype=torch.float64)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    backward = preference_losses.rpo_bwd_kl(WIDE, gold, beta=0.7, eta=1.5)
    torch.testing.assert_close(backward, preference_losses.cdpo(WIDE, 0.7, 0.1) - entropy)


def test_rpo_divergences_against_torch_distributions():
    difference, gold = WIDE[:, None].expand(7, 7).flatten(), WIDE[None, :].expand(7, 7).flatten()
    p, q = Bernoulli(logits=0.6 * difference), Bernoulli(logits=1.2 * gold)
    forward, backward = (
        f(difference, gold, beta=0.6, eta=1.2) for f in (preference_losses.rpo_fwd_kl, preference_losses.rpo_bwd_kl)
    )
    torch.testing.assert_close(forward, kl_divergence(p, q))
    torch.testing.assert_close(backward, kl_divergence(q, p))
    assert forward.min() >= 0 and backward.min() >= 0
    assert not torch.allclose(forward, backward)


EXTREME = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (partial(preference_losses.dpo, beta=1.0), [1000, 100, math.log(2), 0, 0]),
        (partial(preference_losses.cdpo, beta=1.0, smoothing=0.25), [750, 75, math.log(2), 25, 250]),
        (partial(preference_losses.robust, beta=1.0, smoothing=0.25), [1500, 150, math.log(2), -50, -500]),
        (partial(preference_losses.hinge, beta=1.0), [1001, 101, 1, 0, 0]),
        (partial(preference_losses.margin, strength_P=torch.full((5,), 3.0), beta=1.0), [1003, 103, softplus(3), 0, 0]),
        (
            partial(preference_losses.scaled, strength_P=torch.full((5,), 3.0), beta=1.0),
            [3000, 300, 3 * math.log(2), 0, 0],
        ),
        (partial(preference_losses.simpo, beta=1.0, gamma=3.0), [1003, 103, softplus(3), 0, 0]),
        # the policy is certain, the label even: log 2
        (
            partial(preference_losses.rpo_fwd_kl, gold_P=torch.zeros(5), beta=1.0, eta=1.0),
            [math.log(2)] * 2 + [0] + [math.log(2)] * 2,
        ),
        # the policy is certain, and so is the label
        (partial(preference_losses.rpo_fwd_kl, gold_P=EXTREME.flip(0), beta=1.0, eta=1.0), [1000, 100, 0, 100, 1000]),
        (partial(preference_losses.rpo_fwd_kl, gold_P=EXTREME, beta=1.0, eta=1.0), [0] * 5),
        (partial(preference_losses.rpo_bwd_kl, gold_P=EXTREME.flip(0), beta=1.0, eta=1.0), [1000, 100, 0, 100, 1000]),
        (partial(preference_losses.rpo_bwd_kl, gold_P=EXTREME, beta=1.0, eta=1.0), [0] * 5),
        # half of the weight on the verdict that the policy excludes
        (
            partial(preference_losses.rpo_bwd_kl, gold_P=torch.zeros(5), beta=1.0, eta=1.0),
            [500 - math.log(2), 50 - math.log(2), 0, 50 - math.log(2), 500 - math.log(2)],
        ),
    ],
)
def test_extremes_are_finite_in_float32(loss: Callable[[Tensor], Tensor], expected: list[float]):
    difference = EXTREME.clone().requires_grad_()
    value = loss(difference)
    assert value.dtype == torch.float32
    close(value.detach(), expected)
    value.sum().backward()
    assert difference.grad is not None
    assert difference.grad.isfinite().all()


def test_forward_divergence_lets_go_where_backward_pulls():
    # The policy is sure of the wrong verdict: p (1 - p) is 0, p - q is -1.
    for loss, slope in ((preference_losses.rpo_fwd_kl, 0.0), (preference_losses.rpo_bwd_kl, -1.0)):
        difference = torch.tensor([-200.0], requires_grad=True)
        loss(difference, torch.tensor([50.0]), beta=1.0, eta=1.0).backward()
        close(difference.grad, [slope])


def test_no_pairs_give_no_losses():
    for name in ("dpo", "ipo", "hinge"):
        assert getattr(preference_losses, name)(torch.empty(0), 0.1).shape == (0,)
