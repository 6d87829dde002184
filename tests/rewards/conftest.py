"""Checkpoints of reward models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from align.rewards import card
from align.rewards.card import Card

sys.path.append(str(Path(__file__).parent))  # for reward_models and fake_service
from reward_models import SIZES, Save, words


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a random checkpoint and returns its folder."""

    def saved(auto: Any, tokenizer: Any = None, name: str = "m", seed: int = 0, own: Card | None = None, **fields: Any):
        tokenizer = tokenizer or words()
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            fields.pop("model_type", "llama"), vocab_size=len(tokenizer), **{**SIZES, **fields}
        )
        config.pad_token_id = tokenizer.pad_token_id
        model = auto.from_config(config)
        for parameter in model.parameters():  # logits of a fresh model are almost all alike
            parameter.data.mul_(4)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if own is not None:
            (tmp_path / name / card.NAME).write_text(own.dumps())
        return str(tmp_path / name)

    return saved
