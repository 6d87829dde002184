"""RLOO from scores to gradient on a batch worked by hand. (`tests/oracles` compares the same with TRL's trainer.)

Two prompts of three responses; one that was cut off has 4 tokens. log pi = -1 at every token, x = log pi - log pi_ref.

    prompt  score  finished  x                 sum |x|  mean |x|  sum x  mean x
    0         1    yes        1                   1        1        1      1
    0         2    yes        1 -3                4        2       -2     -1
    0         6    no         1  1  1  1          4        1        4      1
    1         0    yes        2  2                4        2        4      2
    1         4    no        -1 -1 -1 -1          4        1       -4     -1
    1        -1    no         0  0  0  4          4        1        4      1

kl_coef = 1/2. Rewards R before any penalty:

    sum |x|    0.5  0  4      -2  2    -3
    mean |x|   0.5  1  5.5    -1  3.5  -1.5
    sum x      0.5  3  4      -2  6    -3
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from align.algorithms import _policy_loss, _rewards, rloo
from align.algorithms._rollout import ScoredRollouts
from align.config import CheckpointRewardConfig, SamplingConfig
from align.types import Batch

NAN = math.nan
SCORE = [1.0, 2.0, 6.0, 0.0, 4.0, -1.0]
X = [[1], [1, -3], [1, 1, 1, 1], [2, 2], [-1, -1, -1, -1], [0, 0, 0, 4]]
FINISHED = [True, True, False, True, False, False]


def config(**values: Any) -> rloo.Config:
    values = {
        "kl_coef": 0.5,
        "truncation_penalty": 2.0,
        "sampling": SamplingConfig(num_samples=3, max_tokens=4),
        **values,
    }
    return rloo.Config(reward=CheckpointRewardConfig(path="r"), **values)


def learn(config: rloo.Config, seen: ScoredRollouts) -> tuple[Batch, dict[str, float]]:
    return rloo.make_batch(config, seen, _rewards.shape_rewards(config, seen, {}))


def loss_of(config: rloo.Config, batch: Batch, **outputs: torch.Tensor) -> Any:
    """The loss that `rloo.train` would ship, on all of a batch."""
    mask_BT = batch.sequences.mask_BT
    outputs = {"entropy_BT": torch.zeros(mask_BT.shape), **outputs}
    return _policy_loss.policy_loss(config, 0.0)(mask_BT=mask_BT, **outputs, **batch.columns)


BY_HAND = [
    # exclude leaves the first two of prompt 0 and one of prompt 1, which has nothing to be compared with.
    ("mask", "abs", "sum", [0.5, -0.5, 0, 0, 0, 0], -0.5, 3),  # -(0.5 (-1) - 0.5 (-2)), 1 + 2 tokens
    ("mask", "abs", "mean", [-0.5, 0.5, 0, 0, 0, 0], 0.5, 3),
    ("mask", "k1", "sum", [-2.5, 2.5, 0, 0, 0, 0], 2.5, 3),
    # 0.5 - (0 + 4)/2, 0 - (0.5 + 4)/2, 4 - (0.5 + 0)/2; -2 - (2 - 3)/2, 2 - (-2 - 3)/2, -3 - (-2 + 2)/2
    ("keep", "abs", "sum", [-1.5, -2.25, 3.75, -1.5, 4.5, -3], 12, 17),  # -(1.5 + 4.5 - 15 + 3 - 18 + 12)
    ("keep", "abs", "mean", [-2.75, -2, 4.75, -2, 4.75, -2.75], 16.25, 17),
    ("keep", "k1", "sum", [-3, 0.75, 2.25, -3.5, 8.5, -5], 14.5, 17),
    # Unfinished ones lose 2: R = 0.5 0 2, -2 0 -5 for sums and 0.5 1 3.5, -1 1.5 -3.5 for means.
    ("penalize", "abs", "sum", [-0.5, -1.25, 1.75, 0.5, 3.5, -4], 3, 17),  # -(0.5 + 2.5 - 7 - 1 - 14 + 16)
    ("penalize", "abs", "mean", [-1.75, -1, 2.75, 0, 3.75, -3.75], 7.25, 17),
]


@pytest.mark.parametrize("padding", [0.0, NAN])
@pytest.mark.parametrize(("truncated", "estimator", "reduction", "advantage", "total", "count"), BY_HAND)
def test_by_hand(
    seen, truncated, estimator, reduction, advantage: list[float], total: float, count: int, padding: float
):
    settings = config(truncated=truncated, kl_estimator=estimator, kl_reduction=reduction)
    shown = seen(X, SCORE, FINISHED, 3, padding=padding)
    batch, _ = learn(settings, shown)
    # One number a response, on each of its tokens and nowhere else.
    assert batch.columns["advantage_BT"].tolist() == [
        [a] * len(x) + [0.0] * (4 - len(x)) for a, x in zip(advantage, X, strict=True)
    ]
    learnable = [True, True, False, False, False, False] if truncated == "mask" else [True] * 6
    assert batch.columns["learnable_B"].tolist() == learnable
    assert batch.temperature == 0.7  # the policy learns at the temperature it sampled at
    given = {"rollout_BT": shown.rollouts.logprob_BT, "old_BT": shown.old_BT, "reference_BT": shown.reference_BT}
    assert all(batch.columns[name] is tensor for name, tensor in given.items())
    assert set(batch.columns) == {"advantage_BT", "learnable_B", *given}

    logprob = shown.rollouts.logprob_BT.clone().requires_grad_()
    loss = loss_of(settings, batch, logprob_BT=logprob, entropy_BT=torch.where(shown.rollouts.mask_BT, 2.0, padding))
    assert (loss.sum.item(), loss.count.item()) == (total, count)
    assert [value.item() for value in loss.metrics["entropy"]] == [34, 17]  # of all responses
    loss.sum.backward()
    assert logprob.grad is not None
    expected = [
        [-a if ok else 0] * len(x) + [0] * (4 - len(x)) for a, ok, x in zip(advantage, learnable, X, strict=True)
    ]
    assert logprob.grad.tolist() == expected


def test_statistics_by_hand(seen):
    settings = config(kl_estimator="abs", kl_reduction="sum")
    _, statistics = learn(settings, seen(X, SCORE, FINISHED, 3, padding=NAN))
    assert statistics == pytest.approx(
        {
            "reward": 2.0,  # 12 / 6
            "reward_std": math.sqrt(34 / 5),  # 1 + 0 + 16 + 4 + 4 + 9
            "shaped_reward": 1.0,  # (1 + 2 + 0) / 3 of those that count, before KL
            "kl": 7 / 6,  # sum x: 1 - 2 + 4 + 4 - 4 + 4, whatever estimator the reward takes
            "kl_coef": 0.5,
            "kl_limited_tokens": 0.0,
            "mismatch_kl": 0.0,
            "mismatch_share": 0.0,
            "mismatch_max_ratio": 1.0,
            "response_tokens": 17 / 6,
            "truncated": 0.5,
            "usable": 0.5,
            "learnable": 2 / 6,
            "failed_scores": 0.0,
            "length_ratio": 1.0,  # the first batch, which later ones are compared with
            "gain_per_root_kl": 0.0,
            # sum of score * length = 41, less 12 * 17 / 6; squared lengths 57 - 17^2 / 6 = 53 / 6
            "correlation/reward_length": 7 / math.sqrt(34 * 53 / 6),
            # sum of score * sum x = 1, less 12 * 7 / 6; squares 69 - 7^2 / 6 = 365 / 6
            "correlation/reward_kl": -13 / math.sqrt(34 * 365 / 6),
            "distinct_1": 1 / 17,  # all tokens are alike
            "distinct_2": 1 / 11,  # 0 + 1 + 3 + 1 + 3 + 3 of them
            "repeated_3": 0.5,  # two equal ones in each response of 4
        }
    )


def test_two_samples_by_hand(seen):
    # R = 3 - 0.5 * 2 = 2 and 1 - 0.5 * (-4) = 3; each is the other's baseline.
    two = config(sampling=SamplingConfig(num_samples=2), kl_estimator="k1", kl_reduction="sum")
    batch, _ = learn(two, seen([[2], [-2, -2]], [3.0, 1.0], K=2))
    assert batch.columns["advantage_BT"].tolist() == [[-1, 0], [1, 1]]


def test_four_samples_one_unfinished_by_hand(seen):
    # R = 4, 1, 1 without the cut-off one: 4 - 1, 1 - 5/2, 1 - 5/2; its score of 100 is seen by nobody.
    four = config(sampling=SamplingConfig(num_samples=4))
    shown = seen([[0], [0, 0], [0] * 4, [0]], [4.0, 1.0, 100.0, 1.0], [True, True, False, True], K=4)
    batch, statistics = learn(four, shown)
    assert batch.columns["advantage_BT"][:, 0].tolist() == [3.0, -1.5, 0.0, -1.5]
    assert batch.columns["learnable_B"].tolist() == [True, True, False, True]
    assert statistics["learnable"] == 0.75


def test_kl_in_the_loss_is_not_in_the_reward(seen):
    # R = score: 1 - 4, 2 - 3.5, 6 - 1.5; 0 - 1.5, 4 + 0.5, -1 - 2.
    settings = config(kl_placement="loss", truncated="keep")
    batch, _ = learn(settings, seen(X, SCORE, FINISHED, 3))
    assert batch.columns["advantage_BT"][:, 0].tolist() == [-3, -1.5, 4.5, -1.5, 4.5, -3]


def test_tokens_beyond_the_limit_are_reported(seen):
    shown = seen([[25, 0], [-30]], [0.0, 0.0], K=2)
    _, statistics = learn(config(sampling=SamplingConfig(num_samples=2)), shown)
    assert statistics["kl_limited_tokens"] == 2


@pytest.mark.parametrize("truncated", ["mask", "keep"])
def test_parts_of_a_batch_add_up_in_any_order(seen, truncated):
    settings, shown = config(truncated=truncated), seen(X, SCORE, FINISHED, 3)
    batch, _ = learn(settings, shown)
    whole = loss_of(settings, batch, logprob_BT=shown.rollouts.logprob_BT)
    total, count = 0.0, 0
    for rows in ([4], [0, 3], [5, 2, 1], []):
        index = torch.tensor(rows, dtype=torch.int64)
        part = batch.select(index)
        logprob_BT = shown.rollouts.logprob_BT[index, : part.sequences.mask_BT.shape[1]]
        loss = loss_of(settings, part, logprob_BT=logprob_BT)
        total, count = total + loss.sum.item(), count + loss.count.item()
    assert (total, count) == (whole.sum.item(), whole.count.item())


def test_a_step_raises_what_was_better_than_its_siblings(seen):
    # One token out of three; responses 0, 1, 2 with rewards 1, 0, -1 have advantages 1.5, 0, -1.5.
    logits = torch.zeros(3, requires_grad=True)
    batch, _ = learn(config(), seen([[0], [0], [0]], [1.0, 0.0, -1.0], K=3, logprob=[[-math.log(3)]] * 3))
    loss = loss_of(config(), batch, logprob_BT=logits.log_softmax(-1)[:, None])
    (loss.sum / loss.count).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, 0.0, 0.5]))


# Configuration


def test_the_equivalent_coefficient_in_the_other_unit():
    # 0.01 per mean token of 500 is 0.01 / 500 per summed token, and the other way round.
    long = SamplingConfig(num_samples=4, max_tokens=500)
    (note,) = rloo.Config(
        reward=CheckpointRewardConfig(path="r"), kl_coef=0.01, kl_reduction="mean", sampling=long
    ).notes()
    assert "kl_coef 0.01 on the mean" in note
    assert "equals 2e-05 on the sum" in note
    (note,) = rloo.Config(
        reward=CheckpointRewardConfig(path="r"), kl_coef=0.01, kl_reduction="sum", sampling=long
    ).notes()
    assert "kl_coef 0.01 on the sum" in note
    assert "equals 5 on the mean" in note


def test_what_has_no_baseline_is_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        rloo.Config(reward=CheckpointRewardConfig(path="r"), sampling=SamplingConfig(num_samples=1))
    with pytest.raises(ValueError, match="temperature must be positive"):
        rloo.Config(reward=CheckpointRewardConfig(path="r"), sampling=SamplingConfig(num_samples=2, temperature=0.0))
