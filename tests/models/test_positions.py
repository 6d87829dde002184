"""The number of positions by config, and which part of the data each role has to have positions for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from align.config import (
    CheckpointRewardConfig,
    CriticConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PriorPolicyConfig,
    ReferenceConfig,
)
from align.data.prompts import PromptStream
from align.errors import DataError
from align.models.positions import LongestSequence, check, longest, positions, require
from align.types import Packed, Prompts, Sequences

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("kind", "fields", "number"),
    [
        ("gpt2", {"n_positions": 48}, 48),
        ("llama", {"max_position_embeddings": 50}, 50),
        ("opt", {"max_position_embeddings": 70}, 70),
        ("llama", {"max_position_embeddings": 2048, "rope_parameters": LINEAR}, 4096),
        ("qwen2", {"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ("qwen2", {"max_position_embeddings": 131072, "rope_parameters": YARN}, 131072),  # says the scaled number
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
        ("gemma3", {"text_config": {"max_position_embeddings": 90}}, 90),
        ("falcon", {"max_position_embeddings": 64, "alibi": True}, None),
        ("bloom", {}, None),
        ("mpt", {"max_seq_len": 64}, None),
        ("mpt", {"max_seq_len": 64, "attn_config": {"alibi": False}}, 64),
        ("mamba", {}, None),
    ],
)
def test_positions_by_config(kind: str, fields: dict[str, Any], number: int | None):
    limit = positions(AutoConfig.for_model(kind, **fields))
    assert (limit and limit[0]) == number


def test_a_sequence_as_long_as_the_model_is_read():
    config = AutoConfig.for_model("gpt2", n_positions=48)
    require(config, 48, "p")
    with pytest.raises(DataError, match="p: a sequence of 49 tokens exceeds the 48 positions"):
        require(config, 49, "p")


def packed(*lengths: int) -> Packed:
    return Packed.from_lists([[5] * length for length in lengths])


@dataclass(frozen=True)
class HeldOut:
    prompts: Prompts
    judged: Packed | None = None


@dataclass(frozen=True)
class Material:
    train: Sequences
    validation: Sequences
    prompts: PromptStream
    held_out: HeldOut
    judged: Packed | None = None


def material(judged: bool) -> Material:
    held_out = Prompts(packed(17, 3), torch.arange(2), (2,), -1)
    return Material(
        Sequences(packed(6, 2), packed(1, 9), torch.tensor([0, 1])),  # 7 and 11
        Sequences(packed(4), packed(2), torch.tensor([0])),
        PromptStream(packed(2, 12), 1, 0, (2,)),
        HeldOut(held_out, packed(5, 7) if judged else None),
        packed(1, 2) if judged else None,
    )


def test_the_longest_of_each_part():
    found = [(part, one.tokens) for part, one in longest(material(judged=True), 10)]
    assert found == [
        *[("data", 11), ("data", 6), ("prompts", 22)],
        *[("held_out", 27), ("held_out_reward", 17), ("reward", 12)],
    ]


INIT = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}


@pytest.mark.parametrize(
    ("section", "judged", "need"),
    [
        (PolicyConfig, True, 27),  # answers held-out prompts
        (CriticConfig, True, 22),
        (ReferenceConfig, False, 22),
        (PriorPolicyConfig, True, 12),  # reads prompts without attributes
        (PriorPolicyConfig, False, 22),
        (CheckpointRewardConfig, False, 27),
        (CheckpointRewardConfig, True, 17),  # not what the policy reads
    ],
)
def test_each_role_needs_positions_for_what_it_reads(section: type[ModelConfig], judged: bool, need: int):
    parts: dict[str, LongestSequence] = {}
    for part, one in longest(material(judged), 10):
        parts[part] = max(one, parts.get(part, one))
    trained = {"optimizer": OptimizerConfig(lr=1.0)} if issubclass(section, (PolicyConfig, CriticConfig)) else {}
    of = lambda number: section(path="x", init=INIT | {"n_positions": number}, **trained)  # noqa: E731
    check(of(need), "role", parts)
    with pytest.raises(DataError, match=rf"^role\.path: x: .* {need}.* the model has {need - 1} positions"):
        check(of(need - 1), "role", parts)


def test_a_reward_model_that_gives_targets_reads_the_data():
    sequences = Sequences(packed(30), packed(9), torch.tensor([0]))
    parts = dict(longest(sequences, 4))
    section = CheckpointRewardConfig(path="x", init=INIT | {"n_positions": 38})
    check(section, "reward", parts)
    with pytest.raises(DataError, match="the longest prompt of the data with its response has 39 tokens"):
        check(section, "reward", parts, scores_data=True)
