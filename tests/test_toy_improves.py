"""The bundled task on Ray: a policy whose roles have processes of their own comes to answer better, by the rule."""

import json
from pathlib import Path

import pytest

from align.cli import main
from align.data import toy

BASE = """
algorithm: {algorithm}
run: {{dir: {run}, steps: {steps}, progress: none, trackers: []}}
data: {{path: {data}}}
"""

SFT = """
executor: local
responses: all
batch_size: 128
policy:
  path: {data}/tokenizer
  init: {{model_type: llama, hidden_size: 128, intermediate_size: 384, num_hidden_layers: 4, num_attention_heads: 4,
         num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}}
  dtype: float32
  optimizer: {{lr: 1.5e-3, schedule: cosine, warmup_steps: 20}}
"""

REWARD = """
executor: local
batch_size: 128
validate_every: 0
reward: {{path: {sft}, dtype: float32, optimizer: {{lr: 3e-4, schedule: cosine, warmup_steps: 10}}}}
"""

ALIGNED = """
policy: {{path: {sft}, dtype: float32, zero_stage: 2, optimizer: {{lr: 2e-4, warmup_steps: 3}}}}
reward: {{path: {reward}, dtype: float32}}
evaluation: {{every: {steps}, prompts: 100}}
sampling: {{num_samples: {K}, max_tokens: 16}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data of three of the task's requests, a policy that imitates good and bad answers alike, and a reward model."""
    folder = tmp_path_factory.mktemp("toy-task")
    with pytest.MonkeyPatch.context() as patch:
        few = ("repeat the words", "say the first word", "say the last word")
        patch.setattr(toy, "OPERATIONS", {name: toy.OPERATIONS[name] for name in few})
        patch.setattr(toy, "MAX_WORDS", 3)
        data = toy.write_toy(folder / "data", 6000, 120, seed=0)
    made = {"data": data, "sft": folder / "sft" / "final", "reward": folder / "reward" / "final"}
    for name, algorithm, steps, text in (("sft", "sft", 200, SFT), ("reward", "reward_model", 250, REWARD)):
        recipe = folder / f"{name}.yaml"
        recipe.write_text((BASE + text).format(algorithm=algorithm, run=folder / name, steps=steps, **made))
        assert main(["train", str(recipe)]) == 0
    return made


RUNS = {
    "rloo": (4, 40, ["prompts_per_step=64", "kl_coef=0.1", "kl_reduction=sum", "kl_estimator=k1"], "reward: 3"),
    "ppo": (
        1,
        25,
        ["prompts_per_step=256", "minibatches=4", "kl_coef=0.1", "kl_estimator=k1", "critic.optimizer.lr=5e-4"],
        "critic: 2, reward: 3",
    ),
    "dpo": (1, 60, ["batch_size=64", "loss={kind: scaled, beta: 0.1}", "policy.optimizer.lr=1e-4"], "reward: 3"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["rloo", *(pytest.param(name, marks=pytest.mark.full) for name in ("ppo", "dpo"))]
)
def test_raises_the_ground_truth_on_ray(tmp_path, base, algorithm):
    """Four tenths of a point and more, on prompts that were never learned from, and significantly more often better."""
    K, steps, changes, placement = RUNS[algorithm]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((BASE + ALIGNED).format(algorithm=algorithm, run=tmp_path / "run", steps=steps, K=K, **base))
    slots = f"placement={{policy: 0-1, reference: 2, {placement}}}"
    assert main(["train", str(recipe), *changes, slots]) == 0
    before, after = (json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    truth = "heldout/sampled/ground_truth"
    print(algorithm, before[truth], after[truth], after["heldout/sampled/win_rate/ground_truth/low"])
    assert after[truth] > before[truth] + 0.4
    assert after["heldout/sampled/win_rate/ground_truth/low"] > 0.5
