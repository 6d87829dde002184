"""Causal attention of rows of any length, one row at a time: what `align.models.attention.RaggedKernel` computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align.data.collate import RaggedRows


def attend(query: Tensor, key: Tensor, value: Tensor, rows: RaggedRows, scale: float | None) -> Tensor:
    """``softmax(scale q k^T) v`` in which query q of Q sees the first ``K - Q + q + 1`` keys of its row."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    query_start, key_start = rows.query_start_R1.tolist(), rows.key_start_R1.tolist()
    outputs = []
    for a, b, c, d in zip(query_start[:-1], query_start[1:], key_start[:-1], key_start[1:], strict=True):
        hidden = torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).triu((d - c) - (b - a) + 1)
        score = scale * torch.einsum("qhd,khd->hqk", query[a:b], key[c:d])
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weight, value[c:d]))
    return torch.cat(outputs)
