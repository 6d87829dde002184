"""Write data, tiny random models and a recipe for the runs of run.sh: make_models.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.data import toy

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
RECIPE = """\
algorithm: rloo
run: {{dir: {folder}/unnamed, steps: 10, seed: 1, progress: plain, trackers: []}}
checkpoint: {{every: 2}}
data: {{path: {folder}/data}}
prompts_per_step: 4
kl_reduction: sum
kl_coef: 0.05
truncated: keep
sampling: {{num_samples: 2, max_tokens: 8}}
policy: {{path: {folder}/policy, dtype: float32, zero_stage: 2, optimizer: {{lr: 1e-3}}}}
reference: {{dtype: float32}}
reward: {{path: {folder}/reward, dtype: float32}}
cluster: {{slots_per_core: 1, call_timeout_s: 300, start_timeout_s: 300}}
placement: {{policy: "0,2", reference: 1, reward: 3}}
"""


def main(folder: Path) -> None:
    """Data of 60 + 10 rows, a policy, a reward model, and recipe.yaml."""
    toy.write_toy(folder / "data", 60, 10, seed=0)
    tokenizer = toy.tokenizer()
    settings = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **LLAMA)
    for name, auto, labels in (
        ("policy", AutoModelForCausalLM, {}),
        ("reward", AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        for key, value in labels.items():
            setattr(settings, key, value)
        auto.from_config(settings).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
