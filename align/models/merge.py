"""Extrapolation between two models of one shape (ExPO, Zheng et al. 2024, arXiv 2404.16792).

    theta = weak + alpha (strong - weak)

HelpSteer2-Preference (arXiv 2410.01257) takes its helpfulness regression as weak, the scaled Bradley-Terry model that
was trained from it as strong, and alpha 1.52.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from align.data import chat
from align.errors import ModelError
from align.models.streaming import ModelFolder

VOLATILE = {"_name_or_path", "transformers_version", "eos_token_id", "pad_token_id"}
"""Keys of a config that say nothing of the weights; STRONG's are kept."""


def expo(weak: Path, strong: Path, out: Path, alpha: float, texts: Mapping[str, str]) -> int:
    """Write the extrapolated model to ``out``, in the files and number formats of ``strong``; returns how many weights.

    Arithmetic is in float32, or float64 for such weights; alpha 0 and 1 give weak and strong bit for bit. ``texts``
    replace other files of ``strong``, which are copied. Raises `ModelError` before anything is written where the two
    differ in config, tokenizer, template, or name, shape or format of a weight.
    """
    ends = [ModelFolder(folder) for folder in (weak, strong)]
    _compare(*ends)

    def moved(name: str, end: Tensor) -> dict[str, Tensor]:
        if alpha == 1:
            return {name: end}
        start = ends[0].tensor(name)
        if alpha == 0:
            return {name: start}
        exact = torch.promote_types(end.dtype, torch.float32)
        merged = (start.to(exact) + alpha * (end.to(exact) - start.to(exact))).to(end.dtype)
        if not merged.isfinite().all():
            raise ModelError(f"{name} is not finite with alpha {alpha}", where=str(out), remedy="lower alpha")
        return {name: merged}

    ends[1].rewrite(out, moved, texts)
    return len(ends[1].shapes)


def _compare(weak: ModelFolder, strong: ModelFolder) -> None:
    where, remedy = f"{weak.folder} and {strong.folder}", "give two models of which one was trained from the other"
    configs = [AutoConfig.from_pretrained(left.folder).to_dict() for left in (weak, strong)]
    for what, left, other in (("configs", *configs), ("weights", weak.shapes, strong.shapes)):
        keys = sorted(key for key in (left.keys() | other.keys()) - VOLATILE if left.get(key) != other.get(key))
        if keys:
            lines = [f"{key} is {left.get(key)} and {other.get(key)}" for key in keys[:3]]
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"the {what} differ: {'; '.join(lines)}{more}", where=where, remedy=remedy)
    first, second = (chat.load_tokenizer(left.folder) for left in (weak, strong))
    chat.require_same_tokenizer(first, second, "WEAK", "STRONG")
    if first.chat_template != second.chat_template:
        raise ModelError("the chat templates differ", where=where, remedy=remedy)
