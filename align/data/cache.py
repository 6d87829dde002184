"""Numbers that are computed once and kept on disk under the fingerprint of what they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils.hub import cached_file

from align.config import ModelConfig
from align.errors import DataError
from align.types import Sequences
from align.utils import disk
from align.utils.atomic_write import write_atomic

CHUNK = 1024
"""Sequences of one call to the model; bounds the (B, T) numbers that are held at a time. Even, so no pair is parted."""


def fingerprint(model: ModelConfig, sequences: Sequences, seed: int) -> str:
    """sha256 over a model and the token ids it is asked about.

    A folder counts by the bytes of its config and weights, a hub id by the commit it resolves to, random weights
    (``init``) by their config and ``seed``. The dtype counts: log-probabilities depend on it.
    """
    digest = hashlib.sha256(f"{model.dtype}\n".encode())
    folder = Path(model.path).expanduser()
    if model.init:
        digest.update(json.dumps([model.init, seed], sort_keys=True).encode())
    elif folder.is_dir():
        for file in sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    else:
        config = cached_file(model.path, "config.json", revision=model.revision)
        digest.update(f"{model.path}@{Path(str(config)).parent.name}".encode())  # .../snapshots/<commit>/config.json
    for packed in (sequences.prompts, sequences.responses):
        digest.update(packed.ids_N.numpy().tobytes() + packed.offsets_B1.numpy().tobytes())
    digest.update(sequences.prompt_B.numpy().tobytes())
    return digest.hexdigest()


def cached_logprobs(folder: str, key: str, sequences: Sequences, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """One number for each sequence: read from ``folder/key.safetensors``, or computed in parts and written there.

    The file appears whole or not at all. Raises `DataError` for one that cannot be read or has another length.
    """
    file = Path(folder).expanduser() / f"{key}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as tensors:
                known_B, sha256 = tensors.get_tensor("logprob_B"), (tensors.metadata() or {}).get("sha256")
        except SafetensorError as error:
            raise DataError(f"the cache is damaged: {error}", where=str(file), remedy="delete the file") from error
        if len(known_B) != len(sequences):
            raise DataError(f"the cache has {len(known_B)} numbers for {len(sequences)}", where=str(file))
        if sha256 != _sha256(known_B):
            raise DataError("the cache is damaged: its sha256 does not fit", where=str(file), remedy="delete the file")
        return known_B
    index = torch.arange(len(sequences))
    known_B = torch.cat([compute(sequences.select(rows)) for rows in index.split(CHUNK)])
    with disk.saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"logprob_B": known_B}, {"sha256": _sha256(known_B)}))
    return known_B


def _sha256(numbers_B: Tensor) -> str:
    return hashlib.sha256(numbers_B.numpy().tobytes()).hexdigest()
