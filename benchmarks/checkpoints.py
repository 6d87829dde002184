"""Measure how long a checkpoint takes to write and to verify, compared with safetensors and torch.

    python benchmarks/checkpoints.py FOLDER [--megabytes 500] [--repeats 5] [--json FILE]

Writes float32 tensors of 8 MB (one in ten is small) to FOLDER, on the disk to measure, in turns: ours, which hashes
and syncs; `safetensors.torch.save_file` and `torch.save`, which do neither, and the same with a sync after. Then reads
them, from the page cache: our verification of a published checkpoint in 4 files, `safetensors.torch.load_file`,
`torch.load`. Reports medians, and ratios to ours within each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import checkpoint
from align.config import CheckpointConfig

FILES = 4
"""Files of the verified checkpoint, as of four ranks."""


def tensors(megabytes: int) -> dict[str, Tensor]:
    """Random tensors of that many megabytes, with sizes as in a model."""
    pieces: dict[str, Tensor] = {}
    remaining = megabytes * 10**6 // 4
    while remaining > 0:
        size = min(remaining, 2_000_000 if len(pieces) % 10 else 2_000)
        pieces[f"layers.{len(pieces)}.weight|master|0"] = torch.randn(size)
        remaining -= size
    return pieces


def synced(path: Path) -> None:
    """Sync a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """The seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def written(folder: Path, numbers: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of each way to write."""
    ours, theirs, pickled = folder / "ours", folder / "theirs", folder / "pickled"
    times = {"write_tensors": seconds(lambda: checkpoint.write_tensors(folder, ours.name, numbers))}
    ours.unlink()
    for name, path, write in (
        ("safetensors.save_file", theirs, lambda: save_file(numbers, theirs)),
        ("torch.save", pickled, lambda: torch.save(numbers, pickled)),
    ):
        times[name] = seconds(write)
        times[f"{name} + fsync"] = times[name] + seconds(lambda path=path: synced(path))
        path.unlink()
    return times


def read(folder: Path, numbers: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of each way to read."""
    store = checkpoint.CheckpointStore(folder / "checkpoints", CheckpointConfig())
    partial = store.begin(1, sum(tensor.nbytes for tensor in numbers.values()))
    names = list(numbers)
    shares = [{name: numbers[name] for name in names[rank::FILES]} for rank in range(FILES)]
    files = [checkpoint.write_tensors(partial, f"rank-{rank}", share) for rank, share in enumerate(shares)]
    store.publish(partial, checkpoint.Manifest(checkpoint.SCHEMA, 1, 1, 0, tuple(files), {}, {}))
    save_file(numbers, folder / "theirs")
    torch.save(numbers, folder / "pickled")
    times = {
        "verify": seconds(store.newest),
        "safetensors.load_file": seconds(lambda: [tensor.sum() for tensor in load_file(folder / "theirs").values()]),
        "torch.load": seconds(lambda: torch.load(folder / "pickled")),
    }
    for name in ("checkpoints", "theirs", "pickled"):
        shutil.rmtree(folder / name) if name == "checkpoints" else (folder / name).unlink()
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    numbers = tensors(arguments.megabytes)
    size = sum(tensor.nbytes for tensor in numbers.values())
    report: dict[str, dict[str, float]] = {}
    for ours, measure in (("write_tensors", written), ("verify", read)):
        turns = [measure(arguments.folder, numbers) for _ in range(arguments.repeats)]
        for name in turns[0]:
            times = [turn[name] for turn in turns]
            ratio = median(turn[name] / turn[ours] for turn in turns)
            report[name] = {"seconds": median(times), "GB/s": size / median(times) / 1e9, "to ours": ratio}
    for name, row in report.items():
        print(f"{name:32}" + "".join(f"{key} {value:8.3f}   " for key, value in row.items()))
    if arguments.json:
        content = {"bytes": size, "tensors": len(numbers), "cores": os.cpu_count(), "results": report}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
