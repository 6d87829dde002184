"""Write a model in Hugging Face layout and verify the files against the model in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
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
MAX_ROUNDING_LOSS = 0.25
"""Largest share of the adapters' update that rounding may remove (`merged_dtype`)."""


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """LoRA layers by the name of their weight in the model without adapters."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {
        _base_name(f"{name}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}"): layer
        for name, layer in layers
    }


def _base_name(name: str) -> str:
    """The name of a weight in the model without adapters. Wrappers nest for the weights of experts."""
    return name.replace(".base_layer", "")


def merged_dtype(model: nn.Module, gather: Gather, base: torch.dtype) -> torch.dtype:
    """``base``, or float32 where rounding to ``base`` would remove too much of the adapters' update.

    With W the frozen weights, D the update of the adapters and R rounding to ``base``, over all adapted weights:
    ``|R(W + D) - (W + D)| <= MAX_ROUNDING_LOSS |D|`` in Frobenius norms. Every rank must call this; all
    get the same result.
    """
    rounding_square = update_square = 0.0
    for layer in _lora_layers(model).values():
        with gather(layer.parameters()), torch.no_grad():
            weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
            update = layer.get_delta_weight(layer.active_adapters[0]).float()
            merged = weight.float() + update
            rounding_square += float((merged.to(base).float() - merged).double().square().sum())
            update_square += float(update.double().square().sum())
    return base if rounding_square <= MAX_ROUNDING_LOSS**2 * update_square else torch.float32


def merged_weights(
    model: PreTrainedModel, gather: Gather, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight and persistent buffer, whole, on the model's device, with adapters merged. Names are those without
    adapters. A tensor is valid until the next pair is taken.

    ``gather`` makes partitioned parameters complete within its context. Every rank must exhaust the iterator. Adapters
    are added in float32 and rounded once to ``dtype``, or to the dtype of the weight where it is None. Weights without
    adapters are cast to ``dtype`` only where that changes no number.
    """
    lora_layers = _lora_layers(model)
    for name, parameter in named_weights(model):
        if ".lora_" in name:
            continue
        base_name = _base_name(name)
        layer = lora_layers.get(base_name)
        own = [parameter] if isinstance(parameter, nn.Parameter) else []
        with gather(own if layer is None else layer.parameters()), torch.no_grad():
            value = parameter.detach()
            if layer is not None:
                value = value.float() + layer.get_delta_weight(layer.active_adapters[0]).float()
            rounded = value.to(dtype or parameter.dtype)
            exact = layer is not None or rounded.dtype == value.dtype or torch.equal(rounded.to(value.dtype), value)
            yield base_name, rounded if exact else value


def state_dict(
    model: PreTrainedModel, gather: Gather, keep: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copies of `merged_weights` on the CPU. Every rank must call this; only ranks with ``keep`` get the result."""
    state = {}
    for name, value in merged_weights(model, gather, dtype):
        if keep:
            state[name] = value.cpu().clone() if value.device.type == "cpu" else value.cpu()
    return state


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor],
    folder: Path,
    extra: Mapping[str, str],
    expected: Mapping[str, Tensor],
) -> None:
    """Write ``state`` with config and tokenizer to a temporary folder, verify it, then rename it to ``folder``
    (`new_result`).

    ``state`` is emptied before the outputs are compared, so that memory never holds the model twice. ``expected`` holds
    outputs of the model in training on `verify_export.probe`. Raises `ModelError`, and leaves no ``folder``, if the
    written weights or outputs differ.

    ``extra`` holds the text of further files by name. They overwrite files of the same name from the tokenizer.
    """
    with new_result(folder) as partial:
        exported_files.write(model, tokenizer, state, partial, extra)
        _name_dtype(partial / "config.json", model, state)
        verify_export.check_weights(partial, state, type(model))
        exported_files.verify(partial, tokenizer, any(name.endswith(".py") for name in extra))
        state.clear()
        verify_export.check_outputs(partial, verify_export.probe(tokenizer), expected, model)


def _name_dtype(file: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Set ``dtype`` of the config to that of the dtype weights: transformers writes the dtype of ``model``."""
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    if dtype != model.dtype:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["dtype"] = str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
