"""Losses by hand, their gradients, and TRL's reward trainer where it computes the same."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl import RewardTrainer

from align.ops import losses
from align.types import NOT_RATED

NAN = math.nan
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
LOGPROB = torch.tensor([[-1.0, -2.0, NAN], [-0.5, -1.5, -4.0], [NAN, NAN, NAN]])


def softplus(x: float) -> float:
    """``log(1 + exp(x)) = -log sigmoid(-x)``."""
    return math.log1p(math.exp(x))


def test_cross_entropy_by_hand():
    total, count = losses.cross_entropy(LOGPROB, MASK)
    assert total.item() == 9.0  # 1 + 2 + 0.5 + 1.5 + 4
    assert count.item() == 5


def test_cross_entropy_gradient_is_minus_one_at_tokens_and_zero_elsewhere():
    logprob = LOGPROB.clone().requires_grad_()
    losses.cross_entropy(logprob, MASK)[0].backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == (-MASK.float()).tolist()


def test_sums_add_up_over_any_split_of_the_rows():
    whole = losses.cross_entropy(LOGPROB, MASK)
    parts = [losses.cross_entropy(LOGPROB[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    assert sum(total.item() for total, _ in parts) == whole[0].item()
    assert sum(count.item() for _, count in parts) == whole[1].item()


DIFFERENCE, STRENGTH = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda d, m: losses.bradley_terry(d), [math.log(2), softplus(-2), softplus(1)]),
        (losses.margin_bradley_terry, [softplus(1), softplus(1), softplus(3)]),  # d - m = -1, -1, -3
        (losses.scaled_bradley_terry, [math.log(2), 3 * softplus(-2), 2 * softplus(1)]),
    ],
)
def test_preference_losses_by_hand(loss, expected: list[float]):
    torch.testing.assert_close(loss(DIFFERENCE, STRENGTH), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (lambda d, m: losses.bradley_terry(d), lambda d, m: -torch.sigmoid(-d)),
        (losses.margin_bradley_terry, lambda d, m: -torch.sigmoid(m - d)),
        (losses.scaled_bradley_terry, lambda d, m: -m * torch.sigmoid(-d)),
    ],
)
def test_preference_gradients_in_closed_form_and_by_finite_differences(loss, slope):
    difference, strength = DIFFERENCE.double(), STRENGTH.double()
    h = 1e-5
    numeric = (loss(difference + h, strength) - loss(difference - h, strength)) / (2 * h)
    torch.testing.assert_close(numeric, slope(difference, strength), atol=1e-9, rtol=1e-8)
    difference.requires_grad_()
    loss(difference, strength).sum().backward()
    torch.testing.assert_close(difference.grad, slope(difference.detach(), strength))


def test_large_differences_stay_finite():
    far = torch.tensor([-1e4, 1e4])
    assert losses.bradley_terry(far).tolist() == [1e4, 0.0]
    assert losses.scaled_bradley_terry(far, torch.tensor([3.0, 3.0])).tolist() == [3e4, 0.0]


def test_centering_by_hand():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 2.0, -1.0])
    assert losses.centering(chosen, rejected).tolist() == [9.0, 0.0, 0.25]


def test_squared_error_by_hand_and_its_gradient():
    attribute = torch.tensor([[1.0, 5.0, 0.0], [2.5, 3.0, 7.0]], requires_grad=True)
    label = torch.tensor([[3.0, NOT_RATED, 0.0], [NOT_RATED, 4.0, NOT_RATED]])
    total, count = losses.squared_error(attribute, label)
    assert (total.item(), count.item()) == (5.0, 3.0)  # 4 + 0 + 1
    total.backward()
    assert attribute.grad is not None
    assert attribute.grad.tolist() == [[-4.0, 0.0, 0.0], [0.0, -2.0, 0.0]]


def test_what_is_not_rated_does_not_reach_the_loss_whatever_was_predicted():
    attribute = torch.tensor([[NAN, 1.0]], requires_grad=True)
    total, count = losses.squared_error(attribute, torch.tensor([[NOT_RATED, 3.0]]))
    total.backward()
    assert (total.item(), count.item()) == (4.0, 1.0)
    assert attribute.grad is not None
    assert attribute.grad.tolist() == [[0.0, -4.0]]


def trl_reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float | None = None) -> float:
    """TRL's mean loss of given scores."""

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": margin}
    return RewardTrainer.compute_loss(trainer, model, inputs).item()


def test_trl_computes_the_same():
    torch.manual_seed(3)
    chosen, rejected, strength = torch.randn(16) * 2, torch.randn(16) * 2, torch.randint(1, 4, (16,)).float()
    d = chosen - rejected
    assert losses.bradley_terry(d).mean().item() == pytest.approx(trl_reward_loss(chosen, rejected, None), abs=1e-6)
    margin = losses.margin_bradley_terry(d, strength).mean().item()
    assert margin == pytest.approx(trl_reward_loss(chosen, rejected, strength), abs=1e-6)
    centred = (losses.bradley_terry(d) + 0.3 * losses.centering(chosen, rejected)).mean().item()
    assert centred == pytest.approx(trl_reward_loss(chosen, rejected, None, 0.3), abs=1e-6)
