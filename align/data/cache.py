"""A cache on disk of one number per sequence, under a key made of the model and the sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from align.errors import DataError
from align.types import Sequences
from align.utils.atomic_write import write_atomic
from align.utils.disk import saving

CHUNK = 1024
"""Sequences per call to the model; bounds the (B, T) tensors in memory. Even, so no pair is split."""


def cache_key(model_fingerprint: str, dtype: str, sequences: Sequences) -> str:
    """sha256 of the model's fingerprint (`align.models.identity`), its dtype, which log-probabilities depend on, and
    the token ids."""
    digest = hashlib.sha256(f"{model_fingerprint} {dtype}\n".encode())
    for packed in (sequences.prompts, sequences.responses):
        digest.update(packed.ids_N.numpy().tobytes() + packed.offsets_B1.numpy().tobytes())
    digest.update(sequences.prompt_B.numpy().tobytes())
    return digest.hexdigest()


def cached_logprobs(folder: str, key: str, sequences: Sequences, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """One number per sequence: read from ``folder/key.safetensors``, or computed in chunks and written there.

    Raises `DataError` for a file that is damaged or has another length.
    """
    file = Path(folder).expanduser() / f"{key}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as tensors:
                logprob_B, sha256 = tensors.get_tensor("logprob_B"), (tensors.metadata() or {}).get("sha256")
        except SafetensorError as error:
            raise DataError(f"the cache is damaged: {error}", where=str(file), remedy="delete the file") from error
        if len(logprob_B) != len(sequences):
            raise DataError(
                f"the cache has {len(logprob_B)} values, but the data has {len(sequences)} sequences", where=str(file)
            )
        if sha256 != _sha256(logprob_B):
            raise DataError(
                "the cache is damaged: its sha256 does not match", where=str(file), remedy="delete the file"
            )
        return logprob_B
    index = torch.arange(len(sequences))
    logprob_B = torch.cat([compute(sequences.select(rows)) for rows in index.split(CHUNK)])
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"logprob_B": logprob_B}, {"sha256": _sha256(logprob_B)}))
    return logprob_B


def _sha256(numbers_B: Tensor) -> str:
    return hashlib.sha256(numbers_B.numpy().tobytes()).hexdigest()
