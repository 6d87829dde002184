"""The models of a recipe's roles: their dimensions and numbers of weights, from configs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.hub import cached_file

from align.config import (
    CheckpointRewardConfig,
    CriticConfig,
    EnsembleRewardConfig,
    GenerativeRewardConfig,
    ModelConfig,
    RoleConfig,
    TrainedModelConfig,
    TrainedRewardConfig,
)
from align.data import chat
from align.data.attributes import resolve_attributes
from align.errors import ModelError
from align.models import load
from align.plan.published import CONFIGS, TOTALS
from align.plan.shapes import FAMILIES, ModelShape


@dataclass(frozen=True)
class RoleModel:
    """A role with weights, on ``ranks`` GPUs."""

    name: str
    section: Any
    """The `ModelConfig` that holds the weights; that of the judge for a generative reward model."""
    shape: ModelShape
    weights: int
    """Weights of all its models."""
    trained: int
    """Weights that have gradients: all, those of adapters and head, or none."""
    ranks: int
    origin: str
    """Where the dimensions come from."""
    scores: bool = False
    """It reads a score, and no log-probabilities."""
    judge: bool = False
    """A generative reward model: it samples verdicts."""

    @property
    def width(self) -> int:
        """Bytes of a weight held for computing."""
        return 4 if self.section.dtype == "float32" else 2


def role_model(name: str, section: RoleConfig, ranks: int) -> RoleModel | None:
    """The model of a role; None where another server or a function takes its place. Raises `ModelError`."""
    judge = isinstance(section, GenerativeRewardConfig)
    model: Any = section.judge if isinstance(section, GenerativeRewardConfig) else section
    if not isinstance(model, ModelConfig):
        return None
    shape, origin = shape_of(model, f"{name}.path")
    scores = isinstance(model, (CriticConfig, TrainedRewardConfig, CheckpointRewardConfig))
    weights = _weights(model, shape)
    members = len(model.paths) if isinstance(model, EnsembleRewardConfig) else 0
    weights += (
        sum(shape_of(replace(model, path=path, revision=None), f"{name}.paths")[0].total for path in model.paths)
        if members
        else 0
    )
    trained = weights if isinstance(model, TrainedModelConfig) else 0
    if isinstance(model, TrainedModelConfig) and model.lora:
        trained = shape.lora(model.lora.rank, model.lora.targets) + (weights - shape.body if scores else 0)
        weights += shape.lora(model.lora.rank, model.lora.targets)
    return RoleModel(name, model, shape, weights, trained, ranks, origin, scores, judge)


def _weights(section: ModelConfig, shape: ModelShape) -> int:
    if isinstance(section, CriticConfig):
        return shape.scorer(1)
    if isinstance(section, TrainedRewardConfig):
        return shape.scorer(max(1, len(resolve_attributes(section.attributes))))
    if isinstance(section, CheckpointRewardConfig) and section.head in ("sequence_classification", "attributes"):
        return shape.scorer(max(1, len(resolve_attributes(section.attributes))))
    return shape.total


def shape_of(section: ModelConfig, key: str) -> tuple[ModelShape, str]:
    """Dimensions of a role's model, and where they come from: ``init``, a config on this disk, or the published one.

    Raises `ModelError` where there is none of these.
    """
    if section.init:
        return _from_config(load.config(section, _vocab_size(section))), "init"
    on_disk = Path(section.path).expanduser().is_dir() or cached_file(
        section.path,
        "config.json",
        revision=section.revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if not on_disk and section.path in CONFIGS:
        fields = dict(CONFIGS[section.path])
        shape = _from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        return replace(shape, total_override=TOTALS.get(section.path, 0)), f"published config of {section.path}"
    try:
        return _from_config(load.config(section)), "config.json"
    except ModelError as error:
        listed = ", ".join(sorted(CONFIGS))
        remedy = f"give a folder, or a hub id that is in the cache of this machine or among {listed}"
        raise ModelError(error.message, where=key, remedy=remedy) from error


def _vocab_size(section: ModelConfig) -> int:
    """Entries of the tokenizer at ``path``."""
    return chat.vocab_size(chat.load_tokenizer(section.path, section.revision, section.trust_remote_code))


def _from_config(config: PreTrainedConfig) -> ModelShape:
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    shape = ModelShape(
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=text.model_type == "qwen2" or bool(getattr(text, "attention_bias", False)),
        output_bias=text.model_type != "qwen2" and bool(getattr(text, "attention_bias", False)),
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        qk_norm=text.model_type == "qwen3",
        chunked_logits=text.model_type in FAMILIES,
    )
    return shape if text.model_type in FAMILIES else replace(shape, total_override=_count(config))


def _count(config: PreTrainedConfig) -> int:
    """Weights of a language model of another family, built on the meta device, which holds no numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
