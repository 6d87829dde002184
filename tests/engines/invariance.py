"""Every loss of the project as a gradient: by hand in plain PyTorch, and through the engine on one rank or on two.

As a script: ``invariance.py <rank> <port> <folder>`` joins the group, computes `on_two_ranks` and writes what came out
to ``<folder>/<rank>.pt``.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.algorithms import _policy_loss, _preference_loss, _reward_pairs, _reward_ratings, ppo, sft, steerlm2
from align.config import OptimizerConfig, PolicyConfig, PolicyLossConfig, PreferenceLossConfig
from align.engines import distributed
from align.engines.deepspeed import Engine
from align.models.heads import Head, LastTokenAttributes, LastTokenScore, TokenLogprobs, TokenValues
from align.roles import Loss
from align.types import NOT_RATED, Batch, Sequences

sys.path.append(str(Path(__file__).parent))  # pytest imports test files by their path and leaves sys.path alone
shared: Any = importlib.import_module("two_ranks")

TEMPERATURE = 0.7
MAX_TOKENS = 15


class Kind(NamedTuple):
    """What a loss reads from a model."""

    head: type[Head]
    auto: Any
    arguments: dict[str, Any]


KINDS = {
    "policy": Kind(TokenLogprobs, AutoModelForCausalLM, {}),
    "critic": Kind(TokenValues, AutoModelForSequenceClassification, {"num_labels": 1}),
    "reward": Kind(LastTokenScore, AutoModelForSequenceClassification, {"num_labels": 1}),
    "attributes": Kind(LastTokenAttributes, AutoModelForSequenceClassification, {"num_labels": 3}),
}


def model_of(kind: str, attention: str) -> Any:
    """A tiny random Llama with what the kind reads, always the same."""
    return shared.llama(attention, auto=KINDS[kind].auto, **KINDS[kind].arguments)


# By hand


def outputs_by_hand(kind: str, model: Any, rows: Sequences, temperature: float) -> dict[str, Tensor]:
    """What the head gives, from one right-padded pass over whole sequences."""
    prompts, responses = rows.prompts.lists(), rows.responses.lists()
    whole = [prompts[p] + r for p, r in zip(rows.prompt_B.tolist(), responses, strict=True)]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
    attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    places = [
        (i, t, len(whole[i]) - len(row) + t - 1, row[t]) for i, row in enumerate(responses) for t in range(len(row))
    ]
    i_N, t_N, before_N, token_N = torch.tensor(places).T
    spread = lambda x_N: torch.zeros(rows.mask_BT.shape, dtype=x_N.dtype).index_put((i_N, t_N), x_N)  # noqa: E731
    if kind == "policy":
        logits = model(ids, attention_mask=attention, use_cache=False).logits
        table_NV = (logits / temperature).log_softmax(-1)[i_N, before_N]
        entropy_N = -(table_NV.exp() * table_NV).sum(-1)
        return {
            "logprob_BT": spread(table_NV[torch.arange(len(token_N)), token_N]),
            "entropy_BT": spread(entropy_N),
        }
    score_BL = model.score(model.model(ids, attention_mask=attention, use_cache=False).last_hidden_state).squeeze(-1)
    if kind == "critic":
        return {"value_BT": spread(score_BL[i_N, before_N])}
    name = "attribute_BA" if kind == "attributes" else "score_B"
    return {name: torch.stack([score_BL[i, len(row) - 1] for i, row in enumerate(whole)])}


def objective(value: Loss) -> Tensor:
    """What one optimizer step minimizes when the whole batch is one micro-batch."""
    return torch.stack([total / count for total, count in value.terms]).sum()


def means(value: Loss) -> dict[str, float]:
    """The numbers to be logged."""
    own = {name: float(total.detach()) / float(count) for name, (total, count) in value.metrics.items()}
    return {"loss": float(objective(value).detach()), **own}


class Result(NamedTuple):
    """The gradient of every weight, and metrics."""

    gradient: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Case:
    """A loss of the project with a batch of many sequences and one that leaves the second of two ranks without any."""

    kind: str
    loss: Callable[..., Loss]
    many: Batch
    few: Batch

    def batch(self, size: str) -> Batch:
        """``many`` or ``few``."""
        return self.many if size == "many" else self.few

    def by_hand(self, size: str) -> Result:
        """One padded forward pass of the whole batch, the loss called on it once, in float64."""
        model, batch = model_of(self.kind, "eager").double().train(), self.batch(size)
        outputs = outputs_by_hand(self.kind, model, batch.sequences, batch.temperature)
        columns = {name: x.double() if x.is_floating_point() else x for name, x in batch.columns.items()}
        value = self.loss(mask_BT=batch.sequences.mask_BT, **outputs, **columns)
        objective(value).backward()
        return Result(gradients(model), means(value))


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of plain parameters."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


# Data

MANY = ([3, 9, 1, 5, 14], [[4, 7], [1, 2], [6, 3], [0, 12, 3], [5, 2]])
PAIRED = ([4, 7, 2, 5], [[3, 6], [8, 1], [2, 2], [5, 9]])
FEW, ONE_PAIR = ([6], [[3, 5, 1]]), ([6], [[3, 5]])
IN_THREES = ([4, 7, 2, 5], [[3, 6, 2], [8, 1, 4], [2, 2, 7], [5, 9, 3]])


def _noise(seed: int) -> Callable[[Tensor, float], Tensor]:
    source = torch.Generator().manual_seed(seed)
    return lambda like, size: size * torch.randn(like.shape, generator=source)


@functools.cache
def _known(kind: str, attention: str = "eager") -> Any:
    return model_of(kind, attention)


@torch.no_grad()
def rollouts(shapes: Any, by_response: bool) -> Batch:
    """Columns of a policy gradient: every log-probability is another one, and not all rows are learned from."""
    rows, noise = shared.sequences(*shapes, seed=1), _noise(2)
    logprob_BT = outputs_by_hand("policy", _known("policy"), rows, TEMPERATURE)["logprob_BT"]
    old_BT = logprob_BT + noise(logprob_BT, 0.15 if by_response else 0.3)
    advantage_BT = noise(logprob_BT[:, :1], 1.0).expand_as(old_BT) if by_response else noise(logprob_BT, 1.0)
    columns = {
        "advantage_BT": advantage_BT.clone(),
        "old_BT": old_BT,
        "rollout_BT": old_BT + noise(logprob_BT, 0.5),
        "reference_BT": logprob_BT + noise(logprob_BT, 0.5),
        "learnable_B": torch.arange(len(rows)) % 4 != 2,
    }
    return Batch(rows, filled(columns, rows, 0.0), unit=1, temperature=TEMPERATURE)


@torch.no_grad()
def valued(shapes: Any) -> Batch:
    """Columns of the critic's loss."""
    rows, noise = shared.sequences(*shapes, seed=3), _noise(4)
    value_BT = outputs_by_hand("critic", _known("critic"), rows, 1.0)["value_BT"]
    old_BT = value_BT + noise(value_BT, 0.3)
    columns = {
        "old_BT": old_BT,
        "return_BT": value_BT + noise(value_BT, 0.5),
        "learnable_B": torch.arange(len(rows)) % 4 != 2,
    }
    return Batch(rows, filled(columns, rows, 0.0), unit=1, temperature=1.0)


@torch.no_grad()
def paired(shapes: Any) -> Batch:
    """Columns of losses of pairs."""
    rows, noise = shared.sequences(*shapes, seed=5), _noise(6)
    logprob_B = outputs_by_hand("policy", _known("policy"), rows, 1.0)["logprob_BT"].sum(1)
    columns = {
        "strength_B": torch.tensor([1.0, 2.0, 3.0, 1.5])[: len(rows) // 2].repeat_interleave(2),
        "reference_B": logprob_B + noise(logprob_B, 2.0),
        "gold_B": noise(logprob_B, 1.0),
    }
    return Batch(rows, columns, unit=2, temperature=1.0)


@torch.no_grad()
def weighed(shapes: Any) -> Batch:
    """Groups of three with the columns of SteerLM 2.0; one sample of most groups is not usable. Targets are far from
    baselines: near them the gradient is a difference of almost equal numbers, and its rounding would be large."""
    rows, noise = shared.sequences(*shapes, seed=10), _noise(13)
    logprob_BT = outputs_by_hand("policy", _known("policy"), rows, 1.0)["logprob_BT"]
    columns = {
        "previous_BT": logprob_BT + noise(logprob_BT, 0.3),
        "weight_B": noise(logprob_BT[:, 0], 2.0),
        "learnable_B": torch.arange(len(rows)) % 4 != 2,
    }
    return Batch(rows, filled(columns, rows, 0.0), unit=3, temperature=1.0)


def rewarded(shapes: Any) -> Batch:
    """Pairs for a reward model."""
    batch = paired(shapes)
    return replace(batch, columns={"strength_B": batch.columns["strength_B"]})


def rated(shapes: Any) -> Batch:
    """Responses with ratings of three attributes, of which the second is missing in every other row."""
    rows, noise = shared.sequences(*shapes, seed=8), _noise(9)
    label_BA = noise(torch.empty(len(rows), 3), 2.0)
    label_BA[::2, 1] = NOT_RATED
    return Batch(rows, {"label_BA": label_BA}, unit=1, temperature=1.0)


def filled(columns: dict[str, Tensor], rows: Sequences, value: float, more: int = 0) -> dict[str, Tensor]:
    """The columns with ``value`` wherever a row has no token, and ``more`` columns of it."""
    mask_BT = torch.nn.functional.pad(rows.mask_BT, (0, more))
    widened = lambda x: torch.nn.functional.pad(x, (0, mask_BT.shape[1] - x.shape[1]))  # noqa: E731
    return {name: torch.where(mask_BT, widened(x), value) if name.endswith("_BT") else x for name, x in columns.items()}


# Losses


def _policy_cases() -> Iterator[tuple[str, Case]]:
    every = get_args(get_type_hints(PolicyLossConfig)["aggregation"])
    kinds: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
        ("reinforce", "reinforce", {}, every),
        ("clipped", "clipped", {}, every),
        ("dual", "clipped", {"dual_clip": 1.1, "clip_high": 0.28}, ("token_mean", "sequence_mean_token_mean")),
        ("sequence", "sequence_clipped", {}, ("sequence_mean_token_mean",)),
        ("gspo", "sequence_mean_clipped", {"clip_low": 0.05, "clip_high": 0.05}, ("sequence_mean_token_mean",)),
    ]
    estimators = itertools.cycle(["k2", "k3", "abs"])
    for label, kind, changes, aggregations in kinds:
        by_response = kind.startswith("sequence")
        batches = rollouts(MANY, by_response), rollouts(FEW, by_response)
        for aggregation in aggregations:
            how = PolicyLossConfig(kind=kind, aggregation=aggregation, importance_cap=1.3, **changes)  # type: ignore[arg-type]
            estimator = next(estimators)
            alone = [{"entropy": 0.1}, {"kl": 0.3}] if aggregation in ("token_mean", "sequence_mean") else []
            for extras in ({}, {"entropy": 0.1, "kl": 0.3}, *alone):
                loss = partial(
                    _policy_loss.loss,
                    how=replace(how, entropy_coef=extras.get("entropy", 0.0)),
                    kl_coef=extras.get("kl", 0.0),
                    estimator=estimator,
                    max_tokens=MAX_TOKENS,
                )
                more = [estimator if name == "kl" else name for name in extras]
                yield "-".join([label, aggregation, *more]), Case("policy", loss, *batches)


def _direct_cases() -> Iterator[tuple[str, Case]]:
    special: dict[str, dict[str, Any]] = {"cdpo": {"smoothing": 0.1}, "robust": {"smoothing": 0.1}}
    hows = [
        PreferenceLossConfig(kind=kind, beta=0.3, **special.get(kind, {}))
        for kind in get_args(get_type_hints(PreferenceLossConfig)["kind"])
    ]
    hows += [PreferenceLossConfig(kind="ipo", average=False)]
    hows += [replace(how, sft_coef=0.2) for how in hows if how.kind in ("dpo", "rpo_bwd_kl", "simpo")]
    for how in hows:
        name = "-".join(["direct", how.kind, *([] if how.average else ["sums"]), *(["sft"] if how.sft_coef else [])])
        yield name, Case("policy", partial(_preference_loss.loss, how=how), paired(PAIRED), paired(ONE_PAIR))


def _cases() -> Iterator[tuple[str, Case]]:
    yield from _policy_cases()
    yield from _direct_cases()
    for clip in (0.2, 0.0):
        yield f"value-{clip}", Case("critic", partial(ppo.value_loss, clip=clip), valued(MANY), valued(FEW))
    for kind in get_args(_reward_pairs.Kind):
        loss = partial(_reward_pairs.loss, kind=kind)
        yield f"reward-{kind}", Case("reward", loss, rewarded(PAIRED), rewarded(ONE_PAIR))
    texts = [shared.sequences(*shapes, seed=7).batch() for shapes in (MANY, FEW)]
    yield "sft", Case("policy", sft.loss, texts[0], texts[1])
    centred = partial(_reward_pairs.loss, kind="bt", center_coef=0.3)
    yield "reward-centred", Case("reward", centred, rewarded(PAIRED), rewarded(ONE_PAIR))
    yield "regression", Case("attributes", _reward_ratings.loss, rated(MANY), rated(FEW))
    yield "steerlm2", Case("policy", partial(steerlm2.loss, num_samples=3), weighed(IN_THREES), weighed(FEW))


CASES = dict(_cases())


# Through the engine


class Observed(Engine):
    """An engine that keeps the gradient of its last step. Its rate is 0, so that a step changes no weight."""

    gradient: dict[str, Tensor]

    def _take_step(self) -> dict[str, float]:
        whole = (lambda p: p.grad) if self._section.zero_stage == 0 else safe_get_full_grad
        self.gradient = {name: whole(p).detach().clone() for name, p in self.head.model.named_parameters()}
        return super()._take_step()


class Setting(NamedTuple):
    """How the work is cut: ZeRO stage, attention, tokens of a micro-batch, whether the order is changed, which
    batch."""

    stage: int
    attention: str
    tokens: int
    shuffle: bool
    size: str = "many"


@functools.cache
def engine(kind: str, stage: int, attention: str, tokens: int) -> Observed:
    """The engine of a setting, made once: no step changes it."""
    section = PolicyConfig(
        path="unused",
        dtype="float32",
        zero_stage=stage,  # type: ignore[arg-type]
        max_tokens_per_micro_batch=tokens,
        optimizer=OptimizerConfig(lr=0.0, max_grad_norm=0.0),
    )
    return Observed(KINDS[kind].head(model_of(kind, attention)), section, torch.device("cpu"), total_steps=1)


def by_engine(case: Case, setting: Setting, batch: Batch | None = None) -> Result:
    """Gradient and metrics of one optimizer step on this rank's share."""
    own = engine(case.kind, setting.stage, setting.attention, setting.tokens)
    own.gradient = {}
    batch = batch or case.batch(setting.size)
    ordered = shared.shuffled(batch, 3) if setting.shuffle else batch
    metrics = own.update(shared.share(ordered), case.loss, **arguments(case, batch))
    return Result(own.gradient, metrics)


def arguments(case: Case, batch: Batch) -> dict[str, float]:
    """What the head needs to know beside the tokens."""
    return {"temperature": batch.temperature} if case.kind == "policy" else {}


ALL = 10**6
ONE_RANK = [
    [
        Setting(0, "packed", 1, True),
        Setting(1, "sdpa", 25, False),
        Setting(2, "packed", 20, True),
        Setting(3, "sdpa", ALL, True),
    ],
    [
        Setting(0, "sdpa", 1, True),
        Setting(1, "packed", ALL, True),
        Setting(2, "sdpa", 30, True),
        Setting(3, "packed", 12, False),
    ],
]
"""A loss takes one of these lists, its neighbour the other: every stage, and both layouts."""

TWO_RANKS = [
    Setting(0, "packed", 12, True),
    Setting(1, "sdpa", ALL, True),
    Setting(2, "packed", 1, False),
    Setting(3, "sdpa", 25, True),
    Setting(0, "sdpa", 25, False),
    Setting(1, "packed", 1, True),
    Setting(2, "sdpa", ALL, True),
    Setting(3, "packed", 12, True),
]
ONE_RANK_IDLE = [Setting(stage, "packed", 9, False, "few") for stage in (3, 0, 2, 1)]


def on_two(name: str) -> list[Setting]:
    """The settings of a loss: one that shares the work, two where the kind has few cases, and a batch that leaves the
    second rank without a sequence.

    Neighbours take others, so that each kind of loss, which has several neighbouring cases, meets all of them: an
    engine knows nothing of a loss but its gradient.
    """
    i = list(CASES).index(name)
    many = name.startswith(("reinforce", "clipped", "direct"))
    return [TWO_RANKS[i % 8], *(() if many else (TWO_RANKS[(i + 5) % 8],)), ONE_RANK_IDLE[i % 4]]


NOTHING = torch.empty(0, dtype=torch.int64)


def on_two_ranks() -> dict[str, Any]:
    """Gradients of all runs, metrics of steps without a sequence, and shares of the batches that are few."""
    runs = [(name, setting) for name in CASES for setting in on_two(name)]
    gradients_of = {(name, tuple(setting)): tuple(by_engine(CASES[name], setting)) for name, setting in runs}
    empty = {
        (name, stage): by_engine(CASES[name], Setting(stage, "packed", 12, False), CASES[name].many.select(NOTHING))[1]
        for name in ("sequence-sequence_mean_token_mean", "direct-dpo-sft", "value-0.2", "reward-bt", "sft")
        for stage in range(4)
    }
    few = {name: len(shared.share(case.few).sequences) for name, case in CASES.items()}
    return {"gradients": gradients_of, "empty": empty, "few": few}


def main(rank: int, port: int, folder: Path) -> None:
    """Compute everything on this rank."""
    distributed.initialize(distributed.join_store("127.0.0.1", port, 60.0), rank, 2, timeout_s=60.0)
    torch.save(on_two_ranks(), folder / f"{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
