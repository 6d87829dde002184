"""Weights from a policy to samplers: every bit arrives, in buckets, and a peer that is gone is named in time.

The members of a group are threads of one process, with a store and a gloo group each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from align.engines import distributed, transfer
from align.engines.transfer import TransferAddress, TransferGroup
from align.errors import WorkerError

CPU = torch.device("cpu")


def on_members(size: int, timeout_s: float, *members: Callable[[TransferGroup], Any]) -> list[Any]:
    """What each member returns or raises; member 0 sends."""
    store = distributed.open_store("127.0.0.1", 30.0)
    address = TransferAddress("127.0.0.1", store.port, 0, size, timeout_s)
    results: list[Any] = [None] * len(members)

    def run(rank: int) -> None:
        try:
            own: dist.Store = address.within(store) if rank == 0 else address.store()
            results[rank] = members[rank](TransferGroup(address, own, rank, CPU))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def received(group: TransferGroup) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in group.receive()}


def weights(seed: int) -> dict[str, Tensor]:
    """Of several formats and shapes; 'large' exceeds the bucket of `small_buckets`, 'turned' is not contiguous."""
    source = torch.Generator().manual_seed(seed)
    made = {f"layer{i}": torch.randn(7, 5 + i, generator=source) for i in range(20)}
    made["half"] = torch.randn(33, 3, generator=source).bfloat16()
    made["large"] = torch.randn(50, 40, generator=source)
    made["turned"] = torch.randn(6, 9, generator=source).T
    made["count"] = torch.tensor(12345678901)
    made["flag"] = torch.tensor([True, False, True])
    made["empty"] = torch.zeros(0, 4)
    return made


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 1024)


@pytest.mark.usefixtures("small_buckets")
def test_every_bit_reaches_every_receiver_in_two_transfers():
    first, second = weights(0), weights(1)
    first["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])

    def send(group: TransferGroup) -> None:
        group.send(first.items())
        group.send(second.items())

    both = lambda group: (received(group), received(group))  # noqa: E731
    _, *results = on_members(3, 30.0, send, both, both)
    for parts in results:
        for sent, got in zip((first, second), parts, strict=True):
            assert list(got) == list(sent)
            for name, tensor in sent.items():
                assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
                assert (
                    got[name]
                    .contiguous()
                    .view(torch.uint8 if tensor.ndim else tensor.dtype)
                    .equal(tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype))
                ), name


@pytest.mark.usefixtures("small_buckets")
def test_a_bucket_is_filled_before_the_next_and_a_large_tensor_has_its_own():
    sizes = [len(flat) for _, flat in transfer._buckets(weights(0).items(), CPU)]
    assert sum(sizes) == sum(-(-tensor.nbytes // 16) * 16 for tensor in weights(0).values())
    assert max(sizes) == 8000
    assert all(size <= 1024 for size in sizes if size != 8000)
    assert len(sizes) < len(weights(0)) / 1.5


def test_a_receiver_that_hangs_ends_the_transfer_within_the_timeout():
    def hang(group: TransferGroup) -> TransferGroup:
        time.sleep(4)
        return group  # a group that is dropped would close its connection, and be noticed at once

    start = time.monotonic()
    error, _ = on_members(2, 1.0, lambda group: group.send({"w": torch.zeros(10**7)}.items()), hang)
    assert isinstance(error, WorkerError)
    assert "weights did not reach the sampler" in error.message
    assert error.remedy is not None
    assert "log of the sampler" in error.remedy
    assert time.monotonic() - start < 10


def test_a_policy_that_dies_in_the_middle_is_named():
    def die(group: TransferGroup) -> TransferGroup:
        group.store.set("1/0", '[["w", "float32", [4]]]')
        time.sleep(3)
        return group

    _, error = on_members(2, 1.0, die, received)
    assert isinstance(error, WorkerError)
    assert "weights did not come from the policy" in error.message


def test_a_policy_that_joins_and_sends_nothing_is_named():
    def idle(group: TransferGroup) -> TransferGroup:
        time.sleep(4)
        return group

    _, error = on_members(2, 1.0, idle, received)
    assert isinstance(error, WorkerError)
    assert "weights did not come from the policy" in error.message


def test_a_sampler_that_never_joins_is_named():
    (error,) = on_members(2, 1.0, lambda group: group.send([]))
    assert isinstance(error, WorkerError)
    assert "weights did not reach the sampler" in error.message
