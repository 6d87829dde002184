"""REINFORCE++, its variant with a baseline, and ReMax by hand.

gamma = 1, kl_coef = 1/2 with k1, log pi = -1 at every token. Two prompts of two responses:

    prompt  score  x = log pi - log pi_ref   r                return to go  mean score  return above it
    0         2    1 -1                      -0.5  0.5 + 2        2  2.5        3          -1  -0.5
    0         4    2                         -1 + 4               3             3           0
    1         1    0 0 2                     0  0  -1 + 1         0  0  0       0           0  0  0
    1        -1    -2                        1 - 1                0             0           0
"""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch

from align.algorithms import _policy_loss, _rewards, reinforce
from align.algorithms._rollout import ScoredRollouts
from align.config import CheckpointRewardConfig, PolicyLossConfig, RewardShapingConfig, SamplingConfig
from align.roles import CompletedFuture
from align.types import Batch, Packed, Prompts, Rollouts, Sequences

NAN = math.nan
X, SCORE = [[1, -1], [2], [0, 0, 2], [-2]], [2.0, 4.0, 1.0, -1.0]
NONE = [[2, 2.5, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
GROUP = [[-1, -0.5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]  # of prompt 1: 1 - 0 - 1 and -1 - 0 + 1


def config(K: int = 2, **values: Any) -> reinforce.Config:
    given = {"kl_coef": 0.5, "whiten": False, "sampling": SamplingConfig(num_samples=K, max_tokens=4)}
    return reinforce.Config(**{"reward": CheckpointRewardConfig(path="r"), **given, **values})


def learn(
    config: reinforce.Config, seen: ScoredRollouts, greedy: torch.Tensor | None = None
) -> tuple[Batch, dict[str, float]]:
    return reinforce.make_batch(config, seen, _rewards.shape_rewards(config, seen, {}), greedy)


def returns(config: reinforce.Config, seen: ScoredRollouts, greedy: torch.Tensor | None = None) -> list[list[float]]:
    return learn(config, seen, greedy)[0].columns["advantage_BT"].tolist()


# Returns and baselines


@pytest.mark.parametrize("padding", [0.0, NAN])
def test_returns_to_go_with_kl_at_each_token_by_hand(seen, padding: float):
    batch, found = learn(config(), seen(X, SCORE, K=2, padding=padding))
    assert batch.columns["advantage_BT"].tolist() == NONE
    assert batch.columns["learnable_B"].tolist() == [True] * 4
    assert found["learnable"] == 1


def test_a_later_reward_is_discounted(seen):
    # r = -0.5, 2.5: -0.5 + 2.5 / 2. A response of three: 0 + (0 + (-1 + 1) / 2) / 2.
    found = returns(config(gamma=0.5), seen(X, [2.0, 4.0, 5.0, -1.0], K=2))
    assert found == [[0.75, 2.5, 0], [3, 0, 0], [1, 2, 4], [0, 0, 0]]  # -1 + 5 = 4 on the last


def test_kl_in_the_loss_is_not_in_the_returns(seen):
    found = returns(config(kl_placement="loss", kl_estimator="k2"), seen(X, SCORE, K=2))
    assert found == [[2, 2, 0], [4, 0, 0], [1, 1, 1], [-1, 0, 0]]


def test_the_mean_of_the_group_by_hand(seen):
    # Of scores, before KL: 3 and 0. What is left of a response is its score above the mean, less its own KL to go.
    assert returns(config(baseline="group"), seen(X, SCORE, K=2)) == GROUP


def test_without_a_sibling_there_is_no_group_baseline(seen):
    finished = [True, False, True, True]
    batch, _ = learn(config(baseline="group", truncated="mask"), seen(X, SCORE, finished, K=2))
    assert batch.columns["learnable_B"].tolist() == [False, False, True, True]
    alone, _ = learn(config(baseline="none", truncated="mask"), seen(X, SCORE, finished, K=2))
    assert alone.columns["learnable_B"].tolist() == finished


def test_the_greedy_baseline_by_hand(seen):
    # 2 - 1, 4 - 1, 1 + 2, -1 + 2 before KL.
    found = returns(config(baseline="greedy"), seen(X, SCORE, K=2), torch.tensor([1.0, 1.0, -2.0, -2.0]))
    assert found == [[1, 1.5, 0], [2, 0, 0], [2, 2, 2], [2, 0, 0]]


def test_a_greedy_response_without_a_score_takes_its_prompt_out(seen):
    settings = config(baseline="greedy", whiten=True)
    batch, found = learn(settings, seen(X, SCORE, K=2), torch.tensor([NAN, NAN, -2.0, -2.0]))
    assert batch.columns["learnable_B"].tolist() == [False, False, True, True]
    assert batch.columns["advantage_BT"].isfinite().all()
    assert found["learnable"] == 0.5
    logprob = torch.full((4, 3), -1.0, requires_grad=True)
    outputs = {"mask_BT": batch.sequences.mask_BT, "entropy_BT": torch.zeros(4, 3)}
    plain, _ = learn(config(baseline="greedy"), seen(X, SCORE, K=2), torch.tensor([NAN, NAN, -2.0, -2.0]))
    loss = _policy_loss.policy_loss(settings, 0.0)(logprob_BT=logprob, **outputs, **plain.columns)
    loss.sum.backward()
    assert (loss.sum.item(), loss.count.item()) == (-8, 4)
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [[0] * 3, [0] * 3, [-2] * 3, [-2, 0, 0]]


# Whitening


@pytest.mark.parametrize(("baseline", "plain"), [("none", NONE), ("group", GROUP)])
def test_whitening_by_hand(seen, baseline, plain: list[list[float]]):
    shown = seen(X, SCORE, K=2)
    found = learn(config(baseline=baseline, whiten=True), shown)[0].columns["advantage_BT"]
    every = [a for row, x in zip(plain, X, strict=True) for a in row[: len(x)]]  # 7 tokens, not 12 columns
    assert len(every) == 7
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    expected = [
        [(a - mean) / std if t < len(x) else 0 for t, a in enumerate(row)] for row, x in zip(plain, X, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_whitening_does_not_see_what_is_left_out(seen):
    settings = config(whiten=True, truncated="mask")
    batch, _ = learn(settings, seen(X, [2.0, 4.0, 99.0, -1.0], [True, True, False, True], K=2))
    every = [2.0, 2.5, 3.0, 0.0]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    got = batch.columns["advantage_BT"]
    assert [*got[0, :2].tolist(), got[1, 0].item(), got[3, 0].item()] == pytest.approx(
        [(a - mean) / std for a in every]
    )
    assert got[2].tolist() == [0, 0, 0]


def test_a_failed_score_is_in_no_mean(seen):
    settings = config(whiten=True)
    batch, found = learn(settings, seen([*X, [3], [1, 1]], [*SCORE, NAN, 50.0], K=2))
    alone, _ = learn(settings, seen(X, SCORE, K=2))
    assert batch.columns["learnable_B"].tolist() == [True] * 4 + [False] * 2
    assert batch.columns["advantage_BT"][:4].equal(alone.columns["advantage_BT"])
    assert batch.columns["advantage_BT"][4:].eq(0).all()
    assert found["failed_scores"] == 1


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_against_the_paper_in_a_loop(seen, baseline):
    chance = random.Random(baseline)
    lengths = [chance.randrange(1, 7) for _ in range(12)]
    x = [[chance.gauss(0, 1) for _ in range(n)] for n in lengths]
    score = [chance.gauss(0, 2) for _ in lengths]
    settings = config(3, baseline=baseline, whiten=True, gamma=0.9, kl_coef=0.3)
    shown = seen(x, score, K=3, padding=NAN)
    expected = []
    for i, row in enumerate(x):
        above = score[i] - (statistics.fmean(score[i // 3 * 3 : i // 3 * 3 + 3]) if baseline == "group" else 0)
        r = [-0.3 * a + (above if t == len(row) - 1 else 0) for t, a in enumerate(row)]
        expected.append([sum(0.9 ** (u - t) * r[u] for u in range(t, len(row))) for t in range(len(row))])
    every = [a for row in expected for a in row]
    mean, std = statistics.fmean(every), math.sqrt(statistics.pvariance(every) + 1e-8)
    found = learn(settings, shown)[0].columns["advantage_BT"]
    for i, row in enumerate(expected):
        assert found[i, : len(row)].tolist() == pytest.approx([(a - mean) / std for a in row], abs=2e-5)


# ReMax's greedy response


class Sampler:
    """Answers prompt n of a step with n + 1 tokens, unfinished where n is 2, and notes how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, SamplingConfig]] = []

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> CompletedFuture[Rollouts]:
        self.asked.append((prompts.step, sampling))
        rows = Packed.from_lists([[7] * (n + 1) for n in prompts.index_P.tolist()])
        logprob_BT = torch.zeros(rows.mask().shape)
        sequences = Sequences(prompts.tokens, rows, torch.arange(len(prompts)))
        return CompletedFuture(Rollouts(sequences, logprob_BT, logprob_BT, prompts.index_P != 2, 1.0, prompts.step))


class Cast:
    def __init__(self, scores: list[float]):
        self.policy, self.reward, self.scores = Sampler(), self, scores

    def score(self, sequences: Sequences) -> CompletedFuture[torch.Tensor]:
        return CompletedFuture(torch.tensor(self.scores))


PROMPTS = Prompts(Packed.from_lists([[1], [2], [3]]), torch.arange(3), (0,), 6)


def test_the_greedy_response_is_one_for_all_samples_of_its_prompt():
    settings = config(baseline="greedy", sampling=SamplingConfig(num_samples=2, max_tokens=4, top_p=0.9))
    roles: Any = Cast([1.0, -2.0, 5.0])
    assert reinforce.greedy_rewards(settings, PROMPTS, roles, {}).tolist() == [1, 1, -2, -2, 5, 5]
    ((step, sampling),) = roles.policy.asked
    assert (step, sampling.num_samples, sampling.temperature, sampling.max_tokens) == (6, 1, 0, 4)


def test_the_greedy_score_is_shaped_like_those_of_the_samples(seen):
    # (score - 1) / 2 * 4 within 6, less overlong over the last 2 of 4 tokens, less 3 where no end came.
    settings = config(
        baseline="greedy",
        shaping=RewardShapingConfig(mean=1.0, std=2.0, scale=4.0, clip=6.0, overlong_buffer=2),
        truncated="penalize",
        truncation_penalty=3.0,
    )
    greedy = reinforce.greedy_rewards(settings, PROMPTS, Cast([2.0, -7.0, 3.0]), {})  # type: ignore[arg-type]
    # 2; -16 limited to -6; 4 - 1/2 for the third of 3 tokens - 3
    assert greedy.tolist() == [2, 2, -6, -6, 0.5, 0.5]
    # A sample with the same answer and score as the greedy one is no better than it.
    shown = seen(
        [[0], [0], [0, 0], [0, 0], [0] * 3, [0] * 3], [2.0, 2.0, -7.0, -7.0, 3.0, 3.0], [True] * 4 + [False] * 2, K=2
    )
    assert returns(settings, shown, greedy) == [[0.0] * 3] * 6


def test_the_greedy_score_takes_the_moments_of_the_samples_and_adds_nothing_to_them(seen):
    settings, state = config(baseline="greedy", shaping=RewardShapingConfig(running=True)), {}
    _rewards.shape_rewards(settings, seen([[0], [0]], [1.0, 5.0], K=2), state)  # mean 3, std 2
    before = dict(state)
    greedy = reinforce.greedy_rewards(settings, PROMPTS, Cast([3.0, 5.0, 9.0]), state)  # type: ignore[arg-type]
    assert greedy.tolist() == [0, 0, 1, 1, 3, 3]
    assert state == before


def test_remax_as_its_paper_has_it(seen):
    # -(r - r_greedy) times the log-probability of a whole response, mean over responses.
    settings = config(
        baseline="greedy", kl_coef=0.0, loss=PolicyLossConfig(kind="reinforce", aggregation="sequence_mean")
    )
    shown = seen(X, SCORE, K=2)
    batch, _ = learn(settings, shown, torch.tensor([1.0, 1.0, -2.0, -2.0]))
    loss = _policy_loss.policy_loss(settings, 0.0)(
        logprob_BT=shown.rollouts.logprob_BT,
        mask_BT=shown.rollouts.mask_BT,
        entropy_BT=torch.zeros(4, 3),
        **batch.columns,
    )
    assert loss.sum.item() == 1 * 2 + 3 * 1 + 3 * 3 + 1 * 1
    assert loss.count.item() == 4
