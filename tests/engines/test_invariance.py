"""The gradient of every loss is one number per weight, however the work is cut, padded, ordered and sharded.

Deviations are measured against float64 by hand and given in units of the largest gradient of any weight. The float32
rounding of one plain PyTorch pass over the whole batch is of the same size (`test_the_tolerance_is_that_of_rounding`).
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithms import _rollout
from align.data import collate
from align.engines import distributed
from align.roles import CompletedFuture, Loss

sys.path.append(str(Path(__file__).parent))
suite: Any = importlib.import_module("invariance")

NAMES = list(suite.CASES)
TOLERANCE = 2e-6


@pytest.fixture(autouse=True, scope="module")
def alone():
    distributed.initialize_alone()


@functools.cache
def expected(name: str, size: str) -> Any:
    """By hand."""
    return suite.CASES[name].by_hand(size)


def deviation(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any weight's gradient, in units of the largest gradient."""
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[name].double() - theirs[name]).abs().max()) for name in theirs) / largest


def check(name: str, setting: Any, result: Any) -> None:
    gradient, metrics = expected(name, setting.size)
    assert deviation(result[0], gradient) <= TOLERANCE
    logged = {key: value for key, value in result[1].items() if key in metrics}
    assert logged == pytest.approx(metrics, rel=1e-5, abs=1e-6)


# One rank


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_in_one_setting(name: str):
    number = NAMES.index(name)
    setting = suite.ONE_RANK[number % 2][number // 2 % 4]
    check(name, setting, suite.by_engine(suite.CASES[name], setting))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_rank_in_every_setting(name: str):
    for setting in suite.ONE_RANK[NAMES.index(name) % 2]:
        check(name, setting, suite.by_engine(suite.CASES[name], setting))


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in NAMES), ("clipped-token_mean", "eager"), ("reward-bt", "eager")],
)
def test_padding_on_the_left(name: str, attention: str):
    # At the head: the engine always pads on the right.
    case = suite.CASES[name]
    model = suite.model_of(case.kind, attention).train()
    layout = collate.padded(case.many.sequences, side="left")
    outputs = suite.KINDS[case.kind].head(model)(layout, **suite.arguments(case, case.many))
    value = case.loss(mask_BT=case.many.sequences.mask_BT, **outputs, **case.many.columns)
    suite.objective(value).backward()
    assert deviation(suite.gradients(model), expected(name, "many").gradient) <= TOLERANCE


def spoiled(batch: Any, value: float) -> Any:
    """``value`` where a row has no token, and in three more columns."""
    return replace(batch, columns=suite.filled(batch.columns, batch.sequences, value, more=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_beside_the_tokens_changes_no_bit(name: str):
    case, setting = suite.CASES[name], suite.ONE_RANK[NAMES.index(name) % 2][2]
    clean = suite.by_engine(case, setting, spoiled(case.many, 0.0))
    for value in (math.nan, math.inf, -1e30):
        dirty = suite.by_engine(case, setting, spoiled(case.many, value))
        assert dirty.metrics == clean.metrics
        assert all(torch.equal(dirty.gradient[key], g) for key, g in clean.gradient.items())
    check(name, setting, clean)


def of_outputs(case: Any, outputs: dict[str, Tensor], value: float) -> tuple[Loss, dict[str, Tensor]]:
    """The loss of these outputs, with ``value`` where there is no token in outputs and columns, and its gradients."""
    rows = case.many.sequences
    leaves = {key: x.requires_grad_() for key, x in suite.filled(outputs, rows, value, more=3).items()}
    mask_BT = torch.nn.functional.pad(rows.mask_BT, (0, 3))
    loss = case.loss(mask_BT=mask_BT, **leaves, **suite.filled(case.many.columns, rows, value, more=3))
    suite.objective(loss).backward()
    return loss, {key: x.grad for key, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_beside_the_tokens_do_not_matter_to_a_loss(name: str):
    case = suite.CASES[name]
    mask_BT = torch.nn.functional.pad(case.many.sequences.mask_BT, (0, 3))
    with torch.no_grad():
        model = suite.model_of(case.kind, "eager")
        outputs = suite.outputs_by_hand(case.kind, model, case.many.sequences, case.many.temperature)
    clean, clean_gradient = of_outputs(case, outputs, 0.0)
    assert any(bool(g.any()) for g in clean_gradient.values())
    for value in (math.nan, math.inf):
        dirty, gradient = of_outputs(case, outputs, value)
        for (total, count), (own_total, own_count) in zip(clean.terms, dirty.terms, strict=True):
            assert torch.equal(total, own_total) and torch.equal(count, own_count)
        for key, (total, count) in clean.metrics.items():
            assert torch.equal(total, dirty.metrics[key][0]) and torch.equal(count, dirty.metrics[key][1]), key
        for key, g in gradient.items():
            real = mask_BT if key.endswith("_BT") else torch.ones_like(g, dtype=torch.bool)
            assert torch.equal(g[real], clean_gradient[key][real])
            assert not g[~real].nan_to_num(1.0).any(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "learnable_B" in suite.CASES[name].many.columns])
def test_rows_that_are_not_learned_from_may_hold_anything(name: str):
    case, setting = suite.CASES[name], suite.ONE_RANK[NAMES.index(name) % 2][2]
    left_out_B = ~case.many.columns["learnable_B"]
    columns = {
        key: torch.where(left_out_B[:, None], math.nan, x) if key.endswith("_BT") else x
        for key, x in case.many.columns.items()
    }
    dirty = suite.by_engine(case, setting, replace(case.many, columns=columns))
    clean = suite.by_engine(case, setting)
    assert all(torch.equal(dirty.gradient[key], g) for key, g in clean.gradient.items())
    assert dirty.metrics == clean.metrics


# Nothing to do


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_sequences_is_skipped(name: str):
    case = suite.CASES[name]
    setting = suite.ONE_RANK[1][3]
    assert suite.by_engine(case, setting, case.many.select(suite.NOTHING)) == ({}, {"skipped_steps": 1.0})


@pytest.mark.parametrize(
    ("name", "group"), [("sequence-sequence_mean_token_mean", 3), ("direct-dpo-sft", 2), ("sft", 1)]
)
def test_more_minibatches_than_groups(name: str, group: int):
    # Best-of-n and online DPO leave out prompts, so there may be fewer groups than the recipe has minibatches.
    case, setting = suite.CASES[name], suite.Setting(2, "packed", 12, False)
    batch = case.few.select(torch.arange(group))
    learner = SimpleNamespace(update=lambda part, loss: CompletedFuture(suite.by_engine(case, setting, part).metrics))
    config: Any = SimpleNamespace(minibatches=3, epochs=2, run=SimpleNamespace(seed=0))
    metrics = _rollout.run_updates(config, 1, group, {"": (learner, batch, case.loss)})
    assert (metrics["updates"], metrics["skipped_steps"]) == (6.0, 4.0)
    assert metrics["loss"] == pytest.approx(suite.by_engine(case, setting, batch).metrics["loss"])


# The suite itself


@pytest.mark.parametrize("name", NAMES)
def test_the_data_have_something_to_tell(name: str):
    gradient, metrics = expected(name, "many")
    assert sum(bool(g.abs().max() > 1e-4) for g in gradient.values()) > 0.9 * len(gradient)
    if name.startswith(("clipped", "dual", "sequence", "gspo")):
        assert 0.1 < metrics["clipped"] < 0.6
    if name.startswith(("direct", "reward")):
        assert 0 < metrics["accuracy"] < 1
    columns = suite.CASES[name].many.columns
    if "rollout_BT" in columns:
        ratio_BT = (columns["old_BT"] - columns["rollout_BT"]).exp()
        assert (ratio_BT > 1.3).any() and ((ratio_BT < 1.3) & (ratio_BT > 1)).any()
        assert not columns["learnable_B"].all()


def test_the_settings_are_what_they_mean():
    counts = lambda name, tokens: len(  # noqa: E731
        collate.micro_batches(suite.CASES[name].many.sequences, suite.CASES[name].many.unit, tokens)
    )
    assert [counts("sft", tokens) for tokens in (1, 12, 25, suite.ALL)] == [11, 8, 4, 1]
    assert [counts("reward-bt", tokens) for tokens in (1, 12, 25, suite.ALL)] == [4, 4, 3, 1]


def of_its_own_mean(loss: Any, **tensors: Tensor) -> Loss:
    """The mistake that this suite is about: each micro-batch weighs the same."""
    value = loss(**tensors)
    terms = [(total / count.clamp(min=1), (count > 0).long()) for total, count in value.terms]
    return Loss(*terms[0], value.metrics, tuple(terms[1:]))


ONE_OF_EACH = [
    "reinforce-constant",
    "clipped-token_mean",
    "sequence-sequence_mean_token_mean",
    "direct-dpo-sft",
    "direct-simpo",
]
ONE_OF_EACH += ["value-0.2", "reward-scaled", "sft"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_means_of_micro_batches_are_caught(name: str):
    case, setting = suite.CASES[name], suite.Setting(1, "packed", 25, False)
    mean = replace(case, loss=partial(of_its_own_mean, case.loss))
    whole = setting._replace(tokens=suite.ALL)
    check(name, whole, suite.by_engine(mean, whole))
    with pytest.raises(AssertionError):
        check(name, setting, suite.by_engine(mean, setting))


@pytest.mark.parametrize(
    "name", ["clipped-constant", "sequence-sequence_mean_token_mean", "direct-margin", "value-0.0"]
)
def test_the_tolerance_is_that_of_rounding(name: str):
    case = suite.CASES[name]
    model = suite.model_of(case.kind, "eager").train()
    outputs = suite.outputs_by_hand(case.kind, model, case.many.sequences, case.many.temperature)
    value = case.loss(mask_BT=case.many.sequences.mask_BT, **outputs, **case.many.columns)
    suite.objective(value).backward()
    assert 1e-7 < deviation(suite.gradients(model), expected(name, "many").gradient) < TOLERANCE


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes computed, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    store = distributed.open_store("127.0.0.1", 60.0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    logs = [(folder / f"{rank}.log").open("w") for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, suite.__file__, str(rank), str(store.port), str(folder)],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for log in logs:
            log.close()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(name: str, two_ranks: list[dict[str, Any]]):
    for setting in suite.on_two(name):
        for rank in two_ranks:
            check(name, setting, rank["gradients"][name, setting])
        assert two_ranks[0]["gradients"][name, setting][1] == two_ranks[1]["gradients"][name, setting][1]


@pytest.mark.slow
def test_a_rank_without_work_was_tried(two_ranks: list[dict[str, Any]]):
    shares = [set(rank["few"].values()) for rank in two_ranks]
    assert 0 not in shares[0]
    assert shares[1] == {0}


@pytest.mark.slow
def test_a_step_without_sequences_is_skipped_on_both_ranks(two_ranks: list[dict[str, Any]]):
    for rank in two_ranks:
        assert len(rank["empty"]) == 20
        assert all(metrics == {"skipped_steps": 1.0} for metrics in rank["empty"].values())
