"""The fingerprint of a model: a short hash that changes when the folder or the hub id holds another model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.utils.hub import cached_file

from align.config import ModelConfig

BLOCK_BYTES = 1 << 20
MAX_BLOCKS = 64
"""Blocks of a file that are read, spread evenly; files up to 64 MiB are read completely."""
FILES = ("*config.json", "*.safetensors", "*.bin", "align_reward.json")
"""Files of a folder that count: configs, weights, and the head of a reward model."""


def model_fingerprint(model: ModelConfig, seed: int) -> str:
    """sha256 of the model that a role starts from: for run identities, caches and stored scores.

    A folder counts by names, sizes and up to 64 MiB of the bytes of each file in `FILES`, a hub id by the commit that
    it resolves to, random weights (``init``) by their config and ``seed``. Reading a whole model of 70 billion weights
    would take minutes at each start. Two models of one shape that agree in every block that is read count as the same.
    """
    digest, folder = hashlib.sha256(), Path(model.path).expanduser()
    if model.init:
        digest.update(json.dumps([model.init, seed], sort_keys=True).encode())
    elif folder.is_dir():
        for file in sorted(file for pattern in FILES for file in folder.glob(pattern)):
            _hash_blocks(digest, file)
    else:
        config = cached_file(model.path, "config.json", revision=model.revision)
        digest.update(f"{model.path}@{Path(str(config)).parent.name}".encode())  # .../snapshots/<commit>/config.json
    return digest.hexdigest()


def _hash_blocks(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    last = max(0, size - BLOCK_BYTES)
    count = min(MAX_BLOCKS, -(-size // BLOCK_BYTES))
    with file.open("rb") as stream:
        for i in range(count):
            stream.seek(last * i // max(1, count - 1))
            digest.update(stream.read(BLOCK_BYTES))
