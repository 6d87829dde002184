"""Losses of policy and critic: by hand, against loops over the papers' formulas, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from align.ops import policy_losses
from align.ops.kl import EXPONENT_LIMIT

NAN = math.nan
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
LENGTHS = (4, 1, 0, 6, 3)


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask of `LENGTHS`, new and old numbers a bit apart, and a third; float64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    old, step, third = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64)
    return mask, old + 0.4 * step, old, third


def numeric_gradient(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of a scalar function."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros_like(at).flatten()
        step[i] = h
        step = step.view_as(at)
        gradient.view(-1)[i] = (function(at + step) - function(at - step)) / (2 * h)
    return gradient


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of new and old numbers, advantages or returns, and the mask."""

LOSSES: dict[str, Loss] = {
    "reinforce": lambda new, old, a, m: policy_losses.reinforce(new, a, m),
    "clipped": lambda new, old, a, m: policy_losses.clipped(new, old, a, m, (0.2, 0.3), None)[0],
    "dual": lambda new, old, a, m: policy_losses.clipped(new, old, a, m, (0.2, 0.3), 1.2)[0],
    "sum": lambda new, old, a, m: policy_losses.sequence_clipped(new, old, a[:, 0], m, (0.9, 0.9), "sum")[0],
    "mean": lambda new, old, a, m: policy_losses.sequence_clipped(new, old, a[:, 0], m, (0.3, 0.3), "mean")[0],
    "value": lambda new, old, a, m: policy_losses.value(new, old, a, m, 0.2),
    "plain value": lambda new, old, a, m: policy_losses.value(new, old, a, m, 0.0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_by_finite_differences(loss: Loss):
    for seed in range(5):
        mask, new, old, third = ragged(seed)
        weight = torch.rand(mask.shape, dtype=torch.float64)

        def scalar(x: Tensor, mask=mask, old=old, third=third, weight=weight) -> Tensor:
            return (loss(x, old, third, mask) * weight).sum()

        exact = gradient(scalar, new)
        torch.testing.assert_close(exact, numeric_gradient(scalar, new), atol=1e-7, rtol=1e-6)
        assert (exact[~mask] == 0).all()
        assert exact.abs().sum() > 0.1


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_what_stands_at_masked_positions_is_seen_neither_in_value_nor_in_gradient(loss: Loss):
    mask, new, old, third = ragged(0)
    for junk in (NAN, math.inf, -1e300):
        dirty = [torch.where(mask, x, junk) for x in (new, old, third)]
        assert loss(*dirty, mask).equal(loss(new, old, third, mask))
        assert (loss(*dirty, mask)[~mask] == 0).all()
        exact = gradient(lambda x, dirty=dirty: loss(x, *dirty[1:], mask).sum(), dirty[0])
        assert exact.equal(gradient(lambda x: loss(x, old, third, mask).sum(), new))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_the_gradient_passes_through_the_new_numbers_only_and_rows_do_not_see_each_other(loss: Loss):
    mask, new, old, third = ragged(1)
    inputs = [x.clone().requires_grad_() for x in (new, old, third)]
    whole = loss(*inputs, mask)
    whole.sum().backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    order = torch.tensor([3, 0, 4, 2, 1])
    assert loss(new[order], old[order], third[order], mask[order]).equal(whole.detach()[order])


def test_reinforce_by_hand():
    logprob = torch.tensor([[-1.0, -2.0, NAN], [-0.5, -1.5, -4.0], [NAN, NAN, NAN]])
    advantage = torch.tensor([[2.0, 0.5, NAN], [-3.0, -3.0, 1.0], [NAN, NAN, NAN]])
    loss = policy_losses.reinforce(logprob, advantage, MASK)
    assert loss.tolist() == [[2, 1, 0], [-1.5, -4.5, 4], [0, 0, 0]]
    # The gradient is minus the advantage.
    slope = gradient(lambda x: policy_losses.reinforce(x, advantage, MASK).sum(), logprob)
    assert slope.tolist() == [[-2, -0.5, 0], [3, 3, -1], [0, 0, 0]]


def test_reinforce_raises_the_probability_of_what_was_better():
    logits = torch.zeros(1, 2, requires_grad=True)
    logprob = logits.log_softmax(-1)[:, :1]
    policy_losses.reinforce(logprob, torch.tensor([[1.5]]), torch.ones(1, 1, dtype=torch.bool)).sum().backward()
    # d/dz0 of -1.5 log p0 = -1.5 (1 - 1/2): descent raises z0.
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.75, 0.75]]))


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "loss", "clipped"),
    [
        # With low 0.2 and high 0.3 the ratio is kept between 0.8 and 1.3.
        (2.0, 1.2, None, -2.4, False),
        (2.0, 1.5, None, -2.6, True),  # max(-2 * 1.5, -2 * 1.3)
        (2.0, 0.5, None, -1.0, False),  # max(-2 * 0.5, -2 * 0.8): a good token that became rare is still pulled up
        (2.0, 0.5, 3.0, -1.0, False),
        (2.0, 9.0, 3.0, -2.6, True),
        (-2.0, 0.9, None, 1.8, False),
        (-2.0, 0.5, None, 1.6, True),  # max(2 * 0.5, 2 * 0.8)
        (-2.0, 1.5, None, 3.0, False),
        (-2.0, 4.0, None, 8.0, False),
        (-2.0, 4.0, 3.0, 6.0, True),  # min(8, 3 * 2)
        (-2.0, 2.5, 3.0, 5.0, False),
        (-2.0, 0.5, 3.0, 1.6, True),
        (0.0, 9.0, 3.0, 0.0, False),  # no gradient, but for want of an advantage
    ],
)
def test_clipped_by_hand(advantage: float, ratio: float, dual_clip: float | None, loss: float, clipped: bool):
    # An old log-probability of log 0.05 and a new one of log(0.05 rho).
    old, mask = torch.tensor([[0.05]]).log(), torch.ones(1, 1, dtype=torch.bool)
    new = (torch.tensor([[0.05 * ratio]])).log().requires_grad_()
    got, flag = policy_losses.clipped(new, old, torch.tensor([[advantage]]), mask, (0.2, 0.3), dual_clip)
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert flag.item() is clipped
    got.sum().backward()
    assert new.grad is not None
    # d/d log pi of -A rho = -A rho
    assert new.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-5)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clipped_against_the_papers_formula(dual_clip: float | None):
    num_clipped = 0
    for seed in range(5):
        mask, new, old, advantage = ragged(seed)
        loss, clipped = policy_losses.clipped(new, old, advantage, mask, (0.2, 0.28), dual_clip)
        slope = gradient(
            lambda x, o=old, a=advantage, m=mask: policy_losses.clipped(x, o, a, m, (0.2, 0.28), dual_clip)[0].sum(),
            new,
        )
        assert clipped.equal(mask & (slope == 0))
        num_clipped += int(clipped.sum())
        for b, t in mask.nonzero().tolist():
            ratio, a = math.exp(new[b, t] - old[b, t]), advantage[b, t].item()
            expected = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
            if dual_clip is not None and a < 0:
                expected = min(expected, -dual_clip * a)
            assert loss[b, t].item() == pytest.approx(expected, abs=1e-12)
    assert 5 < num_clipped < 65  # of 70 tokens


def test_before_the_first_step_ppo_is_reinforce():
    mask, new, _, advantage = ragged(2)
    reinforce = gradient(lambda x: policy_losses.reinforce(x, advantage, mask).sum(), new)
    ppo = gradient(lambda x: policy_losses.clipped(x, new, advantage, mask, (0.2, 0.2), None)[0].sum(), new)
    assert ppo.equal(reinforce)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("distance", [1000.0, -1000.0])
def test_a_ratio_too_large_for_float32_gives_finite_losses_and_gradients(advantage: float, distance: float):
    mask, old, new = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1), torch.full((1, 1), distance)

    def token(x: Tensor) -> tuple[Tensor, Tensor]:
        return policy_losses.clipped(x, old, torch.tensor([[advantage]]), mask, (0.2, 0.2), None)

    loss, clipped = token(new)
    limit = math.exp(math.copysign(EXPONENT_LIMIT, distance))
    expected = -min(limit, 1.2) if advantage > 0 else -advantage * max(limit, 0.8)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert clipped.item() is (advantage != 0)
    assert gradient(lambda x: token(x)[0].sum(), new).item() == 0.0


def test_a_log_probability_that_is_nan_is_not_hidden():
    mask, nan = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), NAN)
    loss, _ = policy_losses.clipped(nan, torch.zeros(1, 1), torch.ones(1, 1), mask, (0.2, 0.2), None)
    assert loss.isnan().all()


@pytest.mark.parametrize(
    ("reduction", "loss", "clipped"),
    [
        # Ratios 1.1 * 1.1 = 1.21 > 1.2 with A = 2, and 0.9 * 1 * 1 with A = -3: -2.4 and 2.7 on each token.
        ("sum", [[-2.4, -2.4, 0], [2.7, 2.7, 2.7], [0, 0, 0]], [[True, True, False], [False] * 3, [False] * 3]),
        # Geometric means 1.1 and 0.9^(1/3).
        ("mean", [[-2.2, -2.2, 0], [3 * 0.9 ** (1 / 3)] * 3, [0, 0, 0]], [[False] * 3] * 3),
    ],
)
def test_one_ratio_a_sequence_by_hand(reduction: policy_losses.RatioReduction, loss: list, clipped: list):
    ratio = torch.tensor([[1.1, 1.1, NAN], [0.9, 1.0, 1.0], [NAN, NAN, NAN]], dtype=torch.float64)
    old = torch.full_like(ratio, -2.0)
    advantage = torch.tensor([2.0, -3.0, NAN], dtype=torch.float64)
    got, flags = policy_losses.sequence_clipped(ratio.log() + old, old, advantage, MASK, (0.2, 0.2), reduction)
    torch.testing.assert_close(got, torch.tensor(loss, dtype=torch.float64))
    assert flags.tolist() == clipped


@pytest.mark.parametrize("reduction", get_args(policy_losses.RatioReduction))
def test_sequence_mean_of_the_spread_loss_is_the_mean_of_the_sequences_losses(reduction: policy_losses.RatioReduction):
    mask, new, old, advantage = ragged(3)
    loss, clipped = policy_losses.sequence_clipped(new, old, advantage[:, 0], mask, (0.2, 0.2), reduction)
    total, count = policy_losses.aggregate(loss, mask, "sequence_mean_token_mean", 6)
    expected, flags = [], []
    for b, n in enumerate(LENGTHS):
        distance = sum((new[b, t] - old[b, t]).item() for t in range(n))
        ratio = math.exp(distance if reduction == "sum" else distance / max(n, 1))
        a = advantage[b, 0].item()
        if n:
            expected.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
        flags.append([t < n and (ratio > 1.2 if a > 0 else ratio < 0.8) for t in range(6)])
    assert (total / count).item() == pytest.approx(sum(expected) / 4, abs=1e-12)
    assert clipped.tolist() == flags


def test_importance_weight_by_hand():
    old = torch.tensor([[math.log(0.3), math.log(0.2), NAN], [-1.25, -3.0, 0.0], [NAN, NAN, NAN]], requires_grad=True)
    rollout = torch.tensor([[math.log(0.2), math.log(0.4), 1.0], [-1.25, -9.0, -500.0], [NAN, NAN, NAN]])
    weight = policy_losses.importance_weight(old, rollout, MASK, 2.0)
    torch.testing.assert_close(weight, torch.tensor([[1.5, 0.5, 1.0], [1.0, 2.0, 2.0], [1.0, 1.0, 1.0]]))
    assert weight[1, 0].item() == 1.0
    assert not weight.requires_grad
    # Without a cap the weight is still a number that can be multiplied by 0.
    assert policy_losses.importance_weight(old, rollout, MASK, math.inf)[1, 2].item() == pytest.approx(math.exp(20))


def test_importance_weight_is_exactly_one_where_the_engines_agree():
    mask, logprob, _, _ = ragged(4)
    assert policy_losses.importance_weight(logprob, logprob.clone(), mask, 2.0).equal(torch.ones_like(logprob))


@pytest.mark.parametrize(
    ("clip", "loss"),
    [
        # V 3, 0.9, 1.1, V_old 1, 1, 1, R 2, 2, 0. Clipped at 0.5, V is 1.5, 0.9, 1.1: the first loses
        # max(1, 0.25) / 2, so the clip never makes a loss smaller.
        (0.5, [0.5, 0.605, 0.605]),
        # At 0.05: 1.05, 0.95, 1.05: max(1, 0.9025) / 2, max(1.21, 1.1025) / 2, max(1.21, 1.1025) / 2
        (0.05, [0.5, 0.605, 0.605]),
        (0.0, [0.5, 0.605, 0.605]),
        (-1.0, [0.5, 0.605, 0.605]),
        (math.inf, [0.5, 0.605, 0.605]),
    ],
)
def test_value_by_hand_where_the_clip_does_not_bind(clip: float, loss: list[float]):
    value, old = torch.tensor([[3.0, 0.9, 1.1]]), torch.ones(1, 3)
    got = policy_losses.value(value, old, torch.tensor([[2.0, 2.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool), clip)
    torch.testing.assert_close(got, torch.tensor([loss]))


def test_value_by_hand_where_the_clip_binds():
    # V = 2 meets R = 2, but from V_old = 1 only 1.2 is allowed: 0.8^2 / 2, and no gradient. From V_old = 3: 2.8.
    value, old = torch.full((1, 2), 2.0), torch.tensor([[1.0, 3.0]])
    target, mask = torch.full((1, 2), 2.0), torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(policy_losses.value(value, old, target, mask, 0.2), torch.full((1, 2), 0.32))
    assert gradient(lambda x: policy_losses.value(x, old, target, mask, 0.2).sum(), value).tolist() == [[0, 0]]
    assert policy_losses.value(value, old, target, mask, 0.0).tolist() == [[0, 0]]


def test_value_against_a_loop():
    mask, new, old, target = ragged(5)
    loss = policy_losses.value(new, old, target, mask, 0.2)
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (new, old, target))
        expected = 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
        assert loss[b, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "total", "count", "weight"),
    [
        # Rows [1, 2], [3, 4, 8] and none, of at most 10 tokens; what one token of the first two rows weighs.
        ("token_mean", 18.0, 5, (1, 1)),
        ("sequence_mean", 18.0, 2, (1, 1)),
        ("sequence_mean_token_mean", 6.5, 2, (1 / 2, 1 / 3)),  # 3/2 + 15/3
        ("constant", 18.0, 30, (1, 1)),  # the row without tokens counts
    ],
)
def test_aggregate_by_hand(aggregation: policy_losses.Aggregation, total: float, count: int, weight: tuple):
    loss = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 8.0], [NAN, math.inf, NAN]], requires_grad=True)
    got, number = policy_losses.aggregate(loss, MASK, aggregation, 10)
    assert (got.item(), number.item()) == (total, count)
    got.backward()
    assert loss.grad is not None
    torch.testing.assert_close(loss.grad, torch.where(MASK, torch.tensor([*weight, 0.0])[:, None], 0.0))


@pytest.mark.parametrize("aggregation", get_args(policy_losses.Aggregation))
def test_aggregate_is_the_same_over_any_split_any_order_and_any_padding(aggregation: policy_losses.Aggregation):
    mask, loss, other, _ = ragged(6)
    total, count = policy_losses.aggregate(loss, mask, aggregation, 8)
    for split in ([[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 2], [0], [3, 1]], [[2, 3, 1, 0], [4]]):
        parts = []
        for rows in split:
            longest = max(LENGTHS[i] for i in rows)  # as `Batch.select` cuts the columns
            parts.append(policy_losses.aggregate(loss[rows, :longest], mask[rows, :longest], aggregation, 8))
        assert sum(part.item() for part, _ in parts) == pytest.approx(total.item(), abs=1e-12)
        assert sum(number.item() for _, number in parts) == count.item()
    # Counts are a function of the mask.
    assert policy_losses.aggregate(other * 1e6, mask, aggregation, 8)[1].equal(count)


def test_the_four_means_differ_on_ragged_rows():
    mask, loss, _, _ = ragged(7)
    means = set()
    for aggregation in get_args(policy_losses.Aggregation):
        total, count = policy_losses.aggregate(loss, mask, aggregation, 8)
        means.add(round((total / count).item(), 9))
    assert len(means) == 4
