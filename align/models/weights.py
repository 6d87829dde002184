"""The files of a checkpoint in Hugging Face layout, and what is read from them before a model is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from align.config import ModelConfig
from align.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where transformers looks for safetensors, in this order."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights are read from."""


def weight_files(section: ModelConfig) -> list[Path]:
    """The safetensors files of a checkpoint in a folder, all of them there."""
    folder = Path(section.path).expanduser()
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise no_safetensors(section, sorted(file.name for file in folder.glob("*.bin")))
    weights = read_json(folder / INDEX).get("weight_map")
    shards = sorted({str(shard) for shard in weights.values()}) if isinstance(weights, dict) else []
    if not shards:
        raise ModelError(f"{folder / INDEX} has no weight_map", remedy="copy or download the checkpoint again")
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(
                f"{folder / INDEX} names {shard}, which is not in the folder",
                remedy="copy or download the checkpoint again",
            )
    return [folder / shard for shard in shards]


def no_safetensors(section: ModelConfig, pickles: list[str]) -> ModelError:
    others = f", but {', '.join(pickles[:3])}: pickles, which can run code when they are loaded" if pickles else ""
    return ModelError(
        f"{section.path}: there are no weights in {SINGLE} or {INDEX}{others}",
        remedy="give a checkpoint in safetensors; where you trust a pickled one, load it elsewhere and save it again",
    )


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of a model holds: its parameters, then its persistent buffers (DeepSeek-V3's bias by which
    experts are chosen)."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def check_numbers(file: Path, unread: Sequence[str] = ()) -> None:
    """Read the header of a file, and refuse numbers that would be cast to something else than what they mean.

    ``unread`` has patterns of names that the model does not read, such as the masks of GPT-2 and GPT-NeoX.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged: {first_line(error)}", remedy="copy or download it again") from error
    for name, kind in kinds.items():
        if kind not in FLOATS and not any(re.search(pattern, name) for pattern in unread):
            raise ModelError(
                f"{file}: {name} holds {kind} numbers, a quantized weight without its scale; readable: "
                f"{', '.join(FLOATS)}",
                remedy="give the checkpoint as it was before it was quantized",
            )


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error
    return content if isinstance(content, dict) else {}


def stored(section: ModelConfig, name: str, rows: int | slice = slice(None), remedy: str | None = None) -> torch.Tensor:
    """Rows of a weight in the checkpoint's files; no others are read. Raises `ModelError` where there is none."""
    try:
        index = stored_file(section, INDEX)
        shard = json.loads(Path(index).read_text())["weight_map"].get(name, "") if index else SINGLE
        with safe_open(stored_file(section, shard) or shard, framework="pt") as tensors:
            return tensors.get_slice(name)[rows]
    except (OSError, KeyError, SafetensorError) as error:
        problem = f"{section.path}: its safetensors hold no {name} ({first_line(error)})"
        raise ModelError(problem, remedy=remedy) from error


def stored_dtype(section: ModelConfig) -> torch.dtype | None:
    """Number format of most of a checkpoint's weights, by its first file; None where weights are drawn (``init``)."""
    if section.init:
        return None
    file = stored_file(section, SINGLE)
    if file is None:
        index = json.loads(Path(stored_file(section, INDEX) or INDEX).read_text(encoding="utf-8"))
        shard = min(index["weight_map"].values())
        file = stored_file(section, shard) or shard
    sizes: Counter[str] = Counter()
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            part = tensors.get_slice(name)
            sizes[part.get_dtype()] += math.prod(part.get_shape())
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(sizes.most_common(1)[0][0], torch.float32)


def stored_file(section: ModelConfig, name: str) -> str | None:
    """A file of the checkpoint on this disk; None where it has none of that name."""
    return cached_file(
        str(Path(section.path).expanduser()) if Path(section.path).expanduser().is_dir() else section.path,
        name,
        revision=section.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
