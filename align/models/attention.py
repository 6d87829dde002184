"""Attention over packed tokens, registered with transformers as ``packed``.

Linear layers, norms and embeddings see the flat tokens of a micro-batch; only attention splits them into rows. On CUDA,
in bfloat16 and float16, one FlashAttention call (Dao 2023, arXiv 2307.08691) takes all rows at their own lengths,
without masks and padding. Elsewhere rows of similar length are padded to batches (`align.data.collate.AttentionGroup`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from align.config import ModelConfig
from align.data.collate import Layout, PackedAttention, RaggedRows
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


RaggedKernel = Callable[[Tensor, Tensor, Tensor, RaggedRows, float | None], Tensor]
"""Causal attention of rows of any length: query (N, heads, head_dim), key and value (M, key heads, head_dim), the rows,
the scale; returns (N, heads, head_dim)."""


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, rows: RaggedRows, scale: float | None) -> Tensor:
    function = import_module("torch.nn.attention.varlen").varlen_attn  # loads the compiler of torch: seconds
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}  # from 2.12 on
    starts = rows.query_start_R1, rows.key_start_R1, rows.max_queries, rows.max_keys
    return function(query, key, value, *starts, scale=scale, window_size=(-1, 0), **grouped)


def _flash_varlen(query: Tensor, key: Tensor, value: Tensor, rows: RaggedRows, scale: float | None) -> Tensor:
    function = import_module("flash_attn").flash_attn_varlen_func
    starts = rows.query_start_R1, rows.key_start_R1, rows.max_queries, rows.max_keys
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(query, key, value, *starts, softmax_scale=scale, causal=True, deterministic=deterministic)


class _GatherKeys(torch.autograd.Function):
    """``state_NX[key_M]``. The gradient of a token that is the key of many rows is summed in float32: in bfloat16 each
    sum over the responses to a prompt would lose digits."""

    @staticmethod
    def forward(ctx: Any, state_NX: Tensor, key_M: Tensor) -> Tensor:
        ctx.save_for_backward(key_M)
        ctx.shape = state_NX.shape
        return state_NX.index_select(0, key_M)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (key_M,) = ctx.saved_tensors
        dtype = torch.promote_types(grad_MX.dtype, torch.float32)
        total_NX = torch.zeros(ctx.shape, dtype=dtype, device=grad_MX.device)
        return total_NX.index_add_(0, key_M, grad_MX.to(dtype)).to(grad_MX.dtype), None


@cache
def _cuda_kernel(device: torch.device) -> RaggedKernel | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if torch.backends.cuda.is_flash_attention_available():
        return _torch_varlen
    return _flash_varlen if find_spec("flash_attn") is not None else None


def ragged_kernel(query: Tensor) -> RaggedKernel | None:
    """The kernel for rows of any length that takes ``query``: torch's, else that of flash-attn. None for CPUs, float32,
    and GPUs before Ampere."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    head_dim = query.shape[-1]
    return None if head_dim > 256 or head_dim % 8 else _cuda_kernel(query.device)


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
    if layout is None or layout.attention is None or attention_mask is not None:
        raise ValueError("packed attention needs the layout of its tokens and takes no mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    kernel = None if dropout else ragged_kernel(q)  # these kernels have no dropout
    if kernel is None:
        return _in_groups(q, k, v, layout.attention, scaling, dropout)[None], None
    rows = layout.attention.ragged
    if rows.key_M is not None:
        k, v = _GatherKeys.apply(k, rows.key_M), _GatherKeys.apply(v, rows.key_M)
    return kernel(q, k, v, rows, scaling)[None], None


def _in_groups(
    q: Tensor, k: Tensor, v: Tensor, attention: PackedAttention, scaling: float | None, dropout: float
) -> Tensor:
    """Attention of rows of similar length as padded batches."""
    outputs = []
    for group in attention.groups:
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
    return torch.cat(outputs)[attention.order]


AttentionInterface.register(PACKED, packed_attention)
