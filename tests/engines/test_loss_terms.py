"""A loss of several terms, each divided by a count of its own, through the engine against plain PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithms import _preference_loss
from align.config import PreferenceLossConfig
from align.engines import distributed
from align.errors import DivergedError
from align.roles import Loss
from align.types import Batch

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


def three_terms(logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, keep_BT: Tensor) -> Loss:
    """A mean over kept tokens, one over sequences, and the entropy over all tokens."""
    kept = -torch.where(keep_BT, logprob_BT * weight_BT, 0.0).sum()
    whole_B = torch.where(mask_BT, logprob_BT, 0.0).sum(1)
    sequences = (0.01 * whole_B.square().sum(), mask_BT.any(1).sum())
    entropy = (-0.5 * torch.where(mask_BT, entropy_BT, 0.0).sum(), mask_BT.sum())
    return Loss(kept, keep_BT.sum(), {"weight": (weight_BT[keep_BT].sum(), keep_BT.sum())}, (sequences, entropy))


def with_an_empty_term(logprob_BT: Tensor, mask_BT: Tensor, **columns: Tensor) -> Loss:
    """The same and a term that counts nothing."""
    loss = three_terms(logprob_BT=logprob_BT, mask_BT=mask_BT, **columns)
    empty = (1e3 * torch.where(mask_BT, logprob_BT, 0.0).sum(), torch.zeros(()))
    return Loss(loss.sum, loss.count, loss.metrics, (*loss.others, empty))


def first_term_empty(logprob_BT: Tensor, mask_BT: Tensor, **columns: Tensor) -> Loss:
    """The first term counts nothing, the others do."""
    loss = three_terms(logprob_BT=logprob_BT, mask_BT=mask_BT, **columns)
    return Loss(loss.sum, torch.zeros(()), loss.metrics, loss.others)


def some_without(logprob_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, keep_BT: Tensor, **_: Tensor) -> Loss:
    """A term that only sequences of more than 5 tokens have, so that many micro-batches have none of it."""
    long_BT = mask_BT & (mask_BT.sum(1) > 5)[:, None]
    kept = -torch.where(keep_BT, logprob_BT * weight_BT, 0.0).sum()
    return Loss(kept, keep_BT.sum(), {}, ((torch.where(long_BT, logprob_BT, 0.0).sum(), long_BT.sum()),))


def nothing_at_all(logprob_BT: Tensor, mask_BT: Tensor, **_: Tensor) -> Loss:
    total, none = torch.where(mask_BT, logprob_BT, 0.0).sum(), torch.zeros(())
    return Loss(total, none, {}, ((total, none),))


def not_finite(logprob_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, **_: Tensor) -> Loss:
    total = torch.where(mask_BT, logprob_BT, 0.0).sum()
    return Loss(total, mask_BT.sum(), {}, ((total * torch.nan, mask_BT.any(1).sum()),))


def quotients(loss: Any, **tensors: Tensor) -> Loss:
    """The sum of the quotients of all terms as one term: what plain PyTorch is given, on the whole batch at once."""
    value = loss(**tensors)
    return Loss(sum(s / n for s, n in value.terms if n), torch.ones(()), value.metrics)  # type: ignore[arg-type]


TOKENS = tuple(shared.token_batch(seed, *shared.SHAPES) for seed in range(2))


def _pairs(seed: int) -> Batch:
    rows = shared.sequences([4, 7, 2, 5], [[3, 6], [8, 1], [2, 2], [5, 9]], seed)
    source = torch.Generator().manual_seed(seed)
    columns = {
        "reference_B": -30 * torch.rand(8, generator=source),
        "strength_B": torch.tensor([1.0, 2.0, 3.0, 1.0]).repeat_interleave(2),
        "gold_B": torch.randn(8, generator=source),
    }
    return Batch(rows, columns, 2, shared.TEMPERATURE)


PAIRS = (_pairs(0), _pairs(1))
TASKS: dict[str, tuple[tuple[Batch, ...], Any]] = {
    "three": (TOKENS, three_terms),
    "empty": (TOKENS, with_an_empty_term),
    "first empty": (TOKENS, first_term_empty),
    "some without": (TOKENS, some_without),
    "dpo with sft": (PAIRS, partial(_preference_loss.loss, how=PreferenceLossConfig(beta=0.05, sft_coef=0.7))),
}
RUNS = [
    *[("three", 0, tokens) for tokens in (1, 12, 30, 10**6)],
    *[("three", stage, 12) for stage in (1, 2, 3)],
    *[("empty", 0, tokens) for tokens in (1, 10**6)],
    ("first empty", 0, 12),
    *[("some without", stage, 1) for stage in (0, 2)],
    *[("dpo with sft", 0, tokens) for tokens in (1, 25, 10**6)],
    ("dpo with sft", 3, 1),
]


def is_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    worst = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    assert max(worst.values()) <= tolerance, worst


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_steps_are_those_of_the_sum_of_quotients(run: tuple[str, int, int]):
    name, stage, tokens = run
    batches, loss = TASKS[name]
    theirs, expected = shared.by_hand(shared.Task(batches, partial(quotients, loss), 0.0))
    ours, metrics = shared.by_engine(shared.Task(batches, loss, 0.0), stage, "packed", tokens)
    is_close(ours, theirs, 2e-6)
    for own, hand in zip(metrics, expected, strict=True):  # `loss` is the sum of all terms
        assert {key: own[key] for key in hand} == pytest.approx(hand, rel=2e-5, abs=1e-6)
        assert own["skipped_steps"] == 0.0


def gradient(batch: Batch, loss: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the engine hands to its optimizer."""
    model = shared.llama("packed")
    engine = shared.engine_of(model, shared.section(0, tokens))
    found: dict[str, Tensor] = {}

    def look() -> dict[str, float]:
        found.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return {}

    monkeypatch.setattr(engine, "_take_step", look)
    engine.update(batch, loss, temperature=batch.temperature)
    return found


def plain_gradient(batch: Batch, term: int, loss: Any) -> dict[str, Tensor]:
    """Of one quotient, in one pass; of nothing where the count is 0."""
    model = shared.llama("packed")
    head = shared.TokenLogprobs(model)
    outputs = head(shared.collate.packed(batch.sequences), batch.temperature)
    s, n = loss(mask_BT=batch.sequences.mask_BT, **outputs, **batch.columns).terms[term]
    (s / n if n else s * 0).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tokens", [1, 12, 25, 10**6])
@pytest.mark.parametrize("name", ["empty", "dpo with sft"])
def test_the_gradient_is_the_sum_of_those_of_the_quotients(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch):
    (batch, _), loss = TASKS[name]
    parts = [plain_gradient(batch, term, loss) for term in range(4 if name == "empty" else 2)]
    expected = {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
    found = gradient(batch, loss, tokens, monkeypatch)
    is_close(found, expected, 2e-6)
    sizes = [max(float(gradient.abs().max()) for gradient in part.values()) for part in parts]
    assert min(sizes[:3]) > 1e-3  # each of them has a say
    assert sizes[3:] in ([], [0.0])


def test_the_micro_batches_are_as_many_as_is_meant():
    counts = [len(shared.collate.micro_batches(TOKENS[0].sequences, 1, tokens)) for tokens in (1, 12, 30, 10**6)]
    assert counts[0] > counts[1] > counts[2] > counts[3] == 1
    long = TOKENS[0].sequences.responses.lengths_B > 5
    assert 0 < int(long.sum()) < len(long) - 3  # so most micro-batches have no token of that term


def test_terms_of_nothing_are_a_step_left_out():
    model = shared.llama("packed")
    engine = shared.engine_of(model, shared.section(0))
    before = shared.weights(model, engine)
    assert engine.update(TOKENS[0], nothing_at_all, temperature=1.0) == {"skipped_steps": 1.0}
    is_close(shared.weights(model, engine), before, 0.0)


def test_a_further_term_that_is_not_finite_stops_the_step():
    model = shared.llama("packed")
    engine = shared.engine_of(model, shared.section(0))
    before = shared.weights(model, engine)
    with pytest.raises(DivergedError, match="loss is nan"):
        engine.update(TOKENS[0], not_finite, temperature=1.0)
    is_close(shared.weights(model, engine), before, 0.0)
