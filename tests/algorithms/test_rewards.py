"""From scores to rewards: the order of the steps, what is carried from step to step, failed scores, and KL's place."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from align.algorithms import _rewards, grpo, rloo
from align.config import CheckpointRewardConfig, PolicyGradientConfig, RewardShapingConfig, SamplingConfig

NAN, INF = math.nan, math.inf


def config(K: int = 2, **values: Any) -> PolicyGradientConfig:
    return PolicyGradientConfig(
        reward=CheckpointRewardConfig(path="r"),
        **{"sampling": SamplingConfig(num_samples=K, max_tokens=8), "truncated": "keep", **values},
    )


# Order

SHAPING = RewardShapingConfig(mean=-3.0, std=4.0, scale=3.0, clip=8.0, overlong_buffer=4, overlong_penalty=2.0)
STEPS = {
    "normalize": lambda r: (r + 3) / 4,
    "scale": lambda r: r * 3,
    "clip": lambda r: max(-8.0, min(r, 8.0)),
    "overlong": lambda r: r - 1.5,  # 7 tokens of 8 with a buffer of 4: 3/4 of the penalty of 2
    "truncated": lambda r: r - 1,
}


def test_the_order_of_shaping_by_hand(seen):
    settings = config(1, shaping=SHAPING, truncated="penalize", truncation_penalty=1.0)
    shown = seen([[0] * 7], [9.0], [False])
    # (9 + 3) / 4 = 3, times 3 = 9, within 8, less 1.5 = 6.5, less 1 = 5.5
    assert _rewards.shape_rewards(settings, shown, {}).reward_B.tolist() == [5.5]


def test_any_two_steps_exchanged_give_another_number():
    # Of the 120 orders only this one, and the one with the two subtractions at the end exchanged, give 5.5.
    results = {}
    for order in permutations(STEPS):
        reward = 9.0
        for name in order:
            reward = STEPS[name](reward)
        results[order] = reward
    same = [order[:3] for order, reward in results.items() if math.isclose(reward, 5.5)]
    assert same == [("normalize", "scale", "clip")] * 2


@pytest.mark.parametrize(
    ("length", "finished", "treatment", "reward"),
    [
        (7, True, "penalize", 6.5),  # no penalty for an end
        (4, False, "penalize", 7.0),  # no overlong penalty before the buffer
        (8, True, "keep", 6.0),  # all of it at the limit
        (7, False, "keep", 6.5),
        (7, False, "mask", 0.0),  # takes part in nothing
    ],
)
def test_each_step_acts_where_it_should(seen, length: int, finished: bool, treatment, reward: float):
    settings = config(1, shaping=SHAPING, truncated=treatment, truncation_penalty=1.0)
    judged = _rewards.shape_rewards(settings, seen([[0] * length], [9.0], [finished]), {})
    assert judged.reward_B.tolist() == [reward]
    assert judged.usable_B.tolist() == [finished or treatment != "mask"]


def test_kl_comes_after_all_of_them(seen):
    # 9 before the clip, 8 after it. A KL of 4 at a coefficient of 1/2 leaves 6; taken off before, it would leave 7.
    values = {
        "shaping": replace(SHAPING, overlong_buffer=0),
        "kl_coef": 0.5,
        "kl_estimator": "k1",
        "truncated": "keep",
    }
    settings = rloo.Config(
        reward=CheckpointRewardConfig(path="r"),
        sampling=SamplingConfig(num_samples=2, max_tokens=8),
        kl_reduction="sum",
        **values,
    )
    shown = seen([[2, 2], [0]], [9.0, 9.0], K=2)
    judged = _rewards.shape_rewards(settings, shown, {})
    assert judged.reward_B.tolist() == [8, 8]
    batch, _ = rloo.make_batch(settings, shown, judged)
    assert batch.columns["advantage_BT"].tolist() == [[-2, -2], [2, 0]]  # 6 against 8


def test_a_clip_is_of_the_size_of_the_scaled_score(seen):
    settings = config(shaping=RewardShapingConfig(scale=2.0, clip=3.0))
    assert _rewards.shape_rewards(settings, seen([[0]] * 4, [-5.0, 1.0, 1.5, 9.0], K=2), {}).reward_B.tolist() == [
        -3,
        2,
        3,
        3,
    ]


# Running moments


def test_running_moments_by_hand_over_two_steps(seen):
    # 1 and 3: mean 2, squares 2, std 1. With 5 and 7 as well: mean 4, squares 20 of 4 numbers, std sqrt 5.
    settings, state = config(shaping=RewardShapingConfig(running=True)), {}
    first = _rewards.shape_rewards(settings, seen([[0], [0]], [1.0, 3.0], K=2), state)
    assert first.reward_B.tolist() == [-1, 1]
    assert {name: state[f"reward/{name}"] for name in ("count", "mean", "m2")} == {"count": 2, "mean": 2, "m2": 2}
    state = json.loads(json.dumps(state))  # by way of a checkpoint
    second = _rewards.shape_rewards(settings, seen([[0], [0]], [5.0, 7.0], K=2), state)
    assert second.reward_B.tolist() == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])
    assert {name: state[f"reward/{name}"] for name in ("count", "mean", "m2")} == {"count": 4, "mean": 4, "m2": 20}


def test_running_moments_do_not_see_failed_scores(seen):
    settings, state = config(shaping=RewardShapingConfig(running=True)), {}
    judged = _rewards.shape_rewards(settings, seen([[0]] * 6, [1.0, NAN, -INF, INF, 3.0, 3.0], K=2), state)
    # 1, 3, 3: the 1 counts, though its sibling took it out of the step.
    mean, std = 7 / 3, math.sqrt(8 / 9)
    assert state["reward/count"] == 3
    assert judged.reward_B.tolist() == pytest.approx([0, 0, 0, 0, *[(3 - mean) / std] * 2])


def test_without_running_nothing_is_remembered(seen):
    state: dict[str, float] = {}
    _rewards.shape_rewards(config(), seen([[0], [0]], [1.0, 3.0], K=2), state)
    assert not any(name.startswith("reward/") for name in state)


# Failed scores


@pytest.mark.parametrize("failed", [NAN, INF, -INF])
def test_a_failed_score_drops_its_whole_group_and_is_counted(seen, failed: float):
    x = [[0]] * 6
    settings = config(3, shaping=RewardShapingConfig(clip=100.0))  # under which an infinite score would become 100
    judged = _rewards.shape_rewards(settings, seen(x, [1.0, failed, 5.0, 2.0, 3.0, 7.0], K=3), {})
    assert judged.usable_B.tolist() == [False] * 3 + [True] * 3
    assert judged.reward_B.tolist() == [0, 0, 0, 2, 3, 7]
    assert judged.statistics["failed_scores"] == 1
    assert judged.statistics["usable"] == 0.5
    assert judged.statistics["reward"] == pytest.approx(18 / 5)  # of the scores there are: 1 5 2 3 7
    assert judged.statistics["shaped_reward"] == 4  # of those that count: 2 3 7
    assert all(math.isfinite(value) for value in judged.statistics.values())


@pytest.mark.parametrize("algorithm", [rloo, grpo])
def test_a_failed_score_reaches_no_advantage(seen, algorithm: Any):
    settings = algorithm.Config(
        reward=CheckpointRewardConfig(path="r"), sampling=SamplingConfig(num_samples=3, max_tokens=8)
    )
    x, rest = [[0.5], [0.25, -1], [0]], [2.0, 3.0, 7.0]
    with_failed, without = seen(x * 2, [1.0, NAN, 5.0, *rest], K=3), seen(x, rest, K=3)
    batch, statistics = algorithm.make_batch(settings, with_failed, _rewards.shape_rewards(settings, with_failed, {}))
    alone, _ = algorithm.make_batch(settings, without, _rewards.shape_rewards(settings, without, {}))
    assert batch.columns["advantage_BT"][:3].eq(0).all()
    assert batch.columns["advantage_BT"][3:].equal(alone.columns["advantage_BT"])
    assert batch.columns["learnable_B"].tolist() == [False] * 3 + [True] * 3
    assert statistics["learnable"] == 0.5


def test_no_score_at_all(seen):
    judged = _rewards.shape_rewards(
        config(shaping=RewardShapingConfig(running=True)), seen([[0], [0]], [NAN, NAN], K=2), {}
    )
    assert judged.reward_B.tolist() == [0, 0]
    assert not judged.usable_B.any()
    assert (judged.statistics["failed_scores"], judged.statistics["shaped_reward"]) == (2, 0)


def test_a_second_opinion_is_reported_and_not_learned_from(seen):
    # Of the pairs (1, 3) and (4, 2) the second judge orders one the other way round.
    shown = seen([[0]] * 4, [1.0, 3.0, 4.0, 2.0], K=2, second=[0.0, 8.0, 1.0, 3.0])
    judged = _rewards.shape_rewards(config(), shown, {})
    assert judged.reward_B.tolist() == [1, 3, 4, 2]
    assert (judged.statistics["eval_score"], judged.statistics["disagreement"]) == (3, 0.5)
    assert "eval_score" not in _rewards.shape_rewards(config(), seen([[0]] * 2, [1.0, 3.0], K=2), {}).statistics


def test_gains_are_told_against_the_first_batch(seen):
    state: dict[str, float] = {}
    first = _rewards.shape_rewards(config(), seen([[0], [0, 0, 0]], [1.0, 3.0], K=2), state).statistics
    second = _rewards.shape_rewards(config(), seen([[4] * 4, [1] * 4], [5.0, 6.0], K=2), state).statistics
    assert (first["length_ratio"], first["gain_per_root_kl"]) == (1, 0)
    assert second["length_ratio"] == 2  # 4 tokens after 2
    assert second["gain_per_root_kl"] == pytest.approx((5.5 - 2) / math.sqrt(10))  # KL (16 + 4) / 2


# KL


def test_the_controller_by_hand_over_three_steps_and_a_nan(seen):
    # Target 4, horizon 10, 2 responses: the coefficient moves by a factor 1 + clip(kl / 4 - 1, -1/5, 1/5) / 5.
    settings = config(1, kl_coef=0.1, kl_target=4.0, kl_horizon=10, prompts_per_step=2, kl_estimator="abs")
    state: dict[str, float] = {}
    for x, used, following in (
        ([[8, 2], [6]], 0.1, 0.104),  # KL 8, limited to 1/5: 0.1 * 1.04
        ([[9.5, -0.5], [-2]], 0.104, 0.1014),  # signed sums 9 and -2, KL 3.5: 0.104 * (1 - 1/8 / 5)
        ([[0], [0]], 0.1014, 0.097344),  # limited to -1/5: 0.1014 * 0.96
        ([[NAN], [100]], 0.097344, 0.097344),  # what is not a number moves nothing
        ([[INF], [1]], 0.097344, 0.097344),
        ([[4], [4]], 0.097344, 0.097344),  # on target
    ):
        judged = _rewards.shape_rewards(settings, seen(x, [0.0, 0.0]), state)
        assert judged.kl_in_reward == judged.statistics["kl_coef"] == pytest.approx(used, rel=1e-9)
        assert state["kl_coef"] == pytest.approx(following, rel=1e-9)


def test_without_a_target_the_coefficient_stays(seen):
    state: dict[str, float] = {}
    for _ in range(2):
        assert _rewards.shape_rewards(config(kl_coef=0.3), seen([[8], [8]], [0.0, 1.0], K=2), state).kl_in_reward == 0.3


@pytest.mark.parametrize(("placement", "places"), [("reward", (0.25, 0.0)), ("loss", (0.0, 0.25))])
def test_kl_is_in_one_place(seen, placement, places: tuple[float, float]):
    settings = config(kl_coef=0.25, kl_placement=placement, kl_estimator="k2")
    judged = _rewards.shape_rewards(settings, seen([[2, -4], [1]], [1.0, 3.0], K=2), {})
    assert (judged.kl_in_reward, judged.kl_in_loss) == places
    assert judged.reward_B.tolist() == [1, 3]  # the algorithm takes KL off itself
    assert judged.kl_BT[0].tolist() == [2, 8]  # x^2 / 2
    assert judged.kl_BT[1, 0] == 0.5
    assert judged.statistics["kl"] == -0.5  # signed, whatever the estimator: (2 - 4 + 1) / 2


def test_the_coefficient_of_the_loss_is_the_steered_one(seen):
    settings = config(
        1, kl_coef=0.1, kl_target=4.0, kl_horizon=10, prompts_per_step=2, kl_placement="loss", kl_estimator="k3"
    )
    state: dict[str, float] = {}
    assert _rewards.shape_rewards(settings, seen([[8], [8]], [0.0, 0.0]), state).kl_in_loss == 0.1
    assert _rewards.shape_rewards(settings, seen([[8], [8]], [0.0, 0.0]), state).kl_in_loss == pytest.approx(0.104)


def test_the_mismatch_of_a_rollout_by_older_weights_by_hand(seen):
    # x = log pi_rollout - log pi_now = log 2 on two tokens of three: k3 = 1/2 - 1 + log 2.
    logprob = [[-1.0, -1.0], [-2.0]]
    old = [[-1 - math.log(2), -1.0], [-2 - math.log(2)]]
    shown = seen([[0, 0], [0]], [1.0, 2.0], K=2, logprob=logprob, old=old, padding=NAN)
    judged = _rewards.shape_rewards(config(kl_estimator="k1"), shown, {})
    assert judged.statistics["mismatch_kl"] == pytest.approx(2 / 3 * (math.log(2) - 0.5), rel=1e-6)
    assert judged.statistics["mismatch_share"] == pytest.approx(2 / 3)
    # KL to the reference is that of the policy that sampled, which here is the reference itself.
    assert judged.kl_BT[shown.rollouts.mask_BT].tolist() == [0, 0, 0]
    assert judged.statistics["kl"] == 0
