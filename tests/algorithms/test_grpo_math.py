"""GRPO, Dr. GRPO and DAPO: advantages and losses by hand, dynamic sampling, and rollouts of older weights.

Two prompts of three responses, log pi = -1 at every token:

    prompt  score  tokens  R - mean  (R - mean) / std     std over K - 1
    0         1      1       -2         -2 / sqrt 7       (4 + 1 + 9) / 2 = 7
    0         2      2       -1         -1 / sqrt 7
    0         6      4        3          3 / sqrt 7
    1         5      2        0          0                no spread
    1         5      1        0          0
    1         5      3        0          0
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from align.algorithms import _policy_loss, _rewards, grpo
from align.algorithms._rollout import ScoredRollouts
from align.config import CheckpointRewardConfig, PolicyLossConfig, RewardShapingConfig, SamplingConfig
from align.data.prompts import PromptStream
from align.roles import CompletedFuture, Loss
from align.types import Batch, Packed, Prompts, Rollouts, Sequences

NAN, INF = math.nan, math.inf
SCORE, LENGTHS = [1.0, 2.0, 6.0, 5.0, 5.0, 5.0], [1, 2, 4, 2, 1, 3]
X = [[0.0] * n for n in LENGTHS]
ROOT = math.sqrt(7)


def config(K: int = 3, **values: Any) -> grpo.Config:
    return grpo.Config(
        **{
            "reward": CheckpointRewardConfig(path="r"),
            "sampling": SamplingConfig(num_samples=K, max_tokens=8),
            **values,
        }
    )


def learn(config: grpo.Config, seen: ScoredRollouts) -> tuple[Batch, dict[str, float]]:
    return grpo.make_batch(config, seen, _rewards.shape_rewards(config, seen, {}))


def advantages(batch: Batch) -> list[float]:
    """One number a response, which must be on each of its tokens."""
    advantage_BT, mask_BT = batch.columns["advantage_BT"], batch.sequences.mask_BT
    assert advantage_BT.equal(torch.where(mask_BT, advantage_BT[:, :1], 0.0))
    return advantage_BT[:, 0].tolist()


def loss_of(config: grpo.Config, batch: Batch, logprob_BT: Any, kl_coef: float = 0.0) -> Loss:
    outputs = {"mask_BT": batch.sequences.mask_BT, "entropy_BT": torch.zeros(batch.sequences.mask_BT.shape)}
    return _policy_loss.policy_loss(config, kl_coef)(logprob_BT=logprob_BT, **outputs, **batch.columns)


# Advantages


@pytest.mark.parametrize("padding", [0.0, NAN])
@pytest.mark.parametrize(("normalize", "divisor"), [(True, ROOT), (False, 1.0)])
def test_advantages_by_hand(seen, normalize: bool, divisor: float, padding: float):
    batch, statistics = learn(config(normalize=normalize), seen(X, SCORE, K=3, padding=padding))
    assert advantages(batch) == pytest.approx([-2 / divisor, -1 / divisor, 3 / divisor, 0, 0, 0], rel=1e-5)
    assert (statistics["learnable"], statistics["groups_without_spread"]) == (1, 0.5)


def test_what_was_cut_off_can_be_left_out_of_mean_and_spread(seen):
    # 2 and 6 without the 1: mean 4, std sqrt 8.
    finished = [False, True, True, True, True, True]
    batch, statistics = learn(config(truncated="mask"), seen(X, SCORE, finished, K=3))
    assert advantages(batch)[:3] == pytest.approx([0, -2 / math.sqrt(8), 2 / math.sqrt(8)], rel=1e-5)
    assert batch.columns["learnable_B"].tolist() == finished
    assert statistics["learnable"] == pytest.approx(5 / 6)


def test_kl_is_in_the_loss_by_default_and_in_the_reward_on_request(seen):
    x = [[2.0], [0.0]]
    batch, _ = learn(config(2, normalize=False), seen(x, [3.0, 1.0], K=2))
    assert advantages(batch) == [1, -1]
    in_reward = config(2, normalize=False, kl_placement="reward", kl_estimator="k1", kl_coef=0.5)
    batch, _ = learn(in_reward, seen(x, [3.0, 1.0], K=2))
    assert advantages(batch) == [0.5, -0.5]  # 3 - 1 against 1


def test_length_is_shaped_before_groups_are_compared(seen):
    # Equal scores of 1 and a limit of 8 with a buffer of 4: 1 for 4 tokens, 1 - 1/2 for 6, 0 for 8. Mean 1/2.
    settings = config(normalize=False, shaping=RewardShapingConfig(overlong_buffer=4))
    batch, statistics = learn(settings, seen([[0] * 4, [0] * 6, [0] * 8], [1.0] * 3, K=3))
    assert advantages(batch) == [0.5, 0, -0.5]
    assert statistics["groups_without_spread"] == 0
    # A clip at 1/2 comes before it: 1/2, 0, -1/2.
    clipped = config(normalize=False, shaping=RewardShapingConfig(overlong_buffer=4, clip=0.5))
    batch, statistics = learn(clipped, seen([[0] * 4, [0] * 6, [0] * 8], [1.0] * 3, K=3))
    assert advantages(batch) == [0.5, 0, -0.5]
    assert statistics["shaped_reward"] == 0


# Losses

AGGREGATIONS = {
    # The ratio is 1, so each token has -A: 2, 1 1, -3 -3 -3 -3, and zeros; a sum of -8, and -2/1 - 2/2 ... of means.
    "token_mean": (-8, 13),
    "sequence_mean": (-8, 6),
    "sequence_mean_token_mean": (0, 6),  # 2 + 1 - 3
    "constant": (-8, 48),  # 6 responses times a limit of 8
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_by_hand(seen, aggregation):
    settings = config(normalize=False, loss=PolicyLossConfig(kind="clipped", aggregation=aggregation))
    shown = seen(X, SCORE, K=3)
    batch, _ = learn(settings, shown)
    logprob = shown.rollouts.logprob_BT.clone().requires_grad_()
    loss = loss_of(settings, batch, logprob)
    total, count = AGGREGATIONS[aggregation]
    assert (loss.sum.item(), loss.count.item()) == (total, count)
    loss.sum.backward()
    assert logprob.grad is not None
    by_mean = aggregation == "sequence_mean_token_mean"
    expected = [2.0, 1 / 2 if by_mean else 1.0, -3 / 4 if by_mean else -3.0]
    assert logprob.grad[:3, 0].tolist() == expected
    assert logprob.grad[2].tolist() == [expected[2]] * 4


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_without_a_response(seen, aggregation):
    # The last of prompt 0 was cut off; 1 against 2 is left, and the group without spread.
    settings = config(normalize=False, truncated="mask", loss=PolicyLossConfig(kind="clipped", aggregation=aggregation))
    shown = seen(X, SCORE, [True, True, False, True, True, True], K=3)
    batch, _ = learn(settings, shown)
    loss = loss_of(settings, batch, shown.rollouts.logprob_BT)
    # -A: 1/2 on one token, -1/2 on two. Dr. GRPO's constant counts every response that was sampled.
    total, count = {
        "token_mean": (-0.5, 9),
        "sequence_mean": (-0.5, 5),
        "sequence_mean_token_mean": (0, 5),
        "constant": (-0.5, 48),
    }[aggregation]
    assert (loss.sum.item(), loss.count.item()) == (total, count)


def test_k3_in_the_loss_by_hand(seen):
    # x = log 2 on the token of response 0 and -log 2 on both of response 1: k3 = 1/2 - 1 + log 2 and 2 - 1 - log 2.
    log2 = math.log(2)
    settings = config(2, normalize=False)  # sequence_mean_token_mean
    shown = seen([[log2], [-log2, -log2]], [3.0, 1.0], K=2)
    batch, _ = learn(settings, shown)
    logprob = shown.rollouts.logprob_BT.clone().requires_grad_()
    loss = loss_of(settings, batch, logprob, kl_coef=0.5)
    assert loss.sum.item() == pytest.approx(-1 + 1 + 0.5 * (log2 - 0.5 + 1 - log2), rel=1e-6)
    assert loss.count.item() == 2
    loss.sum.backward()
    # -A + (1 - exp(-x)) / 2, over the length: -1 + 1/4, and (1 - 1/2) / 2 twice.
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.tensor([[-0.75, 0.0], [0.25, 0.25]]))


@pytest.mark.parametrize("kind", ["sequence_clipped", "sequence_mean_clipped"])
def test_one_ratio_a_response(seen, kind):
    # Log-ratios 0.1, 0.1 of the better response: by sum rho = exp(0.2) > 1.2, clipped; by mean exp(0.1) is not.
    settings = config(2, normalize=False, loss=PolicyLossConfig(kind=kind, aggregation="sequence_mean_token_mean"))
    batch, _ = learn(settings, seen([[0, 0], [0]], [3.0, 1.0], K=2))
    logprob = torch.tensor([[-0.9, -0.9], [-1.0, 0.0]], requires_grad=True)
    loss = loss_of(settings, batch, logprob)
    by_sum = kind == "sequence_clipped"
    assert loss.sum.item() == pytest.approx(-1.2 + 1 if by_sum else -math.exp(0.1) + 1, rel=1e-6)
    assert [value.item() for value in loss.metrics["clipped"]] == [2 if by_sum else 0, 3]
    loss.sum.backward()
    assert logprob.grad is not None
    slope = 0 if by_sum else -math.exp(0.1) / 2
    torch.testing.assert_close(logprob.grad, torch.tensor([[slope, slope], [1.0, 0.0]]))


@pytest.mark.parametrize("kind", ["reinforce", "clipped", "sequence_clipped", "sequence_mean_clipped"])
def test_a_rank_without_work_has_a_loss_of_nothing(seen, kind):
    aggregation = "sequence_mean_token_mean" if kind.startswith("sequence") else "token_mean"
    settings = config(loss=PolicyLossConfig(kind=kind, aggregation=aggregation, entropy_coef=0.1))
    batch, _ = learn(settings, seen(X, SCORE, K=3))
    none = batch.select(torch.tensor([], dtype=torch.int64))
    loss = loss_of(settings, none, torch.zeros(0, 0), kl_coef=0.1)
    assert (loss.sum.item(), loss.count.item()) == (0, 0)


# Rollouts of older weights


def lagging(seen: Any, how: PolicyLossConfig) -> tuple[grpo.Config, Batch, torch.Tensor]:
    """The weights that learn find the tokens of the better response e^0.5, e^2 and e^-1 times as likely as the weights
    that sampled, those of the worse one as likely; A = 1 and -1."""
    settings = config(2, normalize=False, max_off_policy_steps=1, loss=how)
    old = [[-0.5, 1.0, -2.0], [-1.0]]
    batch, statistics = learn(settings, seen([[0] * 3, [0]], [3.0, 1.0], K=2, old=old, padding=NAN))
    assert statistics["mismatch_kl"] == pytest.approx(
        sum(math.exp(d) - 1 - d for d in (0.5, 2.0, -1.0, 0.0)) / 4, rel=1e-6
    )
    return settings, batch, torch.tensor([*old[:1], [*old[1], NAN, NAN]])


@pytest.mark.parametrize("cap", [2.0, 1.0, 100.0])
def test_importance_weights_by_hand(seen, cap: float):
    weights = [min(math.exp(d), cap) for d in (0.5, 2.0, -1.0)]
    settings, batch, old = lagging(seen, PolicyLossConfig(kind="clipped", importance_cap=cap))
    logprob = old.clone().requires_grad_()
    loss = loss_of(settings, batch, logprob)
    assert loss.sum.item() == pytest.approx(
        -sum(weights) + 1, rel=1e-6
    )  # the ratio to the weights before the step is 1
    assert loss.count.item() == 4
    loss.sum.backward()
    assert logprob.grad is not None  # the weight itself has none
    torch.testing.assert_close(logprob.grad, torch.tensor([[-w for w in weights], [1.0, 0.0, 0.0]]))


def test_the_ratio_is_to_the_weights_before_the_step_not_to_those_that_sampled(seen):
    # A step has made the first token e^0.1 times as likely: within 0.2 of the weights before it, so not clipped.
    settings, batch, old = lagging(seen, PolicyLossConfig(kind="clipped", importance_cap=2.0))
    moved = old.clone()
    moved[0, 0] += 0.1
    loss = loss_of(settings, batch, moved)
    assert loss.metrics["clipped"][0].item() == 0
    assert loss.sum.item() == pytest.approx(-math.exp(0.6) - 2 - math.exp(-1) + 1, rel=1e-6)
    assert loss.metrics["policy_kl"][0].item() == pytest.approx(math.exp(0.1) - 1 - 0.1, rel=1e-4)


def test_the_weight_is_of_the_policy_gradient_and_not_of_kl(seen):
    settings, batch, old = lagging(seen, PolicyLossConfig(kind="clipped"))
    plain, with_kl = (loss_of(settings, batch, old, kl_coef=coefficient).sum.item() for coefficient in (0.0, 0.5))
    # log pi_ref = -1: x is the log-ratio to the rollout, k3 = exp(-x) - 1 + x.
    expected = sum(math.exp(-d) - 1 + d for d in (0.5, 2.0, -1.0))
    assert with_kl - plain == pytest.approx(0.5 * expected, rel=1e-6)


def test_without_lag_every_weight_is_one(seen):
    settings = config(2, normalize=False)
    shown = seen([[0], [0]], [3.0, 1.0], K=2, logprob=[[-0.3], [-7.7]])
    batch, _ = learn(settings, shown)
    assert loss_of(settings, batch, shown.rollouts.logprob_BT).sum.item() == 0  # -1 + 1


# Dynamic sampling

STREAM = PromptStream(Packed.from_lists([[n] for n in range(1, 8)]), batch_size=2, seed=3, stop_ids=(0,), attempts=3)


class Sampler:
    """Answers prompt n of a step with tokens 100 + 2n and 100 + 2n + 1, n + 1 of them, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int], list[list[int]]]] = []

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> CompletedFuture[Rollouts]:
        self.asked.append((prompts.step, prompts.index_P.tolist(), prompts.tokens.lists()))
        rows = [[100 + 2 * n + k] * (n + 1) for n in prompts.index_P.tolist() for k in range(2)]
        responses = Packed.from_lists(rows)
        sequences = Sequences(prompts.tokens, responses, torch.arange(len(prompts)).repeat_interleave(2))
        logprob_BT = -responses.padded(0).float()
        finished_B = torch.ones(len(rows), dtype=torch.bool)
        return CompletedFuture(Rollouts(sequences, logprob_BT, logprob_BT, finished_B, 0.7, prompts.step))


class Judge:
    """Scores of the two responses to prompt n."""

    def __init__(self, scores: dict[int, tuple[float, float]]):
        self.scores, self.count = scores, 0

    def score(self, sequences: Sequences) -> CompletedFuture[torch.Tensor]:
        self.count += 1
        ids = [row[0] - 100 for row in sequences.responses.lists()]
        return CompletedFuture(torch.tensor([self.scores.get(i // 2, (1.0, 1.0))[i % 2] for i in ids]))


class Cast:
    def __init__(self, scores: dict[int, tuple[float, float]]):
        self.policy, self.reward = Sampler(), Judge(scores)


SPREAD, FAILED = (0.0, 2.0), (NAN, 2.0)


@pytest.mark.parametrize(
    ("scores", "attempts", "kept", "batches"),
    [
        ({0: SPREAD, 1: SPREAD}, 3, [0, 1], 1),  # enough at once
        ({0: SPREAD, 2: SPREAD, 3: SPREAD}, 3, [0, 2], 2),  # filled up in order, one is left over
        ({1: SPREAD, 5: SPREAD}, 3, [1, 5], 3),
        ({3: SPREAD}, 3, [3], 3),  # no more than three batches, though a group is missing
        ({2: SPREAD, 3: SPREAD}, 3, [2, 3], 2),  # the first batch gives nothing
        ({}, 3, [4, 5], 3),  # the last batch as it is
        ({}, 1, [0, 1], 1),
        ({0: SPREAD}, 1, [0, 1], 1),  # one attempt takes the first batch as it is
        ({0: FAILED, 1: (INF, 0.0), 2: SPREAD}, 2, [2], 2),  # a failed score is no spread
    ],
)
def test_groups_with_spread_are_kept_in_order_until_there_are_enough(scores, attempts: int, kept, batches: int):
    settings = config(2, prompts_per_step=2, max_attempts=attempts)
    roles: Any = Cast(scores)
    first = roles.policy.generate(STREAM.batch(4), settings.sampling).result()
    rollouts, score_B, sampled = grpo.with_spread(settings, STREAM, first, roles)
    assert sampled == batches == len(roles.policy.asked) == roles.reward.count
    # Attempt a of step 4 has the prompts with numbers 2a and 2a + 1 and rows of the data of its own.
    assert [(step, numbers) for step, numbers, _ in roles.policy.asked] == [
        (4, [2 * a, 2 * a + 1]) for a in range(batches)
    ]
    order = [row + 1 for a in range(batches) for row in STREAM.order.indices(3 * 3 + a + 1).tolist()]
    # Responses, log-probabilities, prompts and scores of the same groups.
    assert rollouts.sequences.responses.lists() == [[100 + 2 * n + k] * (n + 1) for n in kept for k in (0, 1)]
    assert torch.where(rollouts.mask_BT, -rollouts.logprob_BT, 0).sum(1).tolist() == [
        (100 + 2 * n + k) * (n + 1) for n in kept for k in (0, 1)
    ]
    prompts = rollouts.sequences.prompts
    assert [prompts.row(int(p)).tolist() for p in rollouts.sequences.prompt_B[::2]] == [[order[n]] for n in kept]
    assert rollouts.sequences.prompt_B.tolist() == [p for p in range(len(kept)) for _ in (0, 1)]
    assert score_B.tolist() == [s for n in kept for s in scores.get(n, (1.0, 1.0))]
    assert (rollouts.step, rollouts.temperature) == (4, 0.7)


def test_what_was_kept_is_learned_from_like_any_other_batch():
    settings = config(2, prompts_per_step=2, max_attempts=2, normalize=False)
    roles: Any = Cast({0: (3.0, 1.0), 3: (0.0, 4.0)})
    first = roles.policy.generate(STREAM.batch(1), settings.sampling).result()
    rollouts, score_B, _ = grpo.with_spread(settings, STREAM, first, roles)
    seen = ScoredRollouts(rollouts, score_B, None, rollouts.logprob_BT, rollouts.logprob_BT)
    batch, statistics = learn(settings, seen)
    assert advantages(batch) == [1, -1, -2, 2]
    assert statistics["groups_without_spread"] == 0
    assert statistics["response_tokens"] == 2.5  # 1 1 4 4
