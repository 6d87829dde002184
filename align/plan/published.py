"""Published configs of models that recipes name, for machines on which the checkpoints are not.

From ``config.json`` of the repositories on huggingface.co. The layers of Llama-3.3-Nemotron-Super-49B differ from each
other (Bercovich et al. 2025, arXiv 2505.00949): only its number of weights is used.
"""

from __future__ import annotations

from typing import Any

_LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
_LLAMA2_13B = {
    "model_type": "llama",
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_QWEN3_32B = {
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
}
_QWEN25_05B = {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "meta-llama/Meta-Llama-3-70B",
            "meta-llama/Meta-Llama-3-70B-Instruct",
            "meta-llama/Llama-3.1-70B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
            "nvidia/Llama-3.1-Nemotron-70B-Reward-HF",
            "nvidia/Llama-3.3-Nemotron-70B-Reward",
        ),
        _LLAMA_70B,
    ),
    **dict.fromkeys(("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"), _LLAMA2_13B),
    "Qwen/Qwen3-32B": _QWEN3_32B,
    **dict.fromkeys(("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"), _QWEN25_05B),
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": _LLAMA_70B,
}
"""Fields of the transformers config, by hub id."""

TOTALS = {"nvidia/Llama-3_3-Nemotron-Super-49B-v1": 49_867_145_216}
"""Number of weights where the config's dimensions do not give it."""
