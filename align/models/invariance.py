"""Batch invariance: the outputs for a sequence do not depend on its neighbors in a batch. Architectures for which
transformers breaks this are patched here, or refused.

Rope types ``dynamic`` (NTK by length) and ``longrope`` (LongRoPE, Ding et al. 2024, arXiv 2402.13753; Phi-3) rotate a
sequence by frequencies that depend on its length. transformers uses the longest sequence of a call for all sequences,
and ``dynamic`` keeps the length of earlier calls. `apply` gives each sequence its own frequencies. During sampling the
length grows while cached keys keep the frequencies of a shorter sequence, so log-probabilities of sampling would differ
from those of training: `check_sampling` refuses lengths at which frequencies change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from align.errors import ModelError

PADDED_STATE = ("recurrent_gemma", "rwkv", "xlstm")
"""Architectures whose recurrent state in transformers reads the padding before a shorter prompt."""


def constant_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence, in tokens, up to which rotary frequencies are the same; None where they never change."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = []
    for rope in by_layer:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if "dynamic" in kind:
            limits.append(text.max_position_embeddings)
        elif kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
    return min(limits, default=None)


def apply(model: PreTrainedModel) -> None:
    """Rotate each sequence by its own length, and switch off the routing noise of experts in training.

    Raises `ModelError` if the model cannot be patched.
    """
    _rotate_by_own_length(model)
    for module in model.modules():
        if any("jitter" in name for name in vars(module)):  # routers that draw noise in training
            module.eval()
            module.train = partial(_as_is, module)


def _as_is(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _rotate_by_own_length(model: PreTrainedModel) -> None:
    """Rotate each row of ``position_ids`` (R, L) by the frequencies of its length (largest position + 1).

    Leaves models with constant frequencies unchanged. Raises `ModelError` if custom model code computes them.
    """
    limit = constant_length(model.config)
    if limit is None:
        return
    kinds = lambda module: str(getattr(module, "rope_type", ""))  # noqa: E731 - by layer type, a dict
    modules: list[Any] = [m for m in model.modules() if "dynamic" in kinds(m) or "longrope" in kinds(m)]
    if not modules:
        raise ModelError(
            f"{model.config.name_or_path}: the rotary frequencies of {type(model).__name__} depend on the longest "
            "sequence of a batch, in code of its own",
            remedy="set trust_remote_code=false where transformers has the architecture, or give another model",
        )
    for rotary in modules:
        rotary.forward = partial(_rotated, rotary, rotary.forward, limit)


def _rotated(
    rotary: nn.Module,
    forward: Callable[..., tuple[Tensor, Tensor]],
    limit: int,
    x: Tensor,
    position_ids: Tensor,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, ...]:
    """Cosines and sines of each row, in groups of equal length. Rows up to ``limit`` share their frequencies."""
    length_R = position_ids.amax(-1).clamp(min=limit - 1)
    groups = [(length_R == length).nonzero().squeeze(1) for length in length_R.unique()]
    tables = []
    for rows in groups:
        _forget(rotary)
        tables.append(forward(x, position_ids[rows], *arguments, **named))
    order = torch.cat(groups).argsort()
    return tuple(torch.cat(parts)[order] for parts in zip(*tables, strict=True))


def _forget(rotary: nn.Module) -> None:
    """Reset the state that ``transformers.modeling_rope_utils.dynamic_rope_update`` keeps between calls."""
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        setattr(rotary, name, rotary.original_max_seq_len)
    for name, original in list(rotary.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            rotary.register_buffer(name.replace("original_", ""), original.clone(), persistent=False)


def check_sampling(config: PreTrainedConfig, num_tokens: int) -> None:
    """Raise `ModelError` if tokens or log-probabilities of sampled sequences of ``num_tokens``, prompt and response,
    would depend on the batch."""
    name = config.name_or_path or config.model_type
    if config.model_type in PADDED_STATE:
        raise ModelError(
            f"{name}: {config.model_type} cannot sample for a batch of prompts, since its state reads their padding",
            remedy="sample from another architecture; this one can be trained on given responses and give rewards",
        )
    limit = constant_length(config)
    if limit is not None and num_tokens > limit:
        raise ModelError(
            f"{name}: prompt and response may take {num_tokens} tokens, and above {limit} this model has other rotary "
            "frequencies, so log-probabilities of sampled tokens would not be those of training",
            remedy=f"keep both within {limit} tokens: lower data.max_prompt_tokens or the max_tokens of the sampling",
        )


def require_causal(model: PreTrainedModel) -> None:
    """Raise `ModelError` for an encoder: it attends to later tokens, so it gives no log-probabilities."""
    for module in model.modules():
        if getattr(module, "is_decoder", None) is False and getattr(module, "is_causal", None) is False:
            name = f"{model.config.name_or_path}: {type(model).__name__}"
            raise ModelError(f"{name} attends to later tokens: no causal language model", remedy="give a decoder")


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout probability to ``rate`` and every layer-drop probability to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, rate)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if "dropout" in name or name.endswith("pdrop"):
                _set_rate(config, name, rate or type(value)(0))  # some fields take whole numbers only
            elif "layerdrop" in name:
                setattr(config, name, type(value)(0))


def _set_rate(config: PreTrainedConfig, name: str, rate: float) -> None:
    try:
        setattr(config, name, rate)
    except StrictDataclassFieldValidationError as error:
        problem = f"{name} of {type(config).__name__} cannot be {rate}, the dropout of the recipe"
        raise ModelError(problem, remedy="set dropout=0") from error
