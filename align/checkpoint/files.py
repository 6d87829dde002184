"""Files of a checkpoint: hashed while they are written, and synced before the manifest names them.

Tensors are written in the safetensors format, which can carry no code: 8 bytes with the length of a JSON
header, the header with dtype, shape and offsets of each tensor, then the tensors, little-endian and without gaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from align.utils import fault_injection
from align.utils.atomic_write import write_new
from align.utils.disk import saving

MANIFEST = "manifest.json"
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the safetensors format."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written. ``name`` is a POSIX path relative to the checkpoint's folder, ``size`` is in bytes."""

    name: str
    size: int
    sha256: str


def is_plain(name: str) -> bool:
    """Whether a name is a normalized relative POSIX path below its folder, and not the manifest."""
    path = PurePosixPath(name)
    below = name == path.as_posix() and not path.is_absolute() and ".." not in path.parts
    return below and name.isprintable() and name not in (".", MANIFEST)


def write_bytes(folder: Path, name: str, content: bytes) -> FileRecord:
    """Write ``content`` to the new file ``name`` of a checkpoint that `CheckpointStore.begin` has begun.

    Raises `SaveError` if the system refuses, ValueError for a name that leaves the folder or is the manifest's.
    """
    return _write(folder, name, [content])


def write_json(folder: Path, name: str, value: Any) -> FileRecord:
    """The same with ``value`` as JSON. Floats read back bit for bit; NaN and infinities are written as Python reads
    them."""
    return _write(folder, name, [json.dumps(value).encode() + b"\n"])


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = {}
) -> FileRecord:
    """The same with CPU tensors of the dtypes in `DTYPES`, as a safetensors file with ``metadata`` in its header.

    Contiguous tensors are written without a copy; others are copied one by one. Raises ValueError for a tensor of
    another dtype or device.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            kind = f"{tensor.layout}, {tensor.dtype}, on {tensor.device}"
            raise ValueError(f"{name}: tensor {key!r} ({kind}) is not a dense CPU tensor of a supported dtype")
    # Largest elements first: each tensor starts at a multiple of its element size, as memory-mapped readers need.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if "__metadata__" in tensors or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name}: metadata must be text by name, and no tensor may be named __metadata__")
    end = 0
    for key in order:
        start, end = end, end + tensors[key].numel() * tensors[key].element_size()
        shape = list(tensors[key].shape)
        header[key] = {"dtype": DTYPES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(folder, name, _file(text, (tensors[key] for key in order)))


def _file(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write(folder: Path, name: str, parts: Iterable[bytes | memoryview]) -> FileRecord:
    if not is_plain(name):
        raise ValueError(f"{name!r} is not a valid name for a file of a checkpoint")
    path = folder / name
    with saving(path):
        step = re.search(r"step-([0-9]+)", folder.name)
        fault_injection.maybe_inject("driver", 0, "shard", int(step[1]) if step else 0)
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            (folder / parent).mkdir(mode=0o700, exist_ok=True)
        size, sha256 = write_new(path, parts)
    return FileRecord(name, size, sha256)
