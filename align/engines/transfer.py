"""Weights on their way from a policy to the processes that sample with them: one broadcast, in buckets.

A transfer has a process group of its own, beside those of the roles: member 0 is rank 0 of the policy, the others are
receivers. A receiver is a rank of our own sampler or a worker process of an engine. The group is gloo on CPUs and
NCCL on GPUs. Names, shapes and dtypes travel through the TCP store of the policy's process group, numbers through the
broadcast.

This module imports neither DeepSpeed nor transformers, so that the processes of another engine can import it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.errors import WorkerError

BUCKET_BYTES = 64 * 2**20
"""Size of a bucket; a larger tensor has a bucket of its own. Both sides hold one bucket beside the weights."""
ALIGNMENT = 16
"""Tensors start at multiples of this many bytes within a bucket, so that every dtype can be viewed in place."""

Pairs = Iterable[tuple[str, Tensor]]
"""Exported names with whole tensors. A tensor is valid until the next pair is taken."""


@dataclass(frozen=True)
class TransferAddress:
    """Where the members of a transfer's group meet."""

    host: str
    port: int
    """Of the TCP store in the process of the policy's rank 0."""
    generation: int
    """Number of the group. Restarted receivers need a new group."""
    size: int
    """Members: the sender and all receivers."""
    timeout_s: float
    """Longest wait for another member, in seconds."""

    def store(self) -> dist.Store:
        """A client of the store, under the prefix of this group."""
        timeout = timedelta(seconds=self.timeout_s)
        return self.within(dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout))

    def within(self, store: dist.Store) -> dist.Store:
        """The part of ``store`` that belongs to this group."""
        return dist.PrefixStore(f"transfer/{self.generation}", store)


class TransferGroup:
    """A member of a transfer's group: the sender (`send`) or a receiver (`receive`)."""

    def __init__(self, address: TransferAddress, store: dist.Store, rank: int, device: torch.device):
        """``store`` is that of ``address``. Every member constructs its group at the first transfer."""
        self.store, self.rank, self.device = store, rank, device
        self.transfers = 0
        """Transfers so far."""
        timeout = timedelta(seconds=address.timeout_s)
        with _peer_named(rank):
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group: Any = dist.ProcessGroupNCCL(store, rank, address.size, options)
            else:
                self._group = dist.ProcessGroupGloo(store, rank, address.size, timeout)

    def send(self, tensors: Pairs) -> None:
        """Broadcast all tensors. Every receiver must call `receive` at the same time.

        Raises `WorkerError` if a receiver is gone, or has not come within the timeout.
        """
        self.transfers += 1
        number = 0
        for fields, flat in _buckets(tensors, self.device):
            self.store.set(f"{self.transfers}/{number}", json.dumps(fields))
            self._broadcast(flat)
            number += 1
        self.store.set(f"{self.transfers}/{number}", json.dumps(None))

    def _broadcast(self, flat: Tensor) -> None:
        with _peer_named(self.rank):
            self._group.broadcast(flat, 0).wait()

    def _names(self, number: int) -> bytes:
        with _peer_named(self.rank):
            return self.store.get(f"{self.transfers}/{number}")

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `send`. A tensor is valid until the next pair is taken. Raises `WorkerError` as `send`."""
        self.transfers += 1
        number, buffer = 0, torch.empty(0, dtype=torch.uint8, device=self.device)
        while (fields := json.loads(self._names(number))) is not None:
            length = _length(fields)
            if length > len(buffer):
                buffer = torch.empty(max(BUCKET_BYTES, length), dtype=torch.uint8, device=self.device)
            flat = buffer[:length]
            self._broadcast(flat)
            yield from _unpack(fields, flat)
            number += 1


@contextmanager
def _peer_named(rank: int) -> Iterator[None]:
    """Turn an error of the store or the group into a `WorkerError` about the other side.

    On GPUs a broadcast that hangs shows when the stream is waited for; NCCL's watchdog ends the process then.
    """
    try:
        yield
    except RuntimeError as error:
        sends, reason = rank == 0, str(error).splitlines()[0]
        raise WorkerError(
            f"weights did not {'reach the sampler' if sends else 'come from the policy'}: {reason}",
            remedy=f"look at the log of the {'sampler' if sends else 'policy'}, which has ended or hangs",
        ) from error


def _buckets(tensors: Pairs, device: torch.device) -> Iterator[tuple[list[list[Any]], Tensor]]:
    """Names, dtypes and shapes of each bucket, and its tensors as one vector of bytes, valid until the next bucket."""
    fields: list[list[Any]] = []
    flat, used = torch.empty(0, dtype=torch.uint8, device=device), 0
    for name, tensor in tensors:
        size = _aligned(tensor.nbytes)
        if fields and used + size > len(flat):
            yield fields, flat[:used]
            fields, used = [], 0
        if size > len(flat):
            flat = torch.empty(max(BUCKET_BYTES, size), dtype=torch.uint8, device=device)
        flat[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        fields.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        used += size
    if fields:
        yield fields, flat[:used]


def _unpack(fields: list[list[Any]], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views of a bucket."""
    start = 0
    for name, dtype, shape in fields:
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        yield name, flat[start : start + size].view(kind).view(shape)
        start += _aligned(size)


def _length(fields: list[list[Any]]) -> int:
    return sum(_aligned(math.prod(shape) * getattr(torch, dtype).itemsize) for _, dtype, shape in fields)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
