"""Losses of preference pairs by hand, and how online DPO and best-of-n choose their responses.

Two pairs of a preferred and a rejected response, log pi - log pi_ref from sums over tokens and from token means:

    row  response   log pi      log pi_ref  strength  gold   sum  mean
    0    preferred  -1 -1           -3         3       2.5     1    1/2
    1    rejected   -1 -1 -1        -1                 0.5    -2   -2/3      d = 3,  d of means = 7/6
    2    preferred  -2              -1         1      -1      -1    -1
    3    rejected   -1 -1           -4                 0       2     1       d = -3, d of means = -2
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from align.algorithms import _preference_loss, best_of_n, dpo, online_dpo
from align.config import (
    CheckpointRewardConfig,
    PolicyConfig,
    PreferenceLossConfig,
    ReferenceConfig,
    RunConfig,
    SamplingConfig,
)
from align.models.identity import model_fingerprint
from align.roles import CompletedFuture, Loss
from align.types import Packed, Pairs, Rollouts, Sequences

NAN, INF = math.nan, math.inf
LENGTHS, REFERENCE, STRENGTH = [2, 3, 1, 2], [-3.0, -1.0, -1.0, -4.0], [3.0, 1.0]
LOGPROB = [[-1.0, -1.0], [-1.0, -1.0, -1.0], [-2.0], [-1.0, -1.0]]
GOLD = [2.5, 0.5, -1.0, 0.0]


def pairs() -> Pairs:
    responses = Packed.from_lists([[7] * n for n in LENGTHS])
    return Pairs(
        Sequences(Packed.from_lists([[5], [6]]), responses, torch.tensor([0, 0, 1, 1])), torch.tensor(STRENGTH)
    )


def loss(how: PreferenceLossConfig, padding: float = 0.0, reference: list[float] = REFERENCE) -> tuple[Loss, Tensor]:
    logprob = torch.tensor([[*row, *[padding] * (3 - len(row))] for row in LOGPROB], requires_grad=True)
    batch = pairs().batch(reference_B=torch.tensor(reference), gold_B=torch.tensor(GOLD))
    mask_BT = batch.sequences.mask_BT
    entropy = torch.where(mask_BT, 0.5, padding)
    return _preference_loss.loss(
        logprob_BT=logprob, entropy_BT=entropy, mask_BT=mask_BT, how=how, **batch.columns
    ), logprob


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# beta = 1/2: beta d = 1.5 and -1.5; the gold differences are 2 and -1.
BY_HAND = {
    "dpo": ({}, [softplus(-1.5), softplus(1.5)]),
    "cdpo": (
        {"smoothing": 0.2},
        [0.8 * softplus(-1.5) + 0.2 * softplus(1.5), 0.8 * softplus(1.5) + 0.2 * softplus(-1.5)],
    ),
    "robust": (
        {"smoothing": 0.2},
        [(0.8 * softplus(-1.5) - 0.2 * softplus(1.5)) / 0.6, (0.8 * softplus(1.5) - 0.2 * softplus(-1.5)) / 0.6],
    ),
    "ipo": ({}, [(7 / 6 - 1) ** 2, (-2 - 1) ** 2]),  # of token means
    "ipo of sums": ({"average": False}, [(3 - 1) ** 2, (-3 - 1) ** 2]),
    "hinge": ({}, [0.0, 2.5]),  # 1 - 1.5 is below 0; 1 + 1.5
    "margin": ({}, [softplus(-(1.5 - 3)), softplus(-(-1.5 - 1))]),
    "scaled": ({}, [3 * softplus(-1.5), 1 * softplus(1.5)]),
    "rpo_sq": ({"eta": 2.0}, [(1.5 - 4) ** 2, (-1.5 + 2) ** 2]),
    "rpo_fwd_kl": (
        {"eta": 2.0},
        [bernoulli_kl(sigmoid(1.5), sigmoid(4)), bernoulli_kl(sigmoid(-1.5), sigmoid(-2))],
    ),
    "rpo_bwd_kl": (
        {"eta": 2.0},
        [bernoulli_kl(sigmoid(4), sigmoid(1.5)), bernoulli_kl(sigmoid(-2), sigmoid(-1.5))],
    ),
}


@pytest.mark.parametrize("padding", [0.0, NAN])
@pytest.mark.parametrize("name", BY_HAND)
def test_every_kind_by_hand(name: str, padding: float):
    settings, expected = BY_HAND[name]
    found, logprob = loss(PreferenceLossConfig(kind=name.split()[0], beta=0.5, **settings), padding)  # type: ignore[arg-type]
    assert found.sum.item() == pytest.approx(sum(expected), rel=1e-5)
    assert found.count.item() == 2
    assert found.others == ()
    found.sum.backward()
    assert logprob.grad is not None
    assert logprob.grad.isfinite().all()
    assert logprob.grad[~pairs().sequences.mask_BT].eq(0).all()


def test_every_kind_was_tried():
    assert {name.split()[0] for name in BY_HAND} | {"simpo"} == set(
        get_args(get_type_hints(PreferenceLossConfig)["kind"])
    )


def test_simpo_by_hand():
    # Token means of the policy alone: -1 + 1 = 0 and -2 + 1 = -1. beta d - gamma = -0.7 and -2.7.
    how = PreferenceLossConfig(kind="simpo", beta=2.0, gamma=0.7)
    absent_B = _preference_loss.reference_sums(None, pairs())
    assert absent_B.tolist() == [0] * 4
    found, logprob = loss(how, reference=absent_B.tolist())
    assert found.sum.item() == pytest.approx(softplus(0.7) + softplus(2.7), rel=1e-6)
    found.sum.backward()
    # -beta sigmoid(-z) / length at each token of the preferred response, the opposite for the rejected one.
    first, second = 2 * sigmoid(0.7), 2 * sigmoid(2.7)
    expected = [[-first / 2, -first / 2, 0], [first / 3] * 3, [-second, 0, 0], [second / 2, second / 2, 0]]
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.tensor(expected))


def test_the_gradient_of_dpo_is_that_of_sums():
    # -beta sigmoid(-beta d), the same at each token however long the response is.
    found, logprob = loss(PreferenceLossConfig(beta=0.5))
    found.sum.backward()
    first, second = 0.5 * sigmoid(-1.5), 0.5 * sigmoid(1.5)
    expected = [[-first, -first, 0], [first] * 3, [-second, 0, 0], [second, second, 0]]
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.tensor(expected))


def test_metrics_by_hand():
    # The reference is moved from the table's, so that no mean is 0: d = 2 + 2 = 4 and -1 - 2.5 = -3.5.
    metrics = loss(PreferenceLossConfig(beta=0.5), NAN, [-4.0, -1.0, -1.0, -4.5])[0].metrics
    assert {name: (total.item(), count.item()) for name, (total, count) in metrics.items()} == {
        "accuracy": (1, 2),
        "margin": (0.25, 2),  # 2 - 1.75
        "chosen_logratio": (1, 2),  # 2 - 1
        "rejected_logratio": (0.5, 2),  # -2 + 2.5
        "entropy": (4, 8),  # 1/2 at each of 8 tokens
    }


def test_a_tie_is_not_accurate():
    found, _ = loss(PreferenceLossConfig(), reference=[-2.0, -3.0, -2.0, -2.0])  # d = 0, 0
    assert found.metrics["accuracy"][0].item() == 0


def test_the_supervised_term_is_a_second_one_with_a_count_of_its_own():
    found, logprob = loss(PreferenceLossConfig(beta=0.5, sft_coef=0.3), NAN)
    assert found.sum.item() == pytest.approx(softplus(-1.5) + softplus(1.5), rel=1e-6)
    assert found.count.item() == 2
    ((total, count),) = found.others
    assert total.item() == pytest.approx(0.3 * 4)  # -log pi of the preferred tokens: 1 + 1 + 2
    assert count.item() == 3
    total.backward()
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.tensor([[-0.3, -0.3, 0], [0.0] * 3, [-0.3, 0, 0], [0.0] * 3]))


def test_no_pairs():
    none = torch.zeros(0)
    columns = {"reference_B": none, "strength_B": none, "gold_B": none, "logprob_BT": none[None][:0]}
    empty = _preference_loss.loss(
        entropy_BT=columns["logprob_BT"],
        mask_BT=columns["logprob_BT"].bool(),
        how=PreferenceLossConfig(kind="ipo", sft_coef=0.3),
        **columns,
    )
    assert [(total.item(), count.item()) for total, count in empty.terms] == [(0, 0), (0, 0)]


# Reference and gold


class Model:
    """A reference or policy that answers -1, -2, ... at the tokens of a response; or a judge that gives its length."""

    def __init__(self) -> None:
        self.temperatures: list[float] = []

    def logprobs(self, sequences: Sequences, temperature: float) -> CompletedFuture[Tensor]:
        self.temperatures.append(temperature)
        number_BT = -torch.arange(1.0, sequences.mask_BT.shape[1] + 1).expand(len(sequences), -1)
        return CompletedFuture(torch.where(sequences.mask_BT, number_BT, NAN))

    def score(self, sequences: Sequences) -> CompletedFuture[Tensor]:
        return CompletedFuture(sequences.responses.lengths_B.float())


SUMS = [-3.0, -6.0, -1.0, -3.0]  # -1 - 2, -1 - 2 - 3, -1, -1 - 2


def test_reference_sums_are_taken_at_temperature_one():
    model = Model()
    assert _preference_loss.reference_sums(model, pairs()).tolist() == SUMS
    assert model.temperatures == [1.0]


def configured(**values: Any) -> dpo.Config:
    judge = CheckpointRewardConfig(path="r") if values.get("gold") == "reward" else None
    return dpo.Config(policy=PolicyConfig(path="m"), reference=ReferenceConfig(path="m"), reward=judge, **values)


def test_gold_from_strength_and_from_a_reward_model():
    roles: Any = Cast(Model())
    by_strength = dpo.gold(configured(loss=PreferenceLossConfig(kind="rpo_sq")), pairs(), roles)
    assert by_strength.tolist() == [3, 0, 1, 0]  # whose differences are the strengths
    by_reward = dpo.gold(configured(loss=PreferenceLossConfig(kind="rpo_sq"), gold="reward"), pairs(), roles)
    assert by_reward.tolist() == [2, 3, 1, 2]  # its scores of all four


class Cast:
    def __init__(self, model: Model):
        self.policy = self.reference = self.reward = model
        self.eval_reward = None


def test_cached_reference_numbers_are_those_of_the_policy_by_row(tmp_path: Path):
    settings, model = configured(reference_cache=str(tmp_path)), Model()
    for _ in range(2):  # computed, then read
        look_up = dpo.reference_sums(settings, pairs(), Cast(model), {"policy": "p"})  # type: ignore[arg-type]
        rows = torch.tensor([1, 0])
        assert look_up(pairs().select(rows), rows).tolist() == [*SUMS[2:], *SUMS[:2]]
    assert len(model.temperatures) == 1
    workers = dpo.reference_sums(configured(), pairs(), Cast(model), {})  # type: ignore[arg-type]
    assert workers(pairs().select(rows), rows).tolist() == [*SUMS[2:], *SUMS[:2]]


def test_random_weights_of_another_seed_are_not_found_in_the_cache(tmp_path: Path):
    init, model = {"model_type": "llama"}, Model()
    for seed in (0, 1, 0):
        settings = dpo.Config(
            policy=PolicyConfig(path="m", init=init),
            reference=ReferenceConfig(path="m", init=init),
            reference_cache=str(tmp_path),
            run=RunConfig(seed=seed),
        )
        fingerprints = {"policy": model_fingerprint(settings.policy, seed)}
        dpo.reference_sums(settings, pairs(), Cast(model), fingerprints)  # type: ignore[arg-type]
    assert len(model.temperatures) == len(list(tmp_path.iterdir())) == 2


def test_no_reference_is_cached_for_a_loss_that_reads_none(tmp_path: Path):
    with pytest.raises(ValueError, match=r"reference_cache.*simpo"):
        configured(reference_cache=str(tmp_path), loss=PreferenceLossConfig(kind="simpo"))


# Choosing


def rollouts(lengths: list[int], finished: list[bool], K: int) -> Rollouts:
    number = len(lengths) // K
    sequences = Sequences(
        Packed.from_lists([[5, 10 + p] for p in range(number)]),
        Packed.from_lists([[100 + i] * n for i, n in enumerate(lengths)]),
        torch.arange(number).repeat_interleave(K),
    )
    zeros = torch.zeros(len(lengths), max(lengths))
    return Rollouts(sequences, zeros, zeros, torch.tensor(finished), 0.7, 1)


def names(sequences: Sequences) -> list[tuple[int, int]]:
    """The prompt and the number of each response."""
    prompts = sequences.prompts.lists()
    pairs = zip(sequences.prompt_B.tolist(), sequences.responses.lists(), strict=True)
    return [(prompts[p][1] - 10, response[0] - 100) for p, response in pairs]


# Prompt 0: 3 is best and unfinished. Prompt 1: a tie at both ends. Prompt 2: all equal. Prompt 3: some scores failed,
# so the whole group is dropped. Prompt 4: all failed.
SCORES = [2.0, 3.0, -0.5, -1.0, 4.0, 1.0, 4.0, 1.0, 5.0, 5.0, 5.0, 5.0, NAN, -INF, 2.0, INF, NAN, NAN, NAN, NAN]
CUT_OFF = {1}
CHOICES = [
    # treatment, penalty, pairs as (prompt, best, worst), gaps, best of each prompt
    ("mask", 0.0, [(0, 0, 3), (1, 4, 5)], [3.0, 3.0], [(0, 0), (1, 4), (2, 8)]),
    ("keep", 0.0, [(0, 1, 3), (1, 4, 5)], [4.0, 3.0], [(0, 1), (1, 4), (2, 8)]),
    ("penalize", 0.5, [(0, 1, 3), (1, 4, 5)], [3.5, 3.0], [(0, 1), (1, 4), (2, 8)]),
    ("penalize", 1.5, [(0, 0, 3), (1, 4, 5)], [3.0, 3.0], [(0, 0), (1, 4), (2, 8)]),
    ("penalize", 9.0, [(0, 0, 1), (1, 4, 5)], [8.0, 3.0], [(0, 0), (1, 4), (2, 8)]),  # 3 - 9 is the worst
]


@pytest.mark.parametrize(("treatment", "penalty", "chosen", "gaps", "best"), CHOICES)
def test_choices_by_hand(treatment, penalty: float, chosen, gaps: list[float], best: list[tuple[int, int]]):
    settings: dict[str, Any] = {
        "truncated": treatment,
        "truncation_penalty": penalty,
        "sampling": SamplingConfig(num_samples=4),
    }
    drawn = rollouts([1, 2] * 10, [i not in CUT_OFF for i in range(20)], 4)
    score_B = torch.tensor(SCORES)

    found, gold_B, statistics = online_dpo.choose_pairs(
        online_dpo.Config(reward=CheckpointRewardConfig(path="r"), **settings), drawn, score_B
    )
    assert names(found.sequences) == [(p, k) for p, first, second in chosen for k in (first, second)]
    assert found.strength_P.tolist() == gaps
    assert (gold_B[0::2] - gold_B[1::2]).tolist() == gaps  # the gold difference is that of the same scores
    assert statistics == {"learnable": 2 / 5, "gap": pytest.approx(sum(gaps) / 2)}

    batch, statistics = best_of_n.select_best(
        best_of_n.Config(reward=CheckpointRewardConfig(path="r"), **settings), drawn, score_B
    )
    assert names(batch.sequences) == best
    assert (batch.unit, batch.columns, batch.temperature) == (1, {}, 1.0)
    expected = sum(SCORES[k] for _, k in best) / 3
    assert statistics == {"learnable": 3 / 5, "best_reward": pytest.approx(expected)}


def test_nothing_to_choose():
    drawn, failed = rollouts([1, 2], [True, True], 2), torch.tensor([NAN, NAN])
    two = SamplingConfig(num_samples=2)
    found, gold_B, statistics = online_dpo.choose_pairs(
        online_dpo.Config(reward=CheckpointRewardConfig(path="r"), sampling=two), drawn, failed
    )
    assert (len(found), len(found.sequences), len(gold_B)) == (0, 0, 0)
    assert statistics == {"learnable": 0, "gap": 0}
    batch, statistics = best_of_n.select_best(
        best_of_n.Config(reward=CheckpointRewardConfig(path="r"), sampling=two), drawn, failed
    )
    assert len(batch.sequences) == 0
    assert statistics == {"learnable": 0, "best_reward": 0}


def test_the_pairs_of_a_rollout_are_whole_for_the_loss():
    # Best and worst with their own tokens, strengths twice, and reference numbers beside them.
    drawn = rollouts([1, 2, 3, 4], [True] * 4, 2)
    found, gold_B, _ = online_dpo.choose_pairs(
        online_dpo.Config(reward=CheckpointRewardConfig(path="r"), sampling=SamplingConfig(num_samples=2)),
        drawn,
        torch.tensor([0.0, 1.0, 2.5, 0.0]),
    )
    batch = found.batch(reference_B=_preference_loss.reference_sums(Model(), found), gold_B=gold_B)
    assert batch.unit == 2
    assert batch.sequences.responses.lists() == [[101] * 2, [100], [102] * 3, [103] * 4]
    assert batch.columns["strength_B"].tolist() == [1, 1, 2.5, 2.5]
    assert batch.columns["reference_B"].tolist() == [-3, -1, -6, -10]
    assert gold_B.tolist() == [1, 0, 2.5, 0]
