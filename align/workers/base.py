"""Base classes: one rank of a role (`Worker`), its ranks (`WorkerGroup`), and its object in the driver (`Role`)."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import __version__
from align.checkpoint import FileRecord, write_json, write_tensors
from align.config import CudaOption, ModelConfig, RoleConfig, TrainedModelConfig
from align.data import chat, collate
from align.engines import distributed, optimizer_state
from align.engines.deepspeed import Engine, sharded_loading
from align.errors import SaveError
from align.models import export, exported_files, load, verify_export, weights
from align.models.exported_files import Exported
from align.roles import Future, LossFunction, Metrics
from align.run.display import Span
from align.types import Batch, Record
from align.utils import fault_injection

W = TypeVar("W", bound="Worker")
P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class WorkerSpec:
    """What a rank needs to start."""

    role: str
    rank: int
    world_size: int
    section: RoleConfig
    """The role's section of the recipe."""
    seed: int
    total_steps: int
    timeout_s: float
    """Seconds that a rank waits for the others to come up."""
    skip_non_finite: bool = False
    """Skip an optimizer step whose loss or gradient is not finite, instead of raising `DivergedError`."""
    exported: Exported | None = None
    """Contents of the exported folder's readme and config. None for a role that is not exported."""
    collective_timeout_s: float = 600.0
    """Timeout of a collective operation, in seconds."""
    shares_device: bool = False
    """True if another role has processes on the same slots. Then memory is given back after each call."""
    cuda: tuple[CudaOption, ...] = ()
    """``run.cuda``."""


@dataclass(frozen=True)
class WorkerResult(Record, Generic[T]):
    """Return value of a worker's method, and when it started and ended."""

    value: T
    span: Span


def worker_method(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], WorkerResult[T]]:
    """Decorate a method that the driver calls: it returns a `WorkerResult`. An injected fault may corrupt the value."""

    @functools.wraps(method)
    def timed(self: W, *args: P.args, **kwargs: P.kwargs) -> WorkerResult[T]:
        start = time.time()
        try:
            value = method(self, *args, **kwargs)
        finally:
            self.give_memory_back()
        number = fault_injection.corrupt("answer")
        return WorkerResult(value if number is None else _corrupted(value, number), (start, time.time()))

    return timed


def _corrupted(value: Any, number: float) -> Any:
    """``value`` with ``number`` as first element of its float tensors."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[0] = number
    elif is_dataclass(value) and not isinstance(value, type):
        tensors = {f.name: getattr(value, f.name) for f in fields(value)}
        value = replace(value, **{name: _corrupted(tensor, number) for name, tensor in tensors.items()})
    return value


class Worker:
    """One rank of a role. `start` joins the process group of the role, and then `load` loads the model."""

    stateless = False
    """True if a replacement process needs no state. Such workers can be restarted in place."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine

    def __init__(self, spec: WorkerSpec):
        self.spec = spec

    def give_memory_back(self) -> None:
        """Return what the allocator of this process keeps for later calls, if another role works on the same GPU.

        It keeps the peak of every phase otherwise, and the peaks of all roles would have to fit at the same time.
        """
        if self.spec.shares_device and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def open_store(self, host: str) -> int:
        """Open the role's `torch.distributed` store on rank 0. Returns its port, which the system picks."""
        self._store = distributed.open_store(host, self.spec.timeout_s)
        return self._store.port

    def start(self, host: str, port: int) -> None:
        """Join the other ranks, and load the model."""
        self.rendezvous = host, port
        distributed.set_cuda_options(self.spec.cuda)
        if self.spec.rank > 0:
            self._store = distributed.join_store(host, port, self.spec.timeout_s)
        spec = self.spec
        self.device = distributed.initialize(self._store, spec.rank, spec.world_size, spec.collective_timeout_s)
        self._prepare()

    def start_alone(self) -> None:
        """Start as the only rank, in the driver's process."""
        distributed.set_cuda_options(self.spec.cuda)
        self.device = distributed.initialize_alone()
        self._prepare()

    def _prepare(self) -> None:
        section = self.spec.section
        assert isinstance(section, ModelConfig)
        self.tokenizer = chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
        optimizer_state.seed_generators(self.spec.seed)
        with sharded_loading(section):
            self.load()

    def _causal_lm(self) -> PreTrainedModel:
        size, gaps = chat.vocab_size(self.tokenizer), chat.gaps(self.tokenizer)
        assert isinstance(self.spec.section, ModelConfig)
        return load.causal_lm(self.spec.section, size, self.spec.seed, gaps)

    def load(self) -> None:
        """Load the model of this role."""
        raise NotImplementedError


class TrainedWorker(Worker):
    """A rank whose model is trained."""

    stateless = False  # `PolicyWorker` inherits this before the True of `ReferenceWorker`
    _writing: futures.Future[list[FileRecord]] | None = None
    """A save in flight or finished, whose file records `saved` has not returned yet."""
    inference_arguments: Mapping[str, float] = MappingProxyType({})
    """Keyword arguments with which the head computes what plain transformers computes, to verify an export."""

    def _make_trainable(self, model: PreTrainedModel, task: str) -> None:
        """Add LoRA adapters and gradient checkpointing, if the recipe has them."""
        section = self.spec.section
        assert isinstance(section, TrainedModelConfig)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if section.lora:
            load.add_lora(model, section.lora, task=task, key=f"{self.spec.role}.lora.targets")

    def _forward_arguments(self, batch: Batch) -> dict[str, float]:
        """Keyword arguments of the head's forward pass for a batch, beside its tokens."""
        return {}

    @worker_method
    def update(self, batch: Batch, loss: LossFunction) -> Metrics:
        """One optimizer step; ``batch`` is this rank's part."""
        arguments = self._forward_arguments(batch)
        return self.engine.update(batch, loss, skip_non_finite=self.spec.skip_non_finite, **arguments)

    @functools.cached_property
    def _writer(self) -> futures.Executor:
        return futures.ThreadPoolExecutor(1, thread_name_prefix="save")

    @worker_method
    def save(self, folder: Path, overlap: bool) -> list[FileRecord]:
        """Write this rank's part of the training state below ``folder / role`` (`align.engines.optimizer_state`).

        Tensors are copied before this returns. With ``overlap`` a thread writes the copy, and `saved` returns the
        records. `save` waits for an earlier save with unfetched records, and drops those. Raises `SaveError`.
        """
        if self._writing is not None:
            futures.wait([self._writing])
        role, rank = self.spec.role, self.spec.rank
        files = {
            optimizer_state.tensors_file(rank): self.engine.training.collect(),
            optimizer_state.random_file(rank): optimizer_state.random_state(),
        }
        counters = self.engine.counters() if rank == 0 else None
        self._writing = self._writer.submit(_write, folder, role, files, counters)
        return [] if overlap else self._written()

    @worker_method
    def saved(self) -> list[FileRecord]:
        """Wait for an overlapping save and return its records, once. Empty if there is none. Raises `SaveError`."""
        return self._written()

    def _written(self) -> list[FileRecord]:
        writing, self._writing = self._writing, None
        return [] if writing is None else writing.result()

    @worker_method
    def restore(self, folder: Path) -> None:
        """Restore what `save` wrote, on any number of ranks and at any ZeRO stage. Raises `ModelError`."""
        role_folder = folder / self.spec.role
        self.engine.restore(role_folder)
        optimizer_state.restore_random_state(role_folder, self.spec.seed, self.engine.step)

    @worker_method
    def state_bytes(self) -> int:
        """Approximate size in bytes of what `save` would write on this rank."""
        random_bytes = sum(tensor.nbytes for tensor in optimizer_state.random_state().values())
        return self.engine.training.num_bytes() + random_bytes

    @worker_method
    def export(self, folder: Path, extra: Mapping[str, str]) -> None:
        """Write the model in Hugging Face layout, with the ``extra`` files. Only rank 0 writes.

        Raises `ModelError` if the outputs of the exported model differ from those of the trained model.
        """
        section, writes = self.spec.section, self.spec.rank == 0
        assert isinstance(section, TrainedModelConfig)
        # The expected outputs come from the engine, whose weights may still be sharded and have separate adapters.
        expected = self.engine.infer(verify_export.probe(self.tokenizer), **self.inference_arguments)
        base = weights.stored_dtype(section) if section.lora else None
        dtype = base and export.merged_dtype(self.model, self.engine.full, base)
        state = export.state_dict(self.model, self.engine.full, keep=writes, dtype=dtype)
        if writes:
            files = {**self._readme(), **exported_files.code(section), **extra}
            export.write(self.model, self.tokenizer, state, folder, files, expected)

    def _readme(self) -> dict[str, str]:
        """``README.md`` of the exported folder, text by name."""
        return {}

    def _origin(self, exported: Exported) -> str:
        """One sentence about how the model was trained."""
        section = self.spec.section
        start = f"random weights of a {section.init['model_type']}" if section.init else f"`{section.path}`"
        commit = f" at revision `{section.revision}`" if section.revision and not section.init else ""
        how = f"algorithm `{exported.algorithm}`, optimizer steps: {self.engine.step}"
        return f"Trained by align {__version__}, {how}, from {start}{commit}."


def _write(
    folder: Path, role: str, files: Mapping[str, Mapping[str, torch.Tensor]], counters: Mapping[str, Any] | None
) -> list[FileRecord]:
    try:
        records = [write_tensors(folder, f"{role}/{name}", tensors) for name, tensors in files.items()]
        if counters is not None:
            records.append(write_json(folder, f"{role}/{optimizer_state.COUNTERS}", counters))
    except SaveError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise SaveError(f"the training state cannot be written: {cause}", where=str(folder / role)) from error
    return records


@dataclass(frozen=True)
class ChainedFuture(Generic[U]):
    """The result of ``second``, which is valid only if the call ``first`` succeeded."""

    first: Future[Any]
    second: Future[U]

    def result(self) -> U:
        self.first.result()
        return self.second.result()

    def done(self) -> bool:
        return self.first.done() and self.second.done()


class WorkerGroup(ABC):
    """The workers of a role: processes on Ray, or one object in this process."""

    world_size: int

    @abstractmethod
    def call(
        self,
        phase: str,
        method: Callable[..., WorkerResult[T]],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[T]], U],
    ) -> Future[U]:
        """Call ``method`` of the worker class on every rank, each with its item of ``arguments``; ``gather`` gets their
        values. ``phase`` names the time in the metrics."""

    @abstractmethod
    def start(self, method: Callable[..., WorkerResult[T]], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on every rank without fetching the results.

        Returns one reference for each rank. Passed as an argument of a call of another role, it arrives there as the
        `WorkerResult`, without a copy in the driver. The phase is ``sync``."""

    in_process = False
    """True if the calls run one after another in this process."""

    def everywhere(self, *arguments: Any) -> list[tuple[Any, ...]]:
        """The same arguments for every rank."""
        return [arguments] * self.world_size


class Role:
    """A role in the driver, as algorithms call it. It splits work over the ranks and gathers their results."""

    worker: type[Worker]

    def __init__(self, ranks: WorkerGroup, section: RoleConfig):
        self.ranks, self.section = ranks, section


class TrainedRole(Role):
    """A role whose model is trained; its ranks are `TrainedWorker`s."""

    update_phase = "update"

    def update(self, batch: Batch, loss: LossFunction) -> Future[Metrics]:
        """One optimizer step. Every rank returns the same metrics."""
        rows = collate.split(batch.sequences, batch.unit, self.ranks.world_size)
        arguments = [(batch.select(index), loss) for index in rows]
        return self.ranks.call(self.update_phase, TrainedWorker.update, arguments, lambda parts: parts[0])

    def save(self, folder: Path, overlap: bool) -> Future[list[FileRecord]]:
        return self.ranks.call("save", TrainedWorker.save, self.ranks.everywhere(folder, overlap), _concatenated)

    def saved(self) -> Future[list[FileRecord]]:
        return self.ranks.call("save_wait", TrainedWorker.saved, self.ranks.everywhere(), _concatenated)

    def restore(self, folder: Path) -> Future[None]:
        return self.ranks.call("load", TrainedWorker.restore, self.ranks.everywhere(folder), lambda parts: None)

    def state_bytes(self) -> Future[int]:
        return self.ranks.call("save", TrainedWorker.state_bytes, self.ranks.everywhere(), sum)

    def counters(self) -> dict[str, Any]:
        """Counters that this object keeps in the driver, for a checkpoint; JSON."""
        return {}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Continue from `counters` of a checkpoint."""

    def export(self, folder: Path, extra: Mapping[str, str] | None = None) -> Future[None]:
        """Write the model in Hugging Face layout, with the ``extra`` files: text by name."""
        arguments = self.ranks.everywhere(folder, extra or {})
        return self.ranks.call("export", TrainedWorker.export, arguments, lambda parts: None)


def _concatenated(parts: Sequence[Sequence[FileRecord]]) -> list[FileRecord]:
    return [record for part in parts for record in part]


def by_rank(total: int, world_size: int) -> list[torch.Tensor]:
    """Indices 0..total-1, assigned to the ranks round-robin."""
    return [torch.arange(total)[rank::world_size] for rank in range(world_size)]


def merged(parts: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Undo a split: ``parts[r]`` holds the rows ``rows[r]``; (B, T) parts are padded with 0 to the longest T."""
    index = torch.cat(list(rows))
    if parts[0].ndim == 1:
        out = torch.zeros(len(index), dtype=parts[0].dtype)
        out[index] = torch.cat(list(parts))
        return out
    out = torch.zeros(len(index), max(part.shape[1] for part in parts), dtype=parts[0].dtype)
    for part, row in zip(parts, rows, strict=True):
        out[row, : part.shape[1]] = part
    return out
