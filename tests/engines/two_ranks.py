"""What the engine tests run, on one rank in the test's process or on two in processes of this script.

As a script: ``two_ranks.py <rank> <port> <folder>`` joins the group, runs every function of `ON_TWO_RANKS` and writes
what they return to ``<folder>/<rank>.pt``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from align.config import OptimizerConfig, PolicyConfig, ReferenceConfig, SamplingConfig
from align.data import collate
from align.engines import distributed
from align.engines.decoder import generate
from align.engines.deepspeed import Engine
from align.models import export
from align.models.heads import LastTokenScore, TokenLogprobs
from align.ops import logprobs
from align.roles import Loss
from align.types import Batch, Packed, Prompts, Sequences

TEMPERATURE = 0.7
TOTAL_STEPS = 6
logprobs.MIN_CHUNK = 8  # several chunks of logits in a pass, at every ZeRO stage


def llama(attention: str, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A tiny random Llama, always the same."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=changes.pop("tied", False),
        pad_token_id=None,
        **changes,
    )
    return auto.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def sequences(prompts: list[int], responses: list[list[int]], seed: int = 0) -> Sequences:
    """Random tokens: ``prompts`` holds lengths of prompts, ``responses`` the lengths of the responses to each."""
    source = torch.Generator().manual_seed(seed)
    row = lambda length: torch.randint(0, 50, (length,), generator=source).tolist()  # noqa: E731
    return Sequences(
        Packed.from_lists([row(length) for length in prompts]),
        Packed.from_lists([row(length) for lengths in responses for length in lengths]),
        torch.tensor([i for i, lengths in enumerate(responses) for _ in lengths]),
    )


def token_batch(seed: int, prompts: list[int], responses: list[list[int]]) -> Batch:
    """Sequences with a weight for each token, some of them masked out of the loss by weight 0."""
    rows = sequences(prompts, responses, seed)
    source = torch.Generator().manual_seed(seed + 100)
    weight_BT = torch.randn(rows.mask_BT.shape, generator=source)
    keep_BT = rows.mask_BT & (torch.rand(rows.mask_BT.shape, generator=source) < 0.8)
    return Batch(rows, {"weight_BT": weight_BT, "keep_BT": keep_BT}, unit=1, temperature=TEMPERATURE)


def weighted(logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, keep_BT: Tensor) -> Loss:
    """A weighted mean over the kept tokens, with metrics that have counts of their own."""
    total = -torch.where(keep_BT, logprob_BT * weight_BT, 0.0).sum()
    heavy_BT = keep_BT & (weight_BT > 0)
    metrics = {
        "entropy": (torch.where(mask_BT, entropy_BT, 0.0).sum(), mask_BT.sum()),
        "heavy": (torch.where(heavy_BT, logprob_BT, 0.0).sum(), heavy_BT.sum()),
        "never": (torch.zeros(()), torch.zeros(())),
    }
    return Loss(total, keep_BT.sum(), metrics)


def preferred(logprob_BT: Tensor, mask_BT: Tensor, strength_B: Tensor, **_: Tensor) -> Loss:
    """A loss of pairs; fails when a pair is parted."""
    strength_P2 = strength_B.view(-1, 2)
    assert torch.equal(strength_P2[:, 0], strength_P2[:, 1])
    total_P2 = torch.where(mask_BT, logprob_BT, 0.0).sum(1).view(-1, 2)
    loss_P = -torch.nn.functional.logsigmoid(0.1 * (total_P2[:, 0] - total_P2[:, 1])) * strength_P2[:, 0]
    return Loss(loss_P.sum(), torch.tensor(len(loss_P)), {})


def nan_if_marked(logprob_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, **_: Tensor) -> Loss:
    """Not finite where a weight is."""
    return Loss((torch.where(mask_BT, logprob_BT, 0.0) * weight_BT).sum(), mask_BT.sum(), {})


def nothing(logprob_BT: Tensor, mask_BT: Tensor, **_: Tensor) -> Loss:
    """Counts no token."""
    return Loss(torch.where(mask_BT, logprob_BT, 0.0).sum(), torch.zeros(()), {})


def optimizer(max_grad_norm: float) -> OptimizerConfig:
    # A large eps: the update feels the size of the gradient, and rounding of gradients near 0 is not blown up to lr.
    return OptimizerConfig(
        lr=2e-2,
        betas=(0.9, 0.95),
        eps=1e-3,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        schedule="linear",
        warmup_steps=2,
        min_lr_ratio=0.1,
    )


RATES = [1e-2, 2e-2, 2e-2 * (1 - 0.9 / 4)]
"""Of the first three steps: warm-up over two, then a quarter of the way from the peak down to a tenth of it."""


@dataclass(frozen=True)
class Task:
    """Batches, one a step, and how the step is taken."""

    batches: tuple[Batch, ...]
    loss: Callable[..., Loss]
    max_grad_norm: float
    tied: bool = False


SHAPES = ([3, 9, 1, 5, 14], [[4, 7], [1, 2], [6], [0, 12, 3], [5, 2]])


def _pairs(seed: int) -> Batch:
    rows = sequences([4, 7, 2, 5], [[3, 6], [8, 1], [2, 2], [5, 9]], seed)
    return Batch(rows, {"strength_B": torch.tensor([1.0, 2.0, 3.0, 1.5]).repeat_interleave(2)}, 2, TEMPERATURE)


TASKS = {
    "clipped": Task(tuple(token_batch(seed, *SHAPES) for seed in range(3)), weighted, 0.3),
    "unclipped": Task(tuple(token_batch(seed, *SHAPES) for seed in range(3)), weighted, 0.0),
    "tied": Task(tuple(token_batch(seed, *SHAPES) for seed in range(2)), weighted, 0.0, tied=True),
    "one prompt": Task(tuple(token_batch(seed, [6], [[3, 5, 1]]) for seed in range(2)), weighted, 0.0),
    # The long prompt's rank makes one pass, the other one many.
    "unequal": Task(
        tuple(token_batch(seed, [40, 3, 4, 5, 3, 4], [[20], [4], [5], [6], [7], [8]]) for seed in range(2)),
        weighted,
        0.0,
    ),
    "pairs": Task((_pairs(0), _pairs(1)), preferred, 0.0),
}


def by_hand(task: Task) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and metrics in plain PyTorch: one padded forward pass of the whole batch, AdamW, clip_grad_norm_."""
    model = llama("eager", tied=task.tied).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-3)
    metrics = []
    for batch, rate in zip(task.batches, RATES, strict=False):
        logprob_BT, entropy_BT = by_hand_logprobs(model, batch.sequences, batch.temperature)
        mask_BT = batch.sequences.mask_BT
        value = task.loss(logprob_BT=logprob_BT, entropy_BT=entropy_BT, mask_BT=mask_BT, **batch.columns)
        adamw.zero_grad()
        (value.sum / value.count).backward()
        limit = task.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        own = {name: float(s.detach() / n) if n else 0.0 for name, (s, n) in value.metrics.items()}
        metrics.append({"loss": float(value.sum.detach() / value.count), "grad_norm": float(norm), "lr": rate, **own})
    return {name: p.detach().clone() for name, p in model.named_parameters()}, metrics


def by_hand_logprobs(model: Any, rows: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (B, T), from one right-padded pass over whole sequences."""
    prompts, responses = rows.prompts.lists(), rows.responses.lists()
    whole = [prompts[p] + r for p, r in zip(rows.prompt_B.tolist(), responses, strict=True)]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
    attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    table = (model(ids, attention_mask=attention, use_cache=False).logits / temperature).log_softmax(-1)
    logprob_BT, entropy_BT = torch.zeros(rows.mask_BT.shape), torch.zeros(rows.mask_BT.shape)
    for i, response in enumerate(responses):
        start = len(whole[i]) - len(response)
        for t, token in enumerate(response):
            at = table[i, start + t - 1]
            logprob_BT[i, t] = at[token]
            entropy_BT[i, t] = -(at.exp() * at).sum()
    return logprob_BT, entropy_BT


def section(
    stage: int, max_tokens_per_micro_batch: int = 30, max_grad_norm: float = 0.0, dtype: Any = "float32"
) -> PolicyConfig:
    """The policy section of these tests."""
    return PolicyConfig(
        path="unused",
        dtype=dtype,
        zero_stage=stage,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        optimizer=optimizer(max_grad_norm),
    )


def engine_of(model: Any, section: PolicyConfig | ReferenceConfig, head: Any = TokenLogprobs) -> Engine:
    """An engine on the group's device."""
    return Engine(head(model), section, torch.device("cpu"), TOTAL_STEPS)


def share(batch: Batch) -> Batch:
    """This rank's part of a batch."""
    return batch.select(collate.split(batch.sequences, batch.unit, dist.get_world_size())[dist.get_rank()])


def weights(model: Any, engine: Engine) -> dict[str, Tensor]:
    """Every weight, whole."""
    return export.state_dict(model, engine.full, keep=True)


def shuffled(batch: Batch, seed: int) -> Batch:
    """The same batch with its units in another order."""
    units = torch.randperm(len(batch.sequences) // batch.unit, generator=torch.Generator().manual_seed(seed))
    return batch.select((units[:, None] * batch.unit + torch.arange(batch.unit)).flatten())


def by_engine(
    task: Task, stage: int, attention: str, max_tokens_per_micro_batch: int, shuffle: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and metrics after the steps of a task."""
    model = llama(attention, tied=task.tied)
    engine = engine_of(model, section(stage, max_tokens_per_micro_batch, task.max_grad_norm))
    metrics = []
    for step, batch in enumerate(task.batches):
        ordered = shuffled(batch, step) if shuffle else batch
        metrics.append(engine.update(share(ordered), task.loss, temperature=batch.temperature))
    return weights(model, engine), metrics


RUNS = [
    *[("clipped", stage, "packed", 16, False) for stage in range(4)],
    *[("clipped", stage, "sdpa", 45, True) for stage in range(4)],
    *[("unclipped", stage, "packed", 30, True) for stage in range(4)],
    *[("tied", stage, "packed", 30, False) for stage in range(4)],
    *[("one prompt", stage, "packed", 8, False) for stage in range(4)],
    *[("unequal", stage, "packed", 10, False) for stage in (2, 3)],
    *[("pairs", stage, "packed", 12, True) for stage in (0, 1, 3)],
]
"""Task, ZeRO stage, attention, tokens of a micro-batch, whether the order is changed."""


def steps() -> dict[Any, Any]:
    """Every run of `RUNS`."""
    return {run: by_engine(TASKS[run[0]], *run[1:]) for run in RUNS}


def passes() -> list[int]:
    """Forward passes that each rank needs for the first unequal batch."""
    rows = TASKS["unequal"].batches[0].sequences
    parts = [rows.select(index) for index in collate.split(rows, 1, 2)]
    return [len(collate.micro_batches(part, 1, 10)) for part in parts]


def refused_and_skipped(stage: int) -> dict[str, Any]:
    """A loss that is not finite on one rank, then a step without anything to learn from, then a good step."""
    model = llama("packed")
    engine = engine_of(model, section(stage))
    batch = TASKS["unclipped"].batches[0]
    before, message = weights(model, engine), ""
    bad_BT = batch.columns["weight_BT"].clone()
    bad_BT[-1, 0] = float("nan")
    bad = Batch(batch.sequences, {"weight_BT": bad_BT}, 1, TEMPERATURE)
    try:
        engine.update(share(bad), nan_if_marked, temperature=TEMPERATURE)
    except FloatingPointError as error:
        message = str(error)
    refused = weights(model, engine)
    skip = engine.update(share(batch), nothing, temperature=TEMPERATURE)
    skipped = weights(model, engine)
    good = engine.update(share(batch), weighted, temperature=TEMPERATURE)
    return {
        "message": message,
        "before": before,
        "refused": refused,
        "skip": skip,
        "skipped": skipped,
        "good": good,
        "after": weights(model, engine),
    }


def frozen(stage: int) -> list[Tensor]:
    """Log-probabilities and scores of frozen models, the second time with work for rank 0 only."""
    reference = engine_of(llama("packed"), ReferenceConfig(path="unused", dtype="float32", zero_stage=stage))
    scorer = llama("packed", auto=AutoModelForSequenceClassification, num_labels=1)
    reward = engine_of(scorer, ReferenceConfig(path="unused", dtype="float32", zero_stage=stage), LastTokenScore)
    rows = sequences(*SHAPES)
    one = sequences([6], [[3, 5, 1]])
    answers = []
    for part in (rows, one):
        mine = part.select(collate.split(part, 1, dist.get_world_size())[dist.get_rank()])
        answers.append(reference.infer(mine, temperature=TEMPERATURE)["logprob_BT"])
        answers.append(reward.infer(mine)["score_B"])
    return answers


PROMPTS = Prompts(Packed.from_lists([[3, 4, 5], [6], [7, 8, 9, 10, 11]]), torch.arange(3), (2,), step=4)
SAMPLING = SamplingConfig(num_samples=3, max_tokens=12)


def sampled_from_shards() -> list[list[int]]:
    """Responses to all prompts from weights that are sharded over the ranks."""
    model = llama("packed")
    engine = engine_of(model, section(3))
    with engine.full(model.parameters()):
        return generate(model, PROMPTS, SAMPLING, 5, num_slots=4).sequences.responses.lists()


def bfloat16() -> list[float]:
    """Loss of a batch that is learned by heart."""
    engine = engine_of(llama("packed", torch.bfloat16), section(1, dtype="bfloat16"))
    batch = token_batch(0, *SHAPES)
    batch = Batch(batch.sequences, {**batch.columns, "weight_BT": torch.ones(batch.columns["weight_BT"].shape)}, 1, 1.0)
    return [engine.update(share(batch), weighted, temperature=1.0)["loss"] for _ in range(6)]


ON_TWO_RANKS: dict[str, Callable[[], Any]] = {
    "steps": steps,
    "passes": passes,
    "refused": lambda: {stage: refused_and_skipped(stage) for stage in range(4)},
    "frozen": lambda: {stage: frozen(stage) for stage in (0, 3)},
    "sampled": sampled_from_shards,
    "bfloat16": bfloat16,
}


def main(rank: int, port: int, folder: Path) -> None:
    """Run everything on this rank."""
    distributed.initialize(distributed.join_store("127.0.0.1", port, 60.0), rank, 2, timeout_s=60.0)
    answers = {name: run() for name, run in ON_TWO_RANKS.items()}
    torch.save(answers, folder / f"{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
