"""Training that is saved, restored and spoilt, on one rank in the test's process or on two in processes of this script.

As a script: ``resuming.py <rank> <port> <folder> <part>`` joins the group, runs that part of `PARTS` on the folder and
writes what it returns to ``<folder>/<rank>.pt``.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config import LoraConfig, PolicyConfig
from align.engines import distributed, optimizer_state
from align.engines.deepspeed import Engine
from align.errors import DivergedError
from align.models import load
from align.models.heads import LastTokenScore, TokenLogprobs, TokenValues
from align.roles import Loss
from align.types import Batch
from align.utils import fault_injection
from align.workers.base import TrainedWorker, WorkerSpec

sys.path.append(str(Path(__file__).parent))  # pytest imports test files by their path and leaves sys.path alone
shared: Any = importlib.import_module("two_ranks")


class OddValues(TokenValues):
    """Values with a parameter of three elements, which no number of ranks above 1 divides without padding."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.odd = nn.Parameter(torch.tensor([0.5, 0.25, 0.25], dtype=model.dtype))

    def forward(self, layout: Any) -> dict[str, Tensor]:
        return {"value_BT": super().forward(layout)["value_BT"] * self.odd.sum().float()}


def valued(value_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor, keep_BT: Tensor) -> Loss:
    """Squared distance to the columns' weights."""
    return Loss(torch.where(keep_BT, (value_BT - weight_BT) ** 2, 0.0).sum(), keep_BT.sum(), {})


def scored(score_B: Tensor, mask_BT: Tensor, strength_B: Tensor) -> Loss:
    """Bradley-Terry."""
    difference_P = score_B.view(-1, 2)[:, 0] - score_B.view(-1, 2)[:, 1]
    return Loss(-torch.nn.functional.logsigmoid(difference_P).sum(), torch.tensor(len(difference_P)), {})


class Kind(NamedTuple):
    """A model, what is read from it and how it learns."""

    head: Any = TokenLogprobs
    auto: Any = AutoModelForCausalLM
    model: dict[str, Any] = {}  # noqa: RUF012 - never changed
    lora: bool = False
    offload: bool = False
    loss: Callable[..., Loss] = shared.weighted


KINDS = {
    "policy": Kind(),
    "tied": Kind(model={"tied": True}),
    "lora": Kind(lora=True),
    "offload": Kind(offload=True),
    "critic": Kind(OddValues, AutoModelForSequenceClassification, {"num_labels": 1}, loss=valued),
    "reward": Kind(LastTokenScore, AutoModelForSequenceClassification, {"num_labels": 1}, loss=scored),
}


class Case(NamedTuple):
    """What is trained, and how it is held."""

    kind: str
    stage: int
    dtype: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


HELD = [*((stage, "float32") for stage in range(4)), *((stage, "bfloat16") for stage in (1, 2, 3))]
CASES = [Case(kind, *held) for kind in KINDS for held in HELD if kind != "offload" or held[0]]
ON_TWO = [
    case
    for case in CASES
    if case.kind == "policy" or not case.stage or (case.stage + list(KINDS).index(case.kind)) % 2 == len(case.dtype) % 2
]
"""For two ranks, one dtype at each stage of a kind: neighbours take turns."""


class Trainee(TrainedWorker):
    """A rank of a role, without Ray and without a tokenizer."""

    def _forward_arguments(self, batch: Batch) -> dict[str, float]:
        return {"temperature": batch.temperature} if isinstance(self.engine.head, TokenLogprobs) else {}

    def learn(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on this rank's share of the batch."""
        return self.update(shared.share(batch), KINDS[self.spec.role].loss).value


def trainee(case: Case) -> Trainee:
    """A fresh one, always the same."""
    kind = KINDS[case.kind]
    model = shared.llama("packed", getattr(torch, case.dtype), kind.auto, **kind.model)
    if kind.lora:
        load.add_lora(model, LoraConfig(rank=3, dropout=0.3), task="CAUSAL_LM")
    section = PolicyConfig(
        path="unused",
        dtype=case.dtype,  # type: ignore[arg-type]
        zero_stage=case.stage,
        max_tokens_per_micro_batch=30,
        offload_optimizer=kind.offload,
        optimizer=shared.optimizer(0.3),
    )
    world_size = dist.get_world_size()
    worker = Trainee(WorkerSpec(case.kind, dist.get_rank(), world_size, section, 7, shared.TOTAL_STEPS, 60.0))
    worker.engine = Engine(kind.head(model), section, torch.device("cpu"), shared.TOTAL_STEPS)
    return worker


def batches(kind: str, first: int, last: int) -> list[Batch]:
    """Those of steps first..last - 1."""
    if kind == "reward":
        return [shared._pairs(step) for step in range(first, last)]
    return [shared.token_batch(step, *shared.SHAPES) for step in range(first, last)]


def image(worker: Trainee) -> dict[str, Tensor]:
    """All that this rank holds: pieces, the weights that the model computes with, counters."""
    found = worker.engine.training.collect()
    for name, parameter in worker.engine.head.named_parameters():
        with worker.engine.full([parameter]):
            found[f"computes {name}"] = parameter.detach().clone()
    counters = worker.engine.counters()
    return found | {"step": torch.tensor([counters["step"], *counters["adam_steps"].values()])}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    raw = lambda x: (x.dtype, x.shape, x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())  # noqa: E731
    return [name for name, tensor in ours.items() if raw(tensor) != raw(theirs[name])]


def seed_everything(seed: int) -> None:
    """All generators that a checkpoint holds."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


# Exact resume


def resumed(case: Case, folder: Path) -> dict[str, list[str]]:
    """What differs from a run without a checkpoint: a step, a checkpoint, then another step without a pause, in a fresh
    worker, and in one that trained past the checkpoint."""
    first, second = batches(case.kind, 0, 2)
    seed_everything(5 + dist.get_rank())
    straight = trainee(case)
    straight.learn(first)
    middle, noise = image(straight), optimizer_state.random_state()
    numbers = straight.learn(second)
    end = image(straight)

    seed_everything(5 + dist.get_rank())
    saving = trainee(case)
    saving.learn(first)
    overlap = case.stage % 2 == 1
    records = saving.save(folder, overlap).value
    continued = saving.learn(second)
    records += saving.saved().value
    there = sorted(record.name for record in records if (folder / record.name).stat().st_size == record.size)
    rank = dist.get_rank()
    own = [f"{case.kind}/rank-{rank:05d}.safetensors", f"{case.kind}/rng-{rank:05d}.safetensors"]
    expected = sorted([*own, *([f"{case.kind}/engine.json"] if rank == 0 else [])])
    found = {
        "the same end with a save": differences(image(saving), end),
        "the same numbers with a save": [] if continued == numbers else ["metrics"],
        "files": [] if there == expected else [str(there)],
    }
    dist.barrier()
    seed_everything(99)
    for what, worker in (("fresh", trainee(case)), ("stepped", saving)):
        worker.restore(folder)
        found[f"{what}, restored"] = differences(image(worker), middle) + differences(
            optimizer_state.random_state(), noise
        )
        again = worker.learn(second)
        found[f"{what}, end"] = differences(image(worker), end) + ([] if again == numbers else ["metrics"])
    return found


# Other stages and numbers of ranks

CROSSED = [*(Case("critic", stage, "float32") for stage in range(4))]
CROSSED += [Case("lora", stage, "bfloat16") for stage in (1, 2, 3)]


CROSSINGS = [
    (case, there, other, here)
    for case in CROSSED
    for other in CROSSED
    for there in (1, 2)
    for here in (1, 2)
    if case.kind == other.kind and (there != here or (case.stage != other.stage and case.dtype == "float32"))
]
"""What was left by how many ranks, and what takes it up on how many."""
PAIRWISE = [
    (case, there, other, here)
    for case, there, other, here in CROSSINGS
    if (other.stage - case.stage) % 4 <= 1 and (there != here or there == 2)
]
"""Those of every change: each stage from and to another number of ranks, into itself and into the one after it."""


def leave(case: Case, folder: Path) -> None:
    """Train, save to ``at``, and train on, see `go_on`."""
    seed_everything(3)
    worker = trainee(case)
    for batch in batches(case.kind, 0, 2):
        worker.learn(batch)
    save(worker, folder / "at")
    load_counters(worker, folder)


def take_up(case: Case, source: Path, folder: Path) -> None:
    """Restore what was left in ``source``, save it again to ``at``, and train on."""
    worker = trainee(case)
    worker.restore(source / "at")
    save(worker, folder / "at")
    load_counters(worker, folder)


def take_up_all(folder: Path, crossings: list[tuple[Case, int, Case, int]]) -> None:
    """Those of the crossings that lead to this number of ranks."""
    for case, there, other, here in crossings:
        if here == dist.get_world_size():
            left, taken = f"left-{there}", f"taken-{here}"
            take_up(other, folder / left / case.name, folder / taken / f"{there}-{case.name}" / other.name)


def load_counters(worker: Trainee, folder: Path) -> None:
    """Two more steps, and a save to ``after``. Not in bfloat16, where ranks round the gradients of their own
    micro-batches."""
    if worker.spec.section.dtype == "float32":
        for batch in batches(worker.spec.role, 2, 4):
            worker.learn(batch)
        save(worker, folder / "after")


def save(worker: Trainee, folder: Path) -> None:
    """Into a new folder, of all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    worker.save(folder, False)
    dist.barrier()


def assembled(folder: Path) -> dict[str, Tensor]:
    """The whole flat tensors of a saved role, put together by hand."""
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for path in sorted(folder.glob("*/rank-*.safetensors")):
        for key, tensor in load_file(path).items():
            name, kind, start = key.split("|")
            pieces[f"{name}|{kind}"][int(start)] = tensor
    return {name: torch.cat([found[start] for start in sorted(found)]) for name, found in pieces.items()}


# Numbers that are not finite

SPOILT = [Case("policy", *held) for held in HELD]
SPOILT += [Case("offload", 1, "float32"), Case("offload", 2, "bfloat16"), Case("offload", 3, "bfloat16")]
WAYS = [*(f"{number}_{what}" for number in ("nan", "inf") for what in ("loss", "gradient")), "steep"]
"""Faults of `align.utils.fault_injection`, and a loss of its own."""


def steep(logprob_BT: Tensor, mask_BT: Tensor, **_: Tensor) -> Loss:
    """A finite loss with a gradient that is not."""
    zero_BT = torch.where(mask_BT, logprob_BT - logprob_BT.detach(), 0.0)
    return Loss(zero_BT.abs().sqrt().sum(), mask_BT.sum(), {})


def spoil(worker: Trainee, way: str, batch: Batch) -> dict[str, float]:
    """A step that is spoilt on the last rank by a fault, or by its loss on all."""
    if way == "steep":
        return worker.update(shared.share(batch), steep).value
    fault_injection.arm(None)
    if dist.get_rank() == dist.get_world_size() - 1:
        fault_injection.raise_fault(way)
    return worker.learn(batch)


@functools.cache
def spoilt(case: Case) -> dict[str, dict[str, Any]]:
    """For each way: a step that is spoilt and skipped, one that is spoilt and raises, and a good one, beside a run that
    has an empty step instead."""
    worker, other, found = trainee(case), trainee(case), {}
    steps = batches(case.kind, 0, 1 + len(WAYS))
    for one in (worker, other):
        one.learn(steps[0])
    for way, batch in zip(WAYS, steps[1:], strict=True):
        before, message = image(worker), ""
        worker.spec = replace(worker.spec, skip_non_finite=True)
        metrics = spoil(worker, way, batch)
        skipped = differences(image(worker), before)
        worker.spec = replace(worker.spec, skip_non_finite=False)
        try:
            spoil(worker, way, batch)
        except DivergedError as error:
            message = str(error)
        found[way] = {
            "metrics": metrics,
            "changed by the skip": skipped,
            "message": message,
            "changed by the error": differences(image(worker), before),
            "empty": other.update(shared.share(batch), shared.nothing).value,
            "good": [one.learn(batch) for one in (worker, other)],
            "end": differences(image(worker), image(other)),
        }
    return found


# Two ranks


def _resumed_on_two(folder: Path) -> dict[Case, Any]:
    found = {case: resumed(case, _new(folder / "exact" / case.name)) for case in ON_TWO}
    return found | _crossed_on_two(folder, PAIRWISE)


def _crossed_on_two(folder: Path, crossings: list[tuple[Case, int, Case, int]]) -> dict[Case, Any]:
    for case in CROSSED:
        leave(case, folder / "left-2" / case.name)
    take_up_all(folder, crossings)
    return {}


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


PARTS: dict[str, Callable[[Path], dict[Case, Any]]] = {
    "resumed": _resumed_on_two,
    "crossed": lambda folder: _crossed_on_two(folder, CROSSINGS),
    "spoilt": lambda folder: {case: spoilt(case) for case in SPOILT},
}


def on_two_ranks(part: str, folder: Path) -> list[Any]:
    """What two processes return of a part, by rank."""
    store = distributed.open_store("127.0.0.1", 60.0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    logs = [(folder / f"{rank}.log").open("w") for rank in (0, 1)]
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(store.port), str(folder), part],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        codes = [rank.wait(timeout=500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for log in logs:
            log.close()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def main(rank: int, port: int, folder: Path, part: str) -> None:
    """Run a part on this rank."""
    gc.freeze()  # DeepSpeed collects garbage often, and what was imported is none
    distributed.initialize(distributed.join_store("127.0.0.1", port, 60.0), rank, 2, timeout_s=60.0)
    found = {case.name: value for case, value in PARTS[part](folder).items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
