"""Writing a model in Hugging Face layout, and proving that what was written is what was held."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.checkpoint import new_result
from align.models import exported_files, verify_export
from align.models.weights import named_weights

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
MOST_LOST = 0.25
"""How much of the adapters' update rounding may take; see `merged_dtype`."""


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


def merged_dtype(model: nn.Module, gather: Gather, base: torch.dtype) -> torch.dtype:
    """``base``, or float32 where rounding to it would lose too much of what the adapters have learned.

    With W the frozen weights, D the update of the adapters and R rounding to ``base``, over all adapted weights:
    ``|R(W + D) - (W + D)| <= MOST_LOST |D|`` in Frobenius norms. Every rank calls this and gets the same answer.
    """
    lost = learned = 0.0
    for layer in _adapted(model).values():
        with gather(layer.parameters()), torch.no_grad():
            weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
            update = layer.get_delta_weight(layer.active_adapters[0]).float()
            merged = weight.float() + update
            lost += float((merged.to(base).float() - merged).double().square().sum())
            learned += float(update.double().square().sum())
    return base if lost <= MOST_LOST**2 * learned else torch.float32


def state_dict(
    model: PreTrainedModel, gather: Gather, keep: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every weight whole on the CPU, persistent buffers too, adapters merged into it, under its name without adapters.

    ``gather`` makes parameters whole within its context; every rank must call this, and only ranks with ``keep`` get
    the result. Sums are float32, rounded once to ``dtype``, or to that of the weight where it is None. Weights without
    adapters take on ``dtype`` where that changes no number.
    """
    adapted, state = _adapted(model), {}
    for name, parameter in named_weights(model):
        if ".lora_" in name:
            continue
        plain = _plain(name)
        layer = adapted.get(plain)
        own = [parameter] if isinstance(parameter, nn.Parameter) else []
        with gather(own if layer is None else layer.parameters()):
            value = parameter.detach()
            if layer is not None:
                value = value.float() + layer.get_delta_weight(layer.active_adapters[0]).float()
            if keep:
                rounded = value.to(dtype or parameter.dtype)
                exact = layer is not None or torch.equal(rounded.to(value.dtype), value)
                state[plain] = (rounded if exact else value).cpu().clone()
    return state


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor],
    folder: Path,
    extra: Mapping[str, str],
    expected: Mapping[str, Tensor],
) -> None:
    """Write ``state`` with config and tokenizer to a folder beside ``folder``, verify it, then rename it to ``folder``,
    as `new_result` does.

    ``state`` is emptied on the way, so that no two copies of a model are in memory. ``expected`` holds outputs of the
    model in training on `verify_export.probe`. Raises `ModelError` where the folder holds other weights or computes
    something else; then there is no ``folder``.

    ``extra`` holds the text of further files by name; one that the tokenizer has written too takes its place.
    """
    with new_result(folder) as partial:
        exported_files.write(model, tokenizer, state, partial, extra)
        _name_dtype(partial / "config.json", model, state)
        verify_export.weights(partial, state, type(model))
        exported_files.verify(partial, tokenizer, any(name.endswith(".py") for name in extra))
        state.clear()
        verify_export.behaviour(partial, verify_export.probe(tokenizer), expected, model)


def _name_dtype(file: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Have the config name the number format of the weights: transformers has written that of ``model``."""
    written = next(value.dtype for value in state.values() if value.is_floating_point())
    if written != model.dtype:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["dtype"] = str(written).removeprefix("torch.")
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
