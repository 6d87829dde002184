"""Numbers of weights: published ones, and those of models that transformers builds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config import CriticConfig, LoraConfig, PolicyConfig
from align.models.lora import add_lora
from align.plan.shapes import ModelShape
from align.plan.sizes import _from_config, role_model, shape_of

PUBLISHED = {
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
}
"""Parameters that the model pages on huggingface.co count in the safetensors files."""


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_numbers_of_weights(path: str):
    shape, origin = shape_of(PolicyConfig(path=path), "policy.path")
    assert shape.total == PUBLISHED[path]
    assert "published" in origin


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "mistral", "head_dim": 24},
        {"model_type": "gemma2"},
    ],
    ids=str,
)
def test_numbers_of_weights_are_those_of_transformers(fields: dict):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 101}
    fields = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **fields}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = _from_config(config)
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    if not shape.total_override:
        assert shape.layer == sum(parameter.numel() for parameter in model.model.layers[1].parameters())
        config.num_labels = 5
        with torch.device("meta"):
            scorer = AutoModelForSequenceClassification.from_config(config)
        assert shape.scorer(5) == sum(parameter.numel() for parameter in scorer.parameters())


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "mlp.down_proj"]])
def test_adapters_are_those_of_peft(targets: list[str]):
    fields = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 101}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_lora(model, LoraConfig(rank=4, targets=targets), task="CAUSAL_LM")
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert _from_config(config).lora(4, targets) == adapters


def test_the_models_of_roles():
    path = "Qwen/Qwen2.5-0.5B-Instruct"
    critic = role_model("critic", CriticConfig(path=path, head="new"), 4)
    policy = role_model("policy", PolicyConfig(path=path, dtype="bfloat16", lora=LoraConfig(rank=8)), 1)
    assert critic is not None and policy is not None
    assert critic.weights == critic.trained == 494_032_768 + 896
    assert policy.trained == 4_399_104  # 8 x 24 layers x (2 x 1792 + 2 x 1024 + 3 x 5760)
    assert policy.weights == 494_032_768 + policy.trained


def test_the_cache_of_a_llama_70b():
    """328 kB for a position: 2 x 80 layers x 8 heads x 128 x 2 bytes."""
    shape = ModelShape(80, 8192, 64, 8, 128, 28672, 128256, tied=False)
    assert shape.cache(1, 1, 2) == 327_680
    assert shape.cache(4, 4096, 2) == 5_368_709_120
