"""Writing a model in Hugging Face layout, and proving that what was written is what was held."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.checkpoint import new_result
from align.errors import ModelError

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]


def _adapted(model: nn.Module) -> dict[str, Any]:
    """LoRA layers by the name that their weight has without adapters."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {
        _plain(f"{name}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}"): layer
        for name, layer in layers
    }


def _plain(name: str) -> str:
    """The name of a weight in a model without adapters; a wrapper of experts' weights wraps another."""
    return name.replace(".base_layer", "")


def state_dict(model: PreTrainedModel, gather: Gather, keep: bool) -> dict[str, Tensor]:
    """Every weight whole on the CPU, adapters merged into it, under its name without adapters.

    ``gather`` makes parameters whole within its context; every rank must call this, and only ranks with ``keep`` get
    the result.
    """
    adapted, state = _adapted(model), {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = _plain(name)
        layer = adapted.get(plain)
        with gather([parameter] if layer is None else layer.parameters()):
            value = parameter.detach()
            if layer is not None:
                value = value + layer.get_delta_weight(layer.active_adapters[0]).to(value.dtype)
            if keep:
                state[plain] = value.cpu().clone()
    return state


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor],
    folder: Path,
    extra: Mapping[str, str],
) -> None:
    """Write ``state`` with config and tokenizer to a folder beside ``folder``, verify it, then rename it to ``folder``,
    as `new_result` does.

    ``extra`` holds the text of further files by name; one that the tokenizer has written too takes its place.
    """
    implementation = model.config._attn_implementation
    with new_result(folder) as partial:
        try:
            model.save_pretrained(partial, state_dict=dict(state))  # which it empties
        finally:
            model.config._attn_implementation = implementation
        tokenizer.save_pretrained(partial)
        for name, text in extra.items():
            (partial / name).write_text(text, encoding="utf-8")
        _verify(partial, state, tokenizer, type(model))


def _verify(
    folder: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, kind: type[PreTrainedModel]
) -> None:
    """Read the files back and compare every weight, bit for bit, the config's kind and the vocabulary."""
    read: set[str] = set()
    for name, value in _read_back(folder, state.keys(), kind):
        read.add(name)
        if name not in state or not torch.equal(value, state[name]):
            raise ModelError(f"{folder}: weight {name} reads back other than it was written")
    if missing := state.keys() - read:
        raise ModelError(f"{folder}: weights were not written: {', '.join(sorted(missing)[:3])}")
    AutoConfig.from_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    entries = len(vocabulary)
    if entries > len(tokenizer):
        raise ModelError(f"{folder}: the tokenizer reads back with {entries} entries, it has {len(tokenizer)}")


def _read_back(folder: Path, names: Set[str], kind: type[PreTrainedModel]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the files; through transformers where it writes an architecture's weights under other names."""
    written: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            written |= dict.fromkeys(tensors.keys(), file)
    if written.keys() != names:
        yield from kind.from_pretrained(folder, dtype="auto").named_parameters()
        return
    for file in sorted(set(written.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
