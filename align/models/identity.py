"""Which model a folder or a hub id holds, in a few bytes that change when it does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.utils.hub import cached_file

from align.config import ModelConfig

BLOCK = 1 << 20
BLOCKS = 64
"""Blocks of a file that are read, spread evenly; files up to 64 MiB are read whole."""


def fingerprint(model: ModelConfig, seed: int) -> str:
    """sha256 over what a role starts from.

    A folder counts by names, sizes and up to 64 MiB of the bytes of each config and weight file and of what a reward
    model says of itself (``align_reward.json``), a hub id by the commit it resolves to, random weights (``init``) by
    their config and ``seed``. Reading all of a model of 70 billion weights would take minutes at each start; two models
    of one shape that agree in every block read are taken for one.
    """
    digest, folder = hashlib.sha256(), Path(model.path).expanduser()
    if model.init:
        digest.update(json.dumps([model.init, seed], sort_keys=True).encode())
    elif folder.is_dir():
        counted = ("*config.json", "*.safetensors", "align_reward.json")
        for file in sorted(file for pattern in counted for file in folder.glob(pattern)):
            _sample(digest, file)
    else:
        config = cached_file(model.path, "config.json", revision=model.revision)
        digest.update(f"{model.path}@{Path(str(config)).parent.name}".encode())  # .../snapshots/<commit>/config.json
    return digest.hexdigest()


def _sample(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    last = max(0, size - BLOCK)
    count = min(BLOCKS, -(-size // BLOCK))
    with file.open("rb") as stream:
        for i in range(count):
            stream.seek(last * i // max(1, count - 1))
            digest.update(stream.read(BLOCK))
