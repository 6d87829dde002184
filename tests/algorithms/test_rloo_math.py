"""RLOO from scores to gradient on a batch worked by hand, and TRL's trainer on the same numbers.

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
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor
from trl import RLOOTrainer

from align.algorithms import rloo
from align.sections import Sampling
from align.types import Packed, Rollouts, Sequences

NAN = math.nan
SCORE = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0, -1.0])
X = [[1], [1, -3], [1, 1, 1, 1], [2, 2], [-1, -1, -1, -1], [0, 0, 0, 4]]
FINISHED = [True, True, False, True, False, False]


def config(**values: Any) -> rloo.Config:
    values = {"kl_coef": 0.5, "unfinished_penalty": 2.0, "sampling": Sampling(num_samples=3, max_tokens=4), **values}
    return rloo.Config(**values)


def rollouts_and_reference(
    x: list[list[float]], finished: list[bool], K: int, padding: float = 0.0
) -> tuple[Rollouts, Tensor]:
    """Rollouts whose tokens all have log-probability -1, and log pi_ref = -1 - x; all prompts are the same text."""
    num_prompts = len(x) // K
    sequences = Sequences(
        Packed.from_lists([[5, 6]] * num_prompts),
        Packed.from_lists([[7] * len(row) for row in x]),
        torch.arange(num_prompts).repeat_interleave(K),
    )
    longest = max(map(len, x))
    logprob = torch.tensor([[-1.0] * len(row) + [padding] * (longest - len(row)) for row in x])
    reference = torch.tensor([[-1.0 - a for a in row] + [padding] * (longest - len(row)) for row in x])
    return Rollouts(sequences, logprob, logprob, torch.tensor(finished), 0.7, 1), reference


def learn(config: rloo.Config, padding: float = 0.0) -> tuple[Any, dict[str, float], Rollouts]:
    rollouts, reference = rollouts_and_reference(X, FINISHED, 3, padding)
    batch, statistics = rloo.learn_from(config, rollouts, SCORE, reference)
    return batch, statistics, rollouts


BY_HAND = [
    # exclude leaves the first two of prompt 0 and one of prompt 1, which has nothing to be compared with.
    ("exclude", "abs", "sum", [0.5, -0.5, 0, 0, 0, 0], -0.5, 3),  # -(0.5 (-1) - 0.5 (-2)), 1 + 2 tokens
    ("exclude", "abs", "mean", [-0.5, 0.5, 0, 0, 0, 0], 0.5, 3),
    ("exclude", "k1", "sum", [-2.5, 2.5, 0, 0, 0, 0], 2.5, 3),
    # 0.5 - (0 + 4)/2, 0 - (0.5 + 4)/2, 4 - (0.5 + 0)/2; -2 - (2 - 3)/2, 2 - (-2 - 3)/2, -3 - (-2 + 2)/2
    ("keep", "abs", "sum", [-1.5, -2.25, 3.75, -1.5, 4.5, -3], 12, 17),  # -(1.5 + 4.5 - 15 + 3 - 18 + 12)
    ("keep", "abs", "mean", [-2.75, -2, 4.75, -2, 4.75, -2.75], 16.25, 17),
    ("keep", "k1", "sum", [-3, 0.75, 2.25, -3.5, 8.5, -5], 14.5, 17),
    # Unfinished ones lose 2: R = 0.5 0 2, -2 0 -5 for sums and 0.5 1 3.5, -1 1.5 -3.5 for means.
    ("penalise", "abs", "sum", [-0.5, -1.25, 1.75, 0.5, 3.5, -4], 3, 17),  # -(0.5 + 2.5 - 7 - 1 - 14 + 16)
    ("penalise", "abs", "mean", [-1.75, -1, 2.75, 0, 3.75, -3.75], 7.25, 17),
]


@pytest.mark.parametrize("padding", [0.0, NAN])
@pytest.mark.parametrize(("unfinished", "estimator", "reduction", "advantage", "total", "count"), BY_HAND)
def test_by_hand(unfinished, estimator, reduction, advantage: list[float], total: float, count: int, padding: float):
    batch, _, rollouts = learn(config(unfinished=unfinished, kl_estimator=estimator, kl_reduction=reduction), padding)
    assert batch.columns["advantage_B"].tolist() == advantage
    learnable = [True, True, False, False, False, False] if unfinished == "exclude" else [True] * 6
    assert batch.columns["learnable_B"].tolist() == learnable
    assert batch.temperature == 0.7  # the policy learns at the temperature it sampled at

    logprob = rollouts.logprob_BT.clone().requires_grad_()
    entropy = torch.where(rollouts.mask_BT, 2.0, padding)
    loss = rloo.loss(logprob_BT=logprob, entropy_BT=entropy, mask_BT=rollouts.mask_BT, **batch.columns)
    assert (loss.sum.item(), loss.count.item()) == (total, count)
    assert [value.item() for value in loss.metrics["entropy"]] == [34, 17]  # of all responses
    loss.sum.backward()
    assert logprob.grad is not None
    expected = [
        [-a if ok else 0] * len(x) + [0] * (4 - len(x)) for a, ok, x in zip(advantage, learnable, X, strict=True)
    ]
    assert logprob.grad.tolist() == expected


def test_statistics_by_hand():
    _, statistics, _ = learn(config(kl_estimator="abs", kl_reduction="sum"), padding=NAN)
    assert statistics == pytest.approx(
        {
            "reward": 2.0,  # 12 / 6
            "reward_std": math.sqrt(34 / 5),  # 1 + 0 + 16 + 4 + 4 + 9
            "shaped_reward": 0.25,  # (0.5 + 0 + 4 - 2 + 2 - 3) / 6
            "kl": 7 / 6,  # sum x: 1 - 2 + 4 + 4 - 4 + 4, whatever estimator the reward takes
            "kl_limited_tokens": 0.0,
            "response_tokens": 17 / 6,
            "unfinished": 0.5,
            "learnable": 2 / 6,
        }
    )


def test_two_samples_by_hand():
    # R = 3 - 0.5 * 2 = 2 and 1 - 0.5 * (-4) = 3; each is the other's baseline.
    rollouts, reference = rollouts_and_reference([[2], [-2, -2]], [True, True], 2)
    two = config(sampling=Sampling(num_samples=2), kl_estimator="k1", kl_reduction="sum")
    batch, _ = rloo.learn_from(two, rollouts, torch.tensor([3.0, 1.0]), reference)
    assert batch.columns["advantage_B"].tolist() == [-1.0, 1.0]


def test_four_samples_one_unfinished_by_hand():
    # R = 4, 1, 1 without the cut-off one: 4 - 1, 1 - 5/2, 1 - 5/2; its score of 100 is seen by nobody.
    rollouts, reference = rollouts_and_reference([[0], [0, 0], [0] * 4, [0]], [True, True, False, True], 4)
    four = config(sampling=Sampling(num_samples=4))
    batch, statistics = rloo.learn_from(four, rollouts, torch.tensor([4.0, 1.0, 100.0, 1.0]), reference)
    assert batch.columns["advantage_B"].tolist() == [3.0, -1.5, 0.0, -1.5]
    assert batch.columns["learnable_B"].tolist() == [True, True, False, True]
    assert statistics["learnable"] == 0.75


def test_tokens_beyond_the_limit_are_reported():
    rollouts, reference = rollouts_and_reference([[25, 0], [-30]], [True, True], 2)
    _, statistics = rloo.learn_from(config(sampling=Sampling(num_samples=2)), rollouts, torch.zeros(2), reference)
    assert statistics["kl_limited_tokens"] == 2


@pytest.mark.parametrize("unfinished", ["exclude", "keep"])
def test_parts_of_a_batch_add_up_in_any_order(unfinished):
    batch, _, rollouts = learn(config(unfinished=unfinished))
    columns = batch.columns | {"logprob_BT": rollouts.logprob_BT, "entropy_BT": torch.ones(6, 4)}
    whole = rloo.loss(mask_BT=rollouts.mask_BT, **columns)
    total, count = 0.0, 0
    for rows in ([4], [0, 3], [5, 2, 1]):
        part = type(batch)(batch.sequences, columns, 1, 0.7).select(torch.tensor(rows))
        loss = rloo.loss(mask_BT=part.sequences.mask_BT, **part.columns)
        total, count = total + loss.sum.item(), count + loss.count.item()
    assert (total, count) == (whole.sum.item(), whole.count.item())


def test_a_step_raises_what_was_better_than_its_siblings():
    # One token out of three; responses 0, 1, 2 with rewards 1, 0, -1 have advantages 1.5, 0, -1.5.
    logits = torch.zeros(3, requires_grad=True)
    rollouts, reference = rollouts_and_reference([[0], [0], [0]], [True] * 3, 3)
    batch, _ = rloo.learn_from(config(), rollouts, torch.tensor([1.0, 0.0, -1.0]), reference)
    loss = rloo.loss(
        logprob_BT=logits.log_softmax(-1)[:, None],
        entropy_BT=torch.zeros(3, 1),
        mask_BT=rollouts.mask_BT,
        **batch.columns,
    )
    (loss.sum / loss.count).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, 0.0, 0.5]))


# TRL


def trl_advantages(
    score: Tensor, logprob: Tensor, reference: Tensor, lengths: list[int], K: int, beta: float
) -> Tensor:
    """What TRL's trainer makes of given scores and log-probabilities; all but its arithmetic is a stand-in."""
    PartialState()
    completions = [[7] * length for length in lengths]
    policy = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    frozen = object()
    trainer = SimpleNamespace(_pending_extra_logs={}, _pending_metrics={})
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    trainer.model, trainer.ref_model, trainer.beta = policy, frozen, beta
    trainer.args = SimpleNamespace(
        per_device_train_batch_size=len(lengths),
        per_device_eval_batch_size=len(lengths),
        gradient_checkpointing_kwargs=None,
    )
    trainer._tokenizer = SimpleNamespace(pad_token_id=0)
    trainer.eos_token_ids, trainer.pad_to_multiple_of, trainer.mask_truncated_completions = [7], None, False
    trainer.num_generations, trainer.num_generations_eval = K, K
    trainer.reward_clip_range, trainer.normalize_advantages = None, False
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["score"]
    trainer._generate = lambda prompts: ([[5, 6] for _ in prompts], completions, completions)
    trainer._calculate_rewards = lambda *_: score[:, None]
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        (logprob if model is policy else reference),
        None,
        None,
    )
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._logs = defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)}
    inputs = [{"prompt": "two plus"} for _ in lengths]
    return RLOOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]


@pytest.mark.parametrize("some_unfinished", [False, True])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_trl_computes_the_same_advantages(K: int, some_unfinished: bool):
    generator = torch.Generator().manual_seed(K)
    B, T, beta = 5 * K, 6, 0.07
    lengths = torch.randint(1, T + 1, (B,), generator=generator).tolist()
    lengths[0] = T
    score = torch.randn(B, generator=generator) * 3
    logprob, reference = -torch.rand(B, T, generator=generator) * 4, -torch.rand(B, T, generator=generator) * 4
    finished = torch.rand(B, generator=generator) < 0.7 if some_unfinished else torch.ones(B, dtype=torch.bool)
    # A response that is excluded here has no score there.
    expected = trl_advantages(torch.where(finished, score, NAN), logprob, reference, lengths, K, beta)

    sequences = Sequences(
        Packed.from_lists([[5, 6]] * 5),
        Packed.from_lists([[7] * n for n in lengths]),
        torch.arange(5).repeat_interleave(K),
    )
    rollouts = Rollouts(sequences, logprob, logprob, finished, 1.0, 1)
    like_trl = config(kl_coef=beta, kl_estimator="k1", kl_reduction="sum", sampling=Sampling(num_samples=K))
    batch, _ = rloo.learn_from(like_trl, rollouts, score, reference)
    torch.testing.assert_close(batch.columns["advantage_B"], expected, atol=2e-6, rtol=1e-6)
    assert expected.abs().max() > 1
    assert (expected == 0).any() == some_unfinished


# Configuration


def test_the_equivalent_coefficient_in_the_other_unit():
    # 0.01 per mean token of 500 is 0.01 / 500 per summed token, and the other way round.
    long = Sampling(num_samples=4, max_tokens=500)
    (note,) = rloo.Config(kl_coef=0.01, kl_reduction="mean", sampling=long).notes()
    assert "kl_coef 0.01 on the mean" in note
    assert "equals 2e-05 on the sum" in note
    (note,) = rloo.Config(kl_coef=0.01, kl_reduction="sum", sampling=long).notes()
    assert "kl_coef 0.01 on the sum" in note
    assert "equals 5 on the mean" in note


def test_what_has_no_baseline_is_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        rloo.Config(sampling=Sampling(num_samples=1))
    with pytest.raises(ValueError, match="temperature must be positive"):
        rloo.Config(sampling=Sampling(num_samples=2, temperature=0.0))
