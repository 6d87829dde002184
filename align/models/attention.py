"""Attention over packed tokens, registered with transformers as ``packed``.

Linear layers, norms and embeddings see the flat tokens of a micro-batch; only here are rows of similar length padded
to a batch for the attention kernel (`align.data.collate.AttentionGroup`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from align.config import ModelConfig
from align.data.collate import Layout
from align.errors import ModelError
from align.models.invariance import constant_length

PACKED, FLASH = "packed", "flash_attention_2"

FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral"})
"""Architectures whose attention is plain causal attention with grouped heads and rotary positions."""


def is_plain(config: PreTrainedConfig) -> bool:
    """True for a model of `FAMILIES` in which every layer attends to the whole past and rotary frequencies never
    change."""
    if config.model_type not in FAMILIES or constant_length(config) is not None:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def implementation(section: ModelConfig, config: PreTrainedConfig) -> str | None:
    """``attn_implementation`` for transformers; None selects sdpa, or eager where an architecture has no sdpa (soft
    caps, sinks). Raises `ModelError` if the model cannot use the recipe's ``attention``."""
    foreign = section.trust_remote_code and getattr(config, "auto_map", None)
    packable = is_plain(config) and not foreign
    if section.attention == "auto":
        return PACKED if packable else None
    if section.attention == PACKED and not packable:
        raise ModelError(
            f"{section.path}: attention=packed does not fit {config.model_type} with its layers, its rotary positions "
            "or its own code",
            remedy="use attention=auto",
        )
    if section.attention == FLASH and section.dtype == "float32":
        raise ModelError(
            f"{section.path}: attention={FLASH} computes in bfloat16, dtype is float32",
            remedy="set dtype=bfloat16, or attention=auto",
        )
    if section.attention == FLASH and find_spec("flash_attn") is None:
        raise ModelError(
            f"{section.path}: attention={FLASH} needs the package flash-attn, which is not installed here",
            remedy="install it (pip install flash-attn), or use attention=auto",
        )
    return section.attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of flat tokens. ``query`` (1, heads, N, head_dim); returns (1, N, heads,
    head_dim)."""
    if layout is None or attention_mask is not None:
        raise ValueError("packed attention needs the layout of its tokens and takes no mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    outputs = []
    for group in layout.groups:
        mask = group.mask_RQK
        attended = F.scaled_dot_product_attention(
            q[group.query_RQ].transpose(1, 2),
            k[group.key_RK].transpose(1, 2),
            v[group.key_RK].transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1)[group.valid])
    return torch.cat(outputs)[layout.order][None], None


AttentionInterface.register(PACKED, packed_attention)
