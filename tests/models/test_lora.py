"""LoRA targets: every name matches modules that fit, and none whose weight another module reads too."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from align.config import CriticConfig, LoraConfig, OptimizerConfig, PolicyConfig, TrainedRewardConfig
from align.errors import ModelError
from align.models import load

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
    "moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "router": Llama4TextConfig(**SIZES, head_dim=4, intermediate_size_mlp=24, num_local_experts=2),
    "falcon": FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
    "opt": OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2),
    "mamba": MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1),
}
TIED = "model.embed_tokens.weight and lm_head.weight are one weight"


def empty(name: str, auto: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(CONFIGS[name]))


@pytest.mark.parametrize(
    ("name", "targets", "message", "remedy"),
    [
        ("tied", ["lm_head"], f"lm_head: {TIED}", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or"),
        ("tied", ["q_proj", "embed_tokens"], f"embed_tokens: {TIED}", "rank 0"),
        ("tied", ["model.embed_tokens"], f"model.embed_tokens: {TIED}", "rank 0"),
        ("gpt2", ["wte"], "wte: transformer.wte.weight and lm_head.weight are one weight", "c_attn, c_proj, c_fc"),
        (
            "llama",
            ["q_proj", "v_prj"],
            "v_prj matches no module of LlamaForCausalLM, did you mean v_proj?",
            "embed_tokens",
        ),
        ("llama", [".*_proj"], ".*_proj matches no module", "q_proj"),
        ("llama", ["all-linear", "lm_head"], "all-linear matches no module", "all-linear alone"),
        ("llama", ["input_layernorm"], "a LlamaRMSNorm cannot have adapters", "q_proj"),
        ("llama", ["mlp"], "mlp matches model.layers.0.mlp, and a LlamaMLP cannot have adapters", "up_proj"),
        ("mamba", ["out_proj"], "out_proj: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible", "in_proj"),
        ("mamba", ["all-linear"], "all-linear: [PEFT:PeftType.LORA] Module 'out_proj'", "in_proj, x_proj, dt_proj"),
        ("router", ["router"], "feed_forward.router, and a Llama4Router cannot have adapters", "q_proj"),
        ("opt", ["embed_positions"], "a OPTLearnedPositionalEmbedding cannot have adapters", "fc1"),
    ],
)
def test_a_target_that_cannot_be_trained_is_refused(name, targets, message, remedy):
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        load.add_lora(empty(name), LoraConfig(rank=2, targets=targets), task="CAUSAL_LM", key="policy.lora.targets")
    assert caught.value.where == "policy.lora.targets"
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy


def test_modules_that_share_a_weight_otherwise_are_refused():
    model = empty("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    for targets in (["q_proj"], ["all-linear"]):
        with pytest.raises(
            ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight and model\.layers\.1\.self_attn\.q"
        ):
            load.add_lora(copy.deepcopy(model), LoraConfig(rank=2, targets=targets), task="CAUSAL_LM")
    load.add_lora(model, LoraConfig(rank=2, targets=["k_proj"]), task="CAUSAL_LM")


def test_a_module_under_two_names_is_refused():
    model = empty("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp  # peft would put adapters under one of the names
    with pytest.raises(ModelError, match=r"up_proj: model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp"):
        load.add_lora(model, LoraConfig(rank=2, targets=["up_proj"]), task="CAUSAL_LM")


@pytest.mark.parametrize(
    ("name", "targets", "modules"),
    [
        ("tied", ["all-linear"], 2 * 7),
        ("llama", ["lm_head", "embed_tokens"], 2),
        ("llama", ["self_attn.q_proj", "model.layers.1.mlp.up_proj"], 3),
        ("gpt2", ["all-linear"], 4),
        (
            "router",
            ["all-linear"],
            2 * (4 + 3),
        ),  # attention and the shared expert: peft cannot add to a router of its own
        ("falcon", ["all-linear"], 4),  # its linear layers are a class of its own
        ("moe", ["all-linear"], 2 * (4 + 3)),  # attention, router, and both weights of all experts
    ],
)
def test_targets_that_fit_get_adapters(name, targets, modules):
    model = load.add_lora(empty(name), LoraConfig(rank=2, targets=targets), task="CAUSAL_LM")
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * modules


def test_a_score_head_is_no_target():
    model = empty("tied", AutoModelForSequenceClassification)
    assert isinstance(model.score, nn.Linear)
    with pytest.raises(ModelError, match="score is trained whole, without adapters"):
        load.add_lora(model, LoraConfig(rank=2, targets=["q_proj", "score"]), task="SEQ_CLS")


def test_every_trained_role_is_checked_on_a_model_without_weights(tmp_path):
    CONFIGS["tied"].save_pretrained(tmp_path)  # no weights are there
    common: dict[str, Any] = {"path": str(tmp_path), "dtype": "float32", "optimizer": OptimizerConfig(lr=1.0)}
    for role in (PolicyConfig, CriticConfig, TrainedRewardConfig):
        with pytest.raises(ModelError, match="q_prj matches no module of Llama"):
            load.check_lora(role(**common, lora=LoraConfig(rank=2, targets=["q_prj"])), 50, "role.lora.targets")
        load.check_lora(role(**common, lora=LoraConfig(rank=2)), 50, "role.lora.targets")
    tied = LoraConfig(rank=2, targets=["embed_tokens"])
    with pytest.raises(ModelError, match="are one weight"):
        load.check_lora(PolicyConfig(**common, lora=tied), 50, "policy.lora.targets")
    load.check_lora(
        CriticConfig(**common, lora=tied), 50, "critic.lora.targets"
    )  # it has no output layer to be tied to
