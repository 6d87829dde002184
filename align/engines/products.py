"""Matrix products of few rows on a CPU.

``x @ W.T`` with at most `MAX_ROWS` rows runs up to twice as fast as ``(W @ x.T).T``: then the kernel walks along the
weight, which is the large operand. The layer to logits is also cut into blocks of the vocabulary, whose results stay in
the cache until they are written to their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.models.heads import LanguageModelHead

MAX_ROWS = 128
"""Rows up to which the turned product was faster, in float32 on two cores with AVX2."""
LOGIT_BLOCK = 2048
"""Ids whose logits are computed together."""


def turns(x: Tensor, layer: nn.Module) -> bool:
    """Whether ``layer`` is a plain linear layer, and ``x`` (rows, features) has few rows on a CPU."""
    plain = type(layer) in (nn.Linear, LanguageModelHead)
    return plain and x.device.type == "cpu" and x.dtype == torch.float32 and len(x) <= MAX_ROWS


def linear(layer: Any, x_RI: Tensor) -> Tensor:
    """The layer's output, (rows, features)."""
    if not turns(x_RI, layer):
        return layer(x_RI)
    out_RO = (layer.weight @ x_RI.T).T
    return out_RO if layer.bias is None else out_RO + layer.bias


def gated_mlp(mlp: Any, x_RI: Tensor) -> Tensor:
    """``down(act(gate(x)) * up(x))``, of a Llama's MLP."""
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(turns(x_RI, layer) and layer.bias is None for layer in layers):
        return mlp(x_RI)
    gate, up, down = (layer.weight for layer in layers)
    return (down @ mlp.act_fn(gate @ x_RI.T).mul_(up @ x_RI.T)).T


def logits(head: Any, x_RH: Tensor, buffer_RV: Tensor | None) -> Tensor:
    """Logits (rows, vocabulary) of a language-model head, in ``buffer_RV`` where that is given."""
    if buffer_RV is None or not turns(x_RH, head) or head.bias is not None:
        return head(x_RH)
    out_RV, turned_HR = buffer_RV[: len(x_RH)], x_RH.T
    for start in range(0, len(head.weight), LOGIT_BLOCK):
        block = slice(start, start + LOGIT_BLOCK)
        out_RV[:, block] = (head.weight[block] @ turned_HR).T
    return out_RV
