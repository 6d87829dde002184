"""Seconds to bring weights from one process to another: through Ray's object store, and by a broadcast in buckets.

    python -m benchmarks.transfer [--megabytes 500] [--rounds 3]

Two Ray actors on one machine. By the object store the sender returns copies of all tensors as numpy arrays, and the
receiver copies each out of shared memory into its own; the broadcast is that of `align.engines.transfer`, by gloo. Both
end when the receiver's weights hold the numbers, which are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import ray
import torch

from align.engines import distributed
from align.engines.transfer import TransferAddress, TransferGroup

TENSORS = 100


def weights(megabytes: int, seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    size = megabytes * 2**20 // 4 // TENSORS
    return {f"layer{i}": torch.randn(size, generator=source) for i in range(TENSORS)}


@ray.remote(num_cpus=1)
class Sender:
    def __init__(self, megabytes: int, seed: int):
        self.weights = weights(megabytes, seed)

    def address(self) -> TransferAddress:
        self.store = distributed.open_store("127.0.0.1", 60.0)
        self.group: TransferGroup | None = None
        self.where = TransferAddress("127.0.0.1", self.store.port, 0, 2, 60.0)
        return self.where

    def send(self) -> None:
        if self.group is None:
            self.group = TransferGroup(self.where, self.where.within(self.store), 0, torch.device("cpu"))
        self.group.send(self.weights.items())

    def state(self) -> dict[str, Any]:
        return {name: tensor.clone().numpy() for name, tensor in self.weights.items()}


@ray.remote(num_cpus=1)
class Receiver:
    def __init__(self, megabytes: int):
        self.weights = weights(megabytes, 1)
        self.group: TransferGroup | None = None

    def receive(self, where: TransferAddress) -> float:
        if self.group is None:
            self.group = TransferGroup(where, where.store(), 1, torch.device("cpu"))
        for name, tensor in self.group.receive():
            self.weights[name].copy_(tensor)
        return self.checksum()

    def load(self, state: dict[str, Any]) -> float:
        for name, array in state.items():
            self.weights[name].copy_(torch.from_numpy(array.copy()))
        return self.checksum()

    def checksum(self) -> float:
        return sum(float(tensor[::1000].double().sum()) for tensor in self.weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    store = (3 * arguments.megabytes + 200) * 2**20
    ray.init(num_cpus=2, object_store_memory=store, include_dashboard=False, log_to_driver=False)
    sender: Any = Sender.remote(arguments.megabytes, 0)
    receiver: Any = Receiver.remote(arguments.megabytes)
    where = ray.get(sender.address.remote())
    expected = sum(float(tensor[::1000].double().sum()) for tensor in weights(arguments.megabytes, 0).values())

    def by_store() -> float:
        return ray.get(receiver.load.remote(sender.state.remote()))

    def by_broadcast() -> float:
        sent = sender.send.remote()
        checksum = ray.get(receiver.receive.remote(where))
        ray.get(sent)
        return checksum

    seconds: dict[str, list[float]] = {"object store": [], "broadcast": []}
    for number in range(arguments.rounds + 1):
        for times, run in zip(seconds.values(), (by_store, by_broadcast), strict=True):
            start = time.perf_counter()
            assert run() == expected
            if number:
                times.append(time.perf_counter() - start)
    store_s, broadcast_s = (statistics.median(times) for times in seconds.values())
    print(
        f"{arguments.megabytes} MB: object store {store_s:.2f} s, broadcast {broadcast_s:.2f} s, "
        f"{store_s / broadcast_s:.1f} times faster"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
