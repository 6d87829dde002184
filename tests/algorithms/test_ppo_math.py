"""PPO from scores and values to both losses: a ragged batch by hand, and a loop over the papers' formulas.

gamma = lambda = 1/2, kl_coef = 1/2 with k1, log pi = -1 at every token. The third response was cut off.

    response  score  x = log pi - log pi_ref   V        r                     delta             A
    0           2    1 -1                      1 2      -0.5  0.5 + 2         -0.5  0.5         -0.375  0.5
    1          -1    2                         0.5      -1 - 1                -2.5              -2.5
    2           4    0 0 2                     1 1 1    0 0  -1 + 4           -0.5 -0.5 2       -0.5  0  2

    delta_t = r_t + V_{t+1} / 2 - V_t: -0.5 + 1 - 1 = -0.5 and 2.5 - 2 = 0.5; A_t = delta_t + A_{t+1} / 4
    returns A + V: 0.625 2.5, -2, 0.5 1 3
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithms import _policy_loss, _rewards, _rollout, ppo
from align.config import CheckpointRewardConfig, PolicyLossConfig, SamplingConfig
from align.roles import CompletedFuture, Loss, Metrics
from align.types import Batch

NAN = math.nan
X, SCORE, FINISHED = [[1, -1], [2], [0, 0, 2]], [2.0, -1.0, 4.0], [True, True, False]
VALUE = [[1.0, 2.0], [0.5], [1.0, 1.0, 1.0]]
ADVANTAGE = [[-0.375, 0.5, 0], [-2.5, 0, 0], [-0.5, 0, 2]]
RETURN = [[0.625, 2.5, 0], [-2, 0, 0], [0.5, 1, 3]]


def config(**values: Any) -> ppo.Config:
    given = {"kl_coef": 0.5, "kl_estimator": "k1", "gamma": 0.5, "gae_lambda": 0.5, "whiten": False}
    return ppo.Config(
        **{"reward": CheckpointRewardConfig(path="r"), **given, "sampling": SamplingConfig(max_tokens=3), **values}
    )


def padded(rows: list[list[float]], padding: float = 0.0) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])


def learn(config: ppo.Config, seen: Any, value_BT: Tensor) -> tuple[Batch, Batch, dict[str, float]]:
    return ppo.make_batches(config, seen, _rewards.shape_rewards(config, seen, {}), value_BT)


# Advantages and returns


@pytest.mark.parametrize("padding", [0.0, NAN])
def test_advantages_and_returns_by_hand(seen, padding: float):
    batch, values, found = learn(config(), seen(X, SCORE, FINISHED, padding=padding), padded(VALUE, padding))
    assert batch.columns["advantage_BT"].tolist() == ADVANTAGE
    assert values.columns["return_BT"].tolist() == RETURN
    assert batch.columns["learnable_B"].tolist() == values.columns["learnable_B"].tolist() == [True] * 3
    assert set(values.columns) == {"old_BT", "return_BT", "learnable_B"}
    assert values.columns["old_BT"].nan_to_num().equal(padded(VALUE))
    assert found["return"] == pytest.approx(5.625 / 6)  # 0.625 + 2.5 - 2 + 0.5 + 1 + 3
    assert found["learnable"] == 1


def test_a_response_that_is_left_out(seen):
    # Its end is unknown, so it has no reward, and neither moments nor means see it.
    settings = config(truncated="mask", whiten=True)
    batch, values, found = learn(settings, seen(X, SCORE, FINISHED), padded(VALUE))
    assert values.columns["learnable_B"].tolist() == [True, True, False]
    # A = -9/24, 12/24, -60/24: mean -19/24, deviations 10/24, 31/24, -41/24, variance 2742 / 3 / 24^2
    std = math.sqrt(914) / 24
    expected = [[10 / 24 / std, 31 / 24 / std, 0], [-41 / 24 / std, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(batch.columns["advantage_BT"], torch.tensor(expected))
    assert values.columns["return_BT"][:2].tolist() == RETURN[:2]
    assert found["return"] == 0.375  # (0.625 + 2.5 - 2) / 3
    # Returns about 0.375: 0.25, 2.125, -2.375, squares 10.21875. R - V = A.
    assert found["explained_variance"] == pytest.approx(1 - 914 / 24**2 / (10.21875 / 3))
    assert found["explained_variance_responses"] == 2
    assert found["learnable"] == pytest.approx(2 / 3)


def test_returns_do_not_depend_on_whitening(seen):
    shown = seen(X, SCORE, FINISHED)
    plain, white = (learn(config(whiten=whiten), shown, padded(VALUE)) for whiten in (False, True))
    assert plain[1].columns["return_BT"].equal(white[1].columns["return_BT"])
    assert plain[2] == white[2]


def test_whitening_is_over_all_tokens_of_the_batch(seen):
    # A = -0.375 0.5 | -2.5 | -0.5 0 2; of 6 tokens, not of 3 responses and not of one response at a time.
    batch, _, _ = learn(config(whiten=True), seen(X, SCORE, FINISHED), padded(VALUE))
    every = [-0.375, 0.5, -2.5, -0.5, 0.0, 2.0]
    mean, std = statistics.fmean(every), statistics.pstdev(every)
    expected = padded([[(a - mean) / std for a in row] for row in ([-0.375, 0.5], [-2.5], [-0.5, 0.0, 2.0])])
    torch.testing.assert_close(batch.columns["advantage_BT"], expected)


def test_kl_in_the_loss_leaves_the_score_alone_on_the_last_token(seen):
    settings = config(kl_placement="loss", kl_estimator="k2", gamma=1.0, gae_lambda=1.0)
    batch, values, _ = learn(settings, seen(X, SCORE, FINISHED), padded(VALUE))
    assert values.columns["return_BT"].tolist() == [[2, 2, 0], [-1, 0, 0], [4, 4, 4]]
    assert batch.columns["advantage_BT"].tolist() == [[1, 0, 0], [-1.5, 0, 0], [3, 3, 3]]


def test_a_failed_score_takes_the_other_samples_of_its_prompt_along(seen):
    settings = config(sampling=SamplingConfig(num_samples=2, max_tokens=3), whiten=True)
    x, value = [[1], [2, 0], [1, -1], [2]], padded([[3.0], [4.0, 5.0], [1.0, 2.0], [0.5]])
    batch, values, found = learn(settings, seen(x, [NAN, 7.0, 2.0, -1.0], K=2), value)
    alone, alone_values, _ = learn(settings, seen(x[2:], [2.0, -1.0], K=2), value[2:])
    assert batch.columns["learnable_B"].tolist() == [False, False, True, True]
    assert batch.columns["advantage_BT"][:2].eq(0).all()
    assert batch.columns["advantage_BT"][2:].equal(alone.columns["advantage_BT"])
    assert values.columns["return_BT"][2:].equal(alone_values.columns["return_BT"])
    assert all(map(math.isfinite, found.values()))


def by_loop(settings: ppo.Config, seen: Any, value: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns as the papers write them: A_t = sum_l (gamma lambda)^l delta_{t+l}, then whitened."""
    rollouts, K = seen.rollouts, settings.sampling.num_samples
    lengths, finished = rollouts.sequences.responses.lengths_B.tolist(), rollouts.finished_B.tolist()
    score = seen.score_B.tolist()
    usable, advantages, returns = [], [], []
    for i, T in enumerate(lengths):
        group = score[i // K * K : i // K * K + K]
        usable.append(all(map(math.isfinite, group)) and (finished[i] or settings.truncated != "mask"))
        r = []
        for t in range(T):
            x = float(rollouts.logprob_BT[i, t] - seen.reference_BT[i, t])
            r.append(-settings.kl_coef * {"k1": x, "abs": abs(x), "k3": math.exp(-x) - 1 + x}[settings.kl_estimator])
        penalty = settings.truncation_penalty if settings.truncated == "penalize" and not finished[i] else 0.0
        r[-1] += score[i] - penalty
        V = [*value[i], 0.0]
        delta = [r[t] + settings.gamma * V[t + 1] - V[t] for t in range(T)]
        decay = settings.gamma * settings.gae_lambda
        advantages.append([sum(decay**n * delta[t + n] for n in range(T - t)) for t in range(T)])
        returns.append([a + v for a, v in zip(advantages[-1], V[:-1], strict=True)])
    if settings.whiten:
        every = [a for i, row in enumerate(advantages) if usable[i] for a in row]
        mean, std = statistics.fmean(every), math.sqrt(statistics.pvariance(every) + 1e-8)
        advantages = [[(a - mean) / std for a in row] for row in advantages]
    keep = lambda rows: [row if ok else [NAN] * len(row) for row, ok in zip(rows, usable, strict=True)]  # noqa: E731
    return keep(advantages), keep(returns)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("truncated", "estimator"), [("keep", "k1"), ("mask", "abs"), ("penalize", "k3")])
def test_against_the_papers_in_a_loop(seen, truncated, estimator, whiten: bool):
    chance = random.Random(f"{truncated} {whiten}")
    lengths = [chance.randrange(1, 8) for _ in range(12)]
    row = lambda n: [chance.gauss(0, 1) for _ in range(n)]  # noqa: E731
    x, value = [row(n) for n in lengths], [row(n) for n in lengths]
    score = [NAN if i == 7 else chance.gauss(0, 2) for i in range(12)]
    shown = seen(x, score, [chance.random() < 0.6 for _ in lengths], K=3, padding=NAN)
    settings = config(
        truncated=truncated,
        kl_estimator=estimator,
        whiten=whiten,
        gamma=0.9,
        gae_lambda=0.8,
        sampling=SamplingConfig(num_samples=3, max_tokens=8),
    )
    batch, values, _ = learn(settings, shown, padded(value, NAN))
    learn_BT = shown.rollouts.mask_BT & batch.columns["learnable_B"][:, None]
    advantages, returns = (padded(rows, NAN) for rows in by_loop(settings, shown, value))
    assert advantages.isfinite().equal(learn_BT)  # the same responses count
    assert 0 < learn_BT.sum() < sum(lengths)
    for column, expected in ((batch.columns["advantage_BT"], advantages), (values.columns["return_BT"], returns)):
        torch.testing.assert_close(column[learn_BT], expected[learn_BT], atol=2e-5, rtol=1e-5)


# The critic's loss


def test_value_loss_by_hand():
    # e = 0.2 about the old value 1, target 2; and a response that is left out, of which nothing may be seen.
    value = torch.tensor([[1.5, 0.9, 1.1, 0.0], [2.5, NAN, NAN, NAN], [NAN, 8.0, NAN, NAN]], requires_grad=True)
    lengths = torch.tensor([3, 1, 2])
    columns = {
        "mask_BT": torch.arange(4)[None] < lengths[:, None],
        "old_BT": torch.tensor([[1.0] * 4, [1.0, NAN, NAN, NAN], [NAN] * 4]),
        "return_BT": torch.tensor([[2.0] * 4, [2.0, NAN, NAN, NAN], [NAN] * 4]),
        "learnable_B": torch.tensor([True, True, False]),
    }
    loss = ppo.value_loss(value_BT=value, clip=0.2, **columns)
    # 1.5: 0.8^2 / 2 from the limit 1.2, more than 0.5^2 / 2; 0.9: 1.1^2 / 2; 1.1: 0.9^2 / 2; 2.5: 0.8^2 / 2
    assert loss.sum.item() == pytest.approx(0.32 + 0.605 + 0.405 + 0.32)
    assert loss.count.item() == 4
    assert loss.metrics["value"][0].item() == pytest.approx(6.0)  # 1.5 + 0.9 + 1.1 + 2.5
    assert loss.metrics["value"][1].item() == 4
    loss.sum.backward()
    assert value.grad is not None  # none beyond the limit: 1.5 and 2.5 have gone far enough for now
    torch.testing.assert_close(value.grad, torch.tensor([[0, -1.1, -0.9, 0], [0.0] * 4, [0.0] * 4]))
    plain = ppo.value_loss(value_BT=value, clip=0.0, **columns)
    assert plain.sum.item() == pytest.approx(0.125 + 0.605 + 0.405 + 0.125)


def test_value_loss_of_nothing():
    empty = {"mask_BT": torch.zeros(0, 0, dtype=torch.bool), "learnable_B": torch.zeros(0, dtype=torch.bool)}
    none = torch.zeros(0, 0)
    loss = ppo.value_loss(value_BT=none, old_BT=none, return_BT=none, clip=0.2, **empty)
    assert (loss.sum.item(), loss.count.item()) == (0, 0)


# The policy's loss


def policy_loss(settings: ppo.Config, batch: Batch, kl_coef: float, logprob: Tensor, entropy: Tensor) -> Loss:
    outputs = {"logprob_BT": logprob, "entropy_BT": entropy, "mask_BT": batch.sequences.mask_BT}
    return _policy_loss.policy_loss(settings, kl_coef)(**outputs, **batch.columns)


@pytest.mark.parametrize("padding", [0.0, NAN])
def test_the_policy_loss_with_entropy_and_kl_by_hand(seen, padding: float):
    settings = config(
        truncated="mask",
        kl_placement="loss",
        kl_estimator="k2",
        loss=PolicyLossConfig(kind="clipped", entropy_coef=0.1),
    )
    shown = seen(X, SCORE, FINISHED, padding=padding)
    batch, _, _ = learn(settings, shown, padded(VALUE, padding))
    # Without KL in r: delta = 0 + 1 - 1, 2 - 2 and -1 - 0.5; A = 0, 0 and -1.5.
    assert batch.columns["advantage_BT"][:2].tolist() == [[0, 0, 0], [-1.5, 0, 0]]
    # The second response has become twice as likely, with A < 0 an unlimited loss: 1.5 * 2. Its x is 2 + log 2.
    logprob = shown.rollouts.logprob_BT.clone()
    logprob[1, 0] += math.log(2)
    entropy = torch.where(shown.rollouts.mask_BT, 3.0, padding)
    logprob.requires_grad_()
    entropy.requires_grad_()
    loss = policy_loss(settings, batch, 0.5, logprob, entropy)
    x = 2 + math.log(2)
    expected = 3.0 + 0.5 * (0.5 + 0.5 + x * x / 2) - 0.1 * 9
    assert loss.sum.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count.item() == 3
    loss.sum.backward()
    assert entropy.grad is not None and logprob.grad is not None
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.1, -0.1, 0], [-0.1, 0, 0], [0, 0, 0]]))
    # d/d log pi = -A rho + kl_coef x
    torch.testing.assert_close(logprob.grad, torch.tensor([[0.5, -0.5, 0], [3 + 0.5 * x, 0, 0], [0, 0, 0]]))
    # k3 of x = log(old / new) = -log 2 on one token of three: 2 - 1 - log 2.
    total, count = loss.metrics["policy_kl"]
    assert (total / count).item() == pytest.approx((1 - math.log(2)) / 3, rel=1e-6)
    total, count = loss.metrics["entropy"]
    assert (total.item(), count.item()) == (18, 6)  # of all responses


def test_a_step_along_the_entropy_bonus_flattens_the_distribution(seen):
    logits = torch.tensor([2.0, 0.0, -1.0], requires_grad=True)
    settings = config(loss=PolicyLossConfig(kind="clipped", entropy_coef=0.5))
    batch, _, _ = learn(settings, seen([[0]], [0.0]), torch.zeros(1, 1))  # an advantage of 0: only the bonus acts
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum()
    loss = policy_loss(settings, batch, 0.0, p.log()[None, :1], entropy[None, None])
    (loss.sum / loss.count).backward()
    assert logits.grad is not None
    after = (logits.detach() - 0.1 * logits.grad).softmax(-1)
    assert -(after * after.log()).sum() > entropy + 1e-3


def test_clipped_tokens_by_hand(seen):
    # A = 2, -1.5 and rho = 1.5, 0.5 beyond 1 +- 0.2: losses -2.4 and 1.2, no gradient, half of the tokens clipped.
    settings = config(kl_placement="loss", kl_estimator="k2")
    batch, _, _ = learn(settings, seen([[0], [0], [0], [0]], [2.0, -1.5, 2.0, -1.5]), torch.zeros(4, 1))
    rho = torch.tensor([[1.5], [0.5], [0.5], [1.5]])
    logprob = (rho.log() - 1).requires_grad_()
    loss = policy_loss(settings, batch, 0.0, logprob, torch.zeros(4, 1))
    assert loss.sum.item() == pytest.approx(-2.4 + 1.2 - 1.0 + 2.25)
    assert [value.item() for value in loss.metrics["clipped"]] == [2, 4]
    loss.sum.backward()
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, torch.tensor([[0.0], [0.0], [-1.0], [2.25]]))


# Optimizer steps


class Learner:
    """Notes what it is asked to learn from; its policy moves by what ``policy_kl`` tells."""

    def __init__(self, name: str, asked: list[tuple[str, list[int]]], kl: Callable[[int], float] | None = None):
        self.name, self.asked, self.kl, self.count = name, asked, kl, 0

    def update(self, batch: Batch, loss: Any) -> CompletedFuture[Metrics]:
        self.asked.append((self.name, batch.columns["number_B"].tolist()))
        self.count += 1
        moved = {} if self.kl is None else {"policy_kl": self.kl(self.count)}
        return CompletedFuture({"loss": float(self.count), "trained_tokens": 10.0, "skipped_steps": 0.0, **moved})


def lessons(seen: Any, kl: Callable[[int], float]) -> tuple[list[tuple[str, list[int]]], dict[str, Any]]:
    asked: list[tuple[str, list[int]]] = []
    batch = seen([[0]] * 10, [0.0] * 10, K=2).rollouts.batch(number_B=torch.arange(10))
    loss = partial(ppo.value_loss, clip=0.2)
    critic, policy = Learner("critic", asked), Learner("policy", asked, kl)
    return asked, {"critic/": (critic, batch, loss), "": (policy, batch, loss)}


def test_epochs_and_minibatches_of_whole_groups(seen):
    settings = config(epochs=2, minibatches=2, prompts_per_step=5)
    asked, both = lessons(seen, lambda count: 0.0)
    metrics = _rollout.run_updates(settings, 3, 2, both)
    parts = [rows for name, rows in asked if name == "policy"]
    assert [name for name, _ in asked] == ["critic", "policy"] * 4
    assert parts == [rows for name, rows in asked if name == "critic"]  # both see the same part at the same time
    assert [len(rows) for rows in parts] == [6, 4, 6, 4]
    for epoch in (parts[:2], parts[2:]):
        assert sorted(epoch[0] + epoch[1]) == list(range(10))
    assert all(rows[0::2] == [n - 1 for n in rows[1::2]] for rows in parts)  # samples of a prompt together
    assert metrics["critic/updates"] == metrics["updates"] == 4
    assert metrics["loss"] == 2.5  # (1 + 2 + 3 + 4) / 4
    assert (metrics["critic/trained_tokens"], metrics["skipped_steps"]) == (40, 0)


def test_a_policy_that_moved_too_far_rests_while_the_critic_goes_on(seen):
    settings = config(epochs=3, minibatches=2, prompts_per_step=5)
    asked, both = lessons(seen, lambda count: 0.01 * count)
    metrics = _rollout.run_updates(settings, 1, 2, both, target_kl=0.025)
    assert [name for name, _ in asked] == ["critic", "policy"] * 3 + ["critic"] * 3  # the third told 0.03
    assert (metrics["updates"], metrics["critic/updates"]) == (3, 6)
    assert metrics["policy_kl"] == pytest.approx(0.02)


def test_one_pass_in_one_batch_keeps_the_order(seen):
    asked, both = lessons(seen, lambda count: 0.0)
    _rollout.run_updates(config(minibatches=1, prompts_per_step=5), 1, 2, both)
    assert asked == [("critic", list(range(10))), ("policy", list(range(10)))]


# Warm-up and value clipping, as the loop passes them on


class Critic(Learner):
    """A critic whose values are `VALUE`; after the update each is one higher."""

    def values(self, sequences: Any) -> CompletedFuture[Tensor]:
        return CompletedFuture(padded(VALUE))

    def update(self, batch: Batch, loss: Any) -> CompletedFuture[Metrics]:
        result = loss(value_BT=padded(VALUE) + 1, mask_BT=batch.sequences.mask_BT, **batch.columns)
        self.asked.append(("critic", [result.sum.item()]))
        return CompletedFuture({"loss": 0.0, "trained_tokens": 10.0, "skipped_steps": 0.0})


class Policy(Learner):
    """A policy that records its updates."""

    def update(self, batch: Batch, loss: Any) -> CompletedFuture[Metrics]:
        self.asked.append(("policy", []))
        return CompletedFuture({"loss": 0.0, "trained_tokens": 10.0, "skipped_steps": 0.0, "policy_kl": 0.0})

    def export(self, folder: Any) -> CompletedFuture[None]:
        return CompletedFuture(None)


def trained(settings: ppo.Config, seen: Any, first_step: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Updates of three steps of a round that begins with ``first_step``, in order."""
    shown, updates = seen(X, SCORE, FINISHED), []
    monkeypatch.setattr(_rollout, "score_rollouts", lambda roles, rollouts: shown)
    roles: Any = SimpleNamespace(policy=Policy("policy", updates), critic=Critic("critic", updates))
    steps = [(step, shown.rollouts) for step in range(first_step, first_step + 3)]
    run: Any = SimpleNamespace(first_step=first_step, state={}, final="", log=lambda *_: updates.append("step"))
    run.rollouts = lambda *_: iter(steps)
    ppo.train(settings, SimpleNamespace(prompts=None, held_out=None), roles, run)  # type: ignore[arg-type]
    return updates


@pytest.mark.parametrize("first_step", [1, 4], ids=["first round", "second round"])
def test_in_each_round_the_critic_learns_alone_for_its_warmup(seen, monkeypatch, first_step: int):
    settings = config(critic_warmup_steps=2, minibatches=1, prompts_per_step=3)
    updates = [entry if entry == "step" else entry[0] for entry in trained(settings, seen, first_step, monkeypatch)]
    assert updates == ["critic", "step", "critic", "step", "critic", "policy", "step"]


@pytest.mark.parametrize(("clip", "last"), [({}, 3.24), ({"value_clip": 0.5}, 2.25), ({"value_clip": 0.0}, 1.0)])
def test_the_recipes_value_clip_bounds_the_critics_step(seen, monkeypatch, clip: dict[str, float], last: float):
    # V is V_old + 1 and R = V_old + A: 1/2 max((1 - A)^2, (e - A)^2) over A = -0.375 0.5 | -2.5 | -0.5 0 2. Only for
    # A = 2 is the limit farther from the target than V: (0.2 - 2)^2, (0.5 - 2)^2, or (1 - 2)^2 without a limit.
    updates = trained(config(**clip, minibatches=1, prompts_per_step=3), seen, 1, monkeypatch)
    expected = (1.375**2 + 0.5**2 + 3.5**2 + 1.5**2 + 1 + last) / 2
    assert updates[0][1] == [pytest.approx(expected, rel=1e-6)]
