"""The engine against plain PyTorch: the same weights however the work is cut and sharded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.config import OptimizerConfig, PolicyConfig, ReferenceConfig
from align.engines import distributed
from align.models import load
from align.models.heads import LastTokenScore, TokenLogprobs
from align.roles import Loss
from align.types import Batch, Sequences

SCRIPT = Path(__file__).with_name("two_ranks.py")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_ranks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shared = _script()


@pytest.fixture(autouse=True, scope="module")
def alone():
    distributed.initialize_alone()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Weights and metrics of every task, by hand."""
    return {name: shared.by_hand(task) for name, task in shared.TASKS.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes computed, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    store = distributed.open_store("127.0.0.1", 60.0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    logs = [(folder / f"{rank}.log").open("w") for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(store.port), str(folder)],
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


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Rounding moves a weight by up to 1.4e-6 on a CPU with AMX units, after Adam has divided by small moments."""
    assert ours.keys() == theirs.keys()
    worst = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    assert max(worst.values()) <= tolerance, worst


def assert_matches(ours: tuple[dict[str, Tensor], list[dict[str, float]]], theirs: Any, batches: Any) -> None:
    assert_same(ours[0], theirs[0])
    for step, (own, hand, batch) in enumerate(zip(ours[1], theirs[1], batches, strict=True)):
        assert {name: own[name] for name in hand} == pytest.approx(hand, rel=2e-5, abs=1e-6), step
        rows: Sequences = batch.sequences
        assert own["skipped_steps"] == 0.0
        assert own["trained_tokens"] >= len(rows.responses.ids_N) + len(rows.prompts.ids_N)


def test_the_oracle_has_something_to_tell(expected):
    start = {name: p.detach() for name, p in shared.llama("eager").named_parameters()}
    for name in ("clipped", "unclipped", "one prompt", "unequal", "pairs"):
        moved = {key: float((value - start[key]).abs().max()) for key, value in expected[name][0].items()}
        assert min(moved.values()) > 1e-4, (name, moved)
    assert all(metrics["grad_norm"] > 0.6 for metrics in expected["clipped"][1])  # twice the limit
    far = max(float((expected["clipped"][0][k] - expected["unclipped"][0][k]).abs().max()) for k in start)
    assert far > 1e-3


ALONE = [
    *[("clipped", stage, "packed", 10**6, False) for stage in range(4)],
    *[("clipped", stage, "packed", 1, True) for stage in range(4)],
    *[("clipped", stage, "sdpa", 25, True) for stage in range(4)],
    ("clipped", 1, "eager", 10**6, False),
    *[("unclipped", stage, "packed", 20, True) for stage in range(4)],
    *[("tied", stage, "packed", 20, False) for stage in range(4)],
    ("tied", 2, "eager", 20, True),
    *[("pairs", stage, "packed", 9, True) for stage in range(4)],
]


@pytest.mark.parametrize("run", ALONE, ids=lambda run: "-".join(map(str, run)))
def test_one_rank_takes_the_steps_of_plain_pytorch(run, expected):
    task = shared.TASKS[run[0]]
    assert_matches(shared.by_engine(task, *run[1:]), expected[run[0]], task.batches)


def test_the_number_of_micro_batches_is_what_the_cases_mean():
    rows = shared.TASKS["clipped"].batches[0].sequences
    counts = {tokens: len(shared.collate.micro_batches(rows, 1, tokens)) for tokens in (1, 20, 25, 10**6)}
    assert counts[1] >= 5
    assert counts[20] >= 3
    assert counts[25] >= 2
    assert counts[10**6] == 1


@pytest.mark.slow
@pytest.mark.parametrize("run", shared.RUNS, ids=lambda run: "-".join(map(str, run)))
def test_two_ranks_take_the_steps_of_plain_pytorch(run, two_ranks, expected):
    for rank in two_ranks:
        assert_matches(rank["steps"][run], expected[run[0]], shared.TASKS[run[0]].batches)
    assert two_ranks[0]["steps"][run][1] == two_ranks[1]["steps"][run][1]  # one set of metrics for all ranks


@pytest.mark.slow
def test_ranks_with_unequal_work_were_tried(two_ranks):
    fewer, more = sorted(two_ranks[0]["passes"])
    assert fewer == 1
    assert more >= 3
    one = shared.TASKS["one prompt"].batches[0].sequences
    assert [len(part) for part in shared.collate.split(one, 1, 2)] == [3, 0]


def check_refusal(answer: dict[str, Any]) -> None:
    assert "loss is nan at optimizer step 1" in answer["message"]
    assert_same(answer["refused"], answer["before"], tolerance=0.0)
    assert answer["skip"] == {"skipped_steps": 1.0}
    assert_same(answer["skipped"], answer["before"], tolerance=0.0)
    # Nothing of the refused gradient is left, and neither attempt counts as a step.
    task = shared.TASKS["unclipped"]
    assert_same(answer["after"], shared.by_hand(shared.Task(task.batches[:1], task.loss, 0.0))[0])
    assert answer["good"]["lr"] == pytest.approx(shared.RATES[0])


@pytest.mark.parametrize("stage", range(4))
def test_a_loss_that_is_not_finite_and_an_empty_step_change_nothing(stage):
    check_refusal(shared.refused_and_skipped(stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(stage, two_ranks):
    for rank in two_ranks:
        check_refusal(rank["refused"][stage])


@pytest.mark.slow
def test_sharded_inference_equals_replicated(two_ranks):
    for rank in two_ranks:
        sharded, replicated = rank["frozen"][3], rank["frozen"][0]
        assert len(sharded) == len(replicated) == 4
        for ours, theirs in zip(sharded, replicated, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert [len(rank["frozen"][3][2]) for rank in two_ranks] == [3, 0]  # the second request left rank 1 without work
    rows = shared.sequences(*shared.SHAPES)
    with torch.no_grad():
        logprob_BT = shared.by_hand_logprobs(shared.llama("eager"), rows, shared.TEMPERATURE)[0]
    for rank, index in enumerate(shared.collate.split(rows, 1, 2)):
        ours = two_ranks[rank]["frozen"][3][0]
        torch.testing.assert_close(ours, logprob_BT[index][:, : ours.shape[1]], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sharded_weights_sample_what_whole_weights_sample(two_ranks):
    whole = shared.generate(shared.llama("packed"), shared.PROMPTS, shared.SAMPLING, 5, num_slots=64)
    for rank in two_ranks:
        assert rank["sampled"] == whole.sequences.responses.lists()


@pytest.mark.slow
def test_bfloat16_learns_on_two_ranks(two_ranks):
    losses = two_ranks[0]["bfloat16"]
    assert losses == two_ranks[1]["bfloat16"]
    assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_learns_with_float32_copies():
    losses = shared.bfloat16()
    assert losses[-1] < 0.7 * losses[0]


def test_a_rate_too_small_for_bfloat16_still_adds_up():
    # Steps of 1e-4 of a weight are lost in bfloat16, which has 8 bits; only the float32 copy remembers them.
    model = shared.llama("packed", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    section = PolicyConfig(
        path="unused", dtype="bfloat16", zero_stage=1, optimizer=OptimizerConfig(lr=2e-4, max_grad_norm=0.0)
    )
    engine = shared.engine_of(model, section)
    batch = shared.token_batch(0, *shared.SHAPES)
    for _ in range(20):
        engine.update(batch, shared.weighted, temperature=1.0)
    norm = "model.norm.weight"  # ones: the distance to the next bfloat16 below 1 is 4e-3, 20 steps of 2e-4
    assert float((model.get_parameter(norm).detach() - before[norm]).abs().max()) >= 2.0**-8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bfloat16_micro_batches_are_summed_in_float32(stage):
    """Of 64 micro-batches, against the same passes summed in float64. Sums in bfloat16 are 8e-3 away."""
    micro_batches = 64
    batch = shared.token_batch(0, [8] * micro_batches, [[24]] * micro_batches)
    tokens, exact = float(batch.columns["keep_BT"].sum()), {}
    model = shared.llama("packed", torch.bfloat16)
    head = TokenLogprobs(model)
    for row in range(micro_batches):
        part = batch.select(torch.tensor([row]))
        outputs = head(shared.collate.packed(part.sequences), temperature=1.0)
        (shared.weighted(mask_BT=part.sequences.mask_BT, **outputs, **part.columns).sum / tokens).backward()
        for name, weight in model.named_parameters():
            exact[name] = exact.get(name, 0.0) + weight.grad.double().flatten()
        model.zero_grad()
    optimizer = OptimizerConfig(lr=0.0, betas=(0.0, 0.9), max_grad_norm=0.0)  # the first moment is the gradient
    section = PolicyConfig(
        path="unused", dtype="bfloat16", zero_stage=stage, max_tokens_per_micro_batch=32, optimizer=optimizer
    )
    engine = shared.engine_of(shared.llama("packed", torch.bfloat16), section)
    engine.update(batch, shared.weighted, temperature=1.0)
    stored = engine.training.collect()
    summed = {name: stored[f"model.{name}|exp_avg|0"].double() for name in exact}
    error = sum((summed[name] - exact[name]).square().sum() for name in exact)
    assert float((error / sum(value.square().sum() for value in exact.values())).sqrt()) < 1e-6


def count_by_outputs(logprob_BT: Tensor, mask_BT: Tensor, **_: Tensor) -> Loss:
    return Loss(logprob_BT.sum(), (logprob_BT < -0.1).sum() + 1, {})


def test_a_count_that_depends_on_outputs_is_refused():
    model = shared.llama("packed")
    engine = shared.engine_of(model, shared.section(1))
    before = shared.weights(model, engine)
    with pytest.raises(ValueError, match="count must not depend on model outputs"):
        engine.update(shared.token_batch(0, *shared.SHAPES), count_by_outputs, temperature=1.0)
    assert_same(shared.weights(model, engine), before, tolerance=0.0)


@pytest.mark.parametrize("stage", range(4))
def test_the_first_step_has_the_size_of_the_scheduled_rate(stage):
    # AdamW's first step is lr * g / (|g| + eps): where |g| is far above eps, every weight moves by exactly lr.
    model = shared.llama("packed")
    before = model.lm_head.weight.detach().clone()
    rates = OptimizerConfig(lr=1e-2, eps=1e-12, max_grad_norm=0.0, warmup_steps=8)
    engine = shared.engine_of(model, PolicyConfig(path="unused", dtype="float32", zero_stage=stage, optimizer=rates))
    metrics = engine.update(shared.token_batch(0, *shared.SHAPES), shared.weighted, temperature=1.0)
    moved = (shared.weights(model, engine)["lm_head.weight"] - before).abs()
    assert metrics["lr"] == pytest.approx(1e-2 / 8)
    assert float(moved.median()) == pytest.approx(1e-2 / 8, rel=1e-3)


def test_dropout_acts_in_update_only():
    init = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    init |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    batch = shared.token_batch(0, *shared.SHAPES)
    infer, losses = {}, {}
    for dropout in (0.0, 0.5):
        rates = OptimizerConfig(lr=0.0)
        section = PolicyConfig(
            path="unused", init=init, dtype="float32", zero_stage=0, dropout=dropout, optimizer=rates
        )
        engine = shared.engine_of(load.causal_lm(section, 50, seed=3), section)
        first = engine.infer(batch.sequences, temperature=1.0)["logprob_BT"]
        losses[dropout] = engine.update(batch, shared.weighted, temperature=1.0)["loss"]
        infer[dropout] = engine.infer(batch.sequences, temperature=1.0)["logprob_BT"]
        assert torch.equal(first, infer[dropout])
    assert torch.equal(infer[0.0], infer[0.5])
    assert abs(losses[0.0] - losses[0.5]) > 1e-4


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_inference_does_not_depend_on_micro_batches(attention):
    rows = shared.sequences(*shared.SHAPES)
    model = shared.llama(attention)
    with torch.no_grad():
        logprob_BT, entropy_BT = shared.by_hand_logprobs(shared.llama("eager"), rows, 0.7)
    for tokens in (1, 12, 30, 10**6):
        engine = shared.engine_of(
            model, ReferenceConfig(path="unused", dtype="float32", max_tokens_per_micro_batch=tokens)
        )
        outputs = engine.infer(rows, temperature=0.7)
        torch.testing.assert_close(outputs["logprob_BT"], logprob_BT, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs["entropy_BT"], entropy_BT, rtol=0, atol=1e-5)


def test_inference_without_sequences():
    none = shared.sequences(*shared.SHAPES).select(torch.empty(0, dtype=torch.int64))
    reference = shared.engine_of(shared.llama("packed"), ReferenceConfig(path="unused", dtype="float32"))
    assert reference.infer(none, temperature=1.0)["logprob_BT"].shape == (0, 0)
    scorer = shared.llama("packed", auto=AutoModelForSequenceClassification, num_labels=1)
    reward = shared.engine_of(scorer, ReferenceConfig(path="unused", dtype="float32"), LastTokenScore)
    assert reward.infer(none)["score_B"].shape == (0,)


def test_pairs_are_never_parted():
    seen: list[int] = []

    def watch(strength_B: Tensor, **tensors: Tensor) -> Loss:
        seen.append(len(strength_B))
        return shared.preferred(strength_B=strength_B, **tensors)

    batch: Batch = shared.TASKS["pairs"].batches[0]
    engine = shared.engine_of(shared.llama("packed"), shared.section(0, max_tokens_per_micro_batch=1))
    engine.update(batch, watch, temperature=1.0)
    assert seen == [2] * 8  # four pairs, each counted once and computed once


def test_head_outputs_carry_what_their_class_names():
    layout = shared.collate.packed(shared.sequences([2], [[3]]))
    assert set(TokenLogprobs(shared.llama("packed"))(layout, temperature=1.0)) == set(TokenLogprobs.outputs)
