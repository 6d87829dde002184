"""Workers without a model that do as they are told, in roles of two ranks with a gloo group."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ray.exceptions import ObjectStoreFullError

from align.config import ModelConfig
from align.engines import distributed
from align.errors import DivergedError
from align.workers.base import Worker, WorkerResult, WorkerSpec, worker_method

GROUP_TIMEOUT_S = 4.0


class Toy(Worker):
    """A worker with state: it counts."""

    def start(self, host: str, port: int) -> None:
        self.count = 0
        if self.spec.rank > 0:
            self._store = distributed.join_store(host, port, self.spec.timeout_s)
        self._group("first")

    @worker_method
    def regroup(self, name: str) -> None:
        """A new process group in place of one that was left in the middle of a call."""
        dist.destroy_process_group()
        self._group(name)

    def _group(self, name: str) -> None:
        spec = self.spec
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, self._store),
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )

    @worker_method
    def double(self, number: torch.Tensor) -> torch.Tensor:
        """Twice a number, and one more each time by a worker with state."""
        self.count += 1
        return 2 * number if self.stateless else 2 * number + self.count

    @worker_method
    def summed(self, number: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        dist.all_reduce(number)
        return number

    @worker_method
    def process(self) -> int:
        """Number of the process."""
        return os.getpid()

    @worker_method
    def environment(self) -> dict[str, str]:
        """The whole environment."""
        return dict(os.environ)

    @worker_method
    def sleep(self, seconds: float) -> int:
        """Take a while; the rank."""
        time.sleep(seconds)
        return self.spec.rank

    @worker_method
    def meet(self, how: str, file: Path | None = None) -> None:
        """Rank 0 waits for rank 1 in a collective call. ``file`` ends a loop of rank 1."""
        while how == "loop" and self.spec.rank == 1 and file is not None and not file.exists():
            time.sleep(0.0)
        if self.spec.rank == 1 and how == "bug":
            raise ArithmeticError("seven is not eight")
        if self.spec.rank == 1 and how == "diverged":
            raise DivergedError("the loss is nan", remedy="lower the learning rate")
        if how == "deadlock":
            dist.recv(torch.ones(1), src=1 - self.spec.rank)
        else:
            dist.all_reduce(torch.ones(1))

    @worker_method
    def fail(self, how: str) -> object:
        """Go wrong without anybody else."""
        if how == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if how == "host":
            raise MemoryError
        if how == "store":
            raise ObjectStoreFullError("Failed to put object of 9 GiB")
        return threading.Lock()  # how == "lock": what cannot be sent

    @worker_method
    def weights(self) -> torch.Tensor:
        """What a sampler receives."""
        return torch.ones(3)

    @worker_method
    def receive(self, sent: WorkerResult[torch.Tensor]) -> float:
        """Take what `weights` gave."""
        return float(sent.value.sum())


class Frozen(Toy):
    """The same without state."""

    stateless = True


class NoConstructor(Toy):
    """Cannot be made."""

    def __init__(self, spec: WorkerSpec):
        raise LookupError(f"no home for rank {spec.rank}")


class NoLoad(Toy):
    """Cannot load."""

    def start(self, host: str, port: int) -> None:
        raise LookupError("no weights here")


def specs(role: str, world_size: int) -> list[WorkerSpec]:
    """One for each rank."""
    return [WorkerSpec(role, rank, world_size, ModelConfig(path="-"), 0, 1, 60.0) for rank in range(world_size)]
