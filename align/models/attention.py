"""Attention over packed tokens, registered with transformers as ``packed``.

Linear layers, norms and embeddings see the flat tokens of a micro-batch; only here are rows of similar length padded
to a batch for the attention kernel (`align.data.collate.AttentionGroup`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from align.data.collate import Layout

PACKED = "packed"

FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral"})
"""Architectures whose attention is plain causal attention with grouped heads and rotary positions."""


def is_plain(config: PreTrainedConfig) -> bool:
    """True for a model of `FAMILIES` in which every layer attends to the whole past."""
    if config.model_type not in FAMILIES:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


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
